"""A new architecture is a config class, a model class and one registry entry; all else follows."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from torch import nn

from cs_lm.cli import commands
from cs_lm.cli import train as train_command
from cs_lm.config.fields import from_json, setting, to_json
from cs_lm.config.model import ArchitectureConfig, GPT2Config, ModelConfig
from cs_lm.config.run import RunConfig
from cs_lm.models.base import LanguageModel
from cs_lm.models.layers import Embedding, Factory, Linear, RMSNorm
from cs_lm.models.registry import ARCHITECTURES, Architecture, SavedActivations
from cs_lm.models.weight_counts import WeightCounts
from cs_lm.ops.fused import FAST
from tests.end_to_end.conftest import write_corpus


class GatedBlock(nn.Module):
    """x + silu(W x): it sees its own position only, so the cache has nothing to keep for it."""

    def __init__(self, d_model, factory):
        super().__init__()
        self.proj = Linear(d_model, d_model, factory=factory)

    def forward(self, x, mask=None, cache=None, layer=0):
        h = self.proj(x)
        return x + h * h.sigmoid()


class BigramLM(LanguageModel):
    def __init__(
        self, config, ops=FAST, *, generator=None, device=None, activation_checkpointing=False
    ):
        super().__init__(config, ops, activation_checkpointing)
        factory = Factory(generator, device)
        self.token_embeddings = Embedding(config.vocab_size, config.d_model, factory=factory)
        self.layers = nn.ModuleList(
            GatedBlock(config.d_model, factory) for _ in range(config.num_layers)
        )
        self.ln_final = RMSNorm(config.d_model, ops=ops, factory=factory)
        self.lm_head = Linear(config.d_model, config.vocab_size, factory=factory)

    def embed(self, token_ids, token_positions):
        return self.token_embeddings(token_ids), [{}] * self.config.num_layers


def count_bigram(config):
    in_block = config.d_model**2
    head = config.vocab_size * config.d_model
    in_products = config.num_layers * in_block + head
    return WeightCounts(in_block, in_products, in_products + head + config.d_model)


@pytest.fixture
def bigram(tmp_path, monkeypatch):
    monkeypatch.setattr(ArchitectureConfig, "registered", dict(ArchitectureConfig.registered))

    @dataclass(frozen=True)
    class BigramConfig(ArchitectureConfig, architecture="bigram"):
        d_model: int = setting(16, "width")
        num_heads: int = setting(1, "of nothing; the cache asks for it")
        d_ff: int = setting(16, "of nothing; estimates ask for it")
        vocab_size: int = setting(300, "token ids")
        num_layers: int = setting(2, "blocks")
        context_length: int = setting(32, "tokens", flag="--max_seq_length")
        gate: str = setting("silu", "what only this architecture has", choices=("silu",))
        norm_eps: float = field(default=1e-5)

        def validate(self):
            return [] if self.num_layers >= 0 else ["--num_layers: got less than 0"]

    saved = {
        (ops, dtype): SavedActivations(3, 0, 0, 0)
        for ops in ("fast", "clear")
        for dtype in ("float32", "bfloat16")
    }
    entry = Architecture(BigramLM, count_bigram, saved)
    monkeypatch.setitem(ARCHITECTURES, "bigram", entry)
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    return BigramConfig


FLAGS = ["--corpus_path", "animals.txt", "--seq_length", "16", "--batch_size", "2"]


def test_it_trains_resumes_and_writes(bigram, capsys):
    start = ["--model", "bigram", *FLAGS, "--lr", "1e-2", "--out_dir", "run"]
    assert train_command.main([*start, "--dry_run"]) == 0
    assert capsys.readouterr().out.split()[:2] == ["parameters", "10,128"]
    assert train_command.main([*start, "--max_steps", "30", "--eval_interval", "10"]) == 0
    first, last = (r for r in records("run", "train") if r["step"] in (1, 30))
    assert last["loss_nats"] < first["loss_nats"] - 0.5
    assert train_command.main(["--out_dir", "run", "--resume", "--max_steps", "40"]) == 0
    assert records("run", "end")[-1]["step"] == 40
    assert commands.main(["generate", "--out_dir", "run", "--prompt", "The", "--seed", "1"]) == 0
    argv = ["evaluate", "--out_dir", "run", "--text_path", "animals.txt"]
    assert commands.main(argv) == 0
    assert commands.main(["verify", "--out_dir", "run"]) == 0


def test_its_flags_are_checked_and_its_export_is_refused(bigram, capsys):
    assert train_command.main(["--model", "bigram", *FLAGS, "--gate", "tanh"]) == 2
    assert "--gate: got 'tanh', need one of silu" in capsys.readouterr().err
    assert train_command.main(["--model", "bigram", *FLAGS, "--theta", "5"]) == 2
    assert "--theta: has no effect with --model bigram" in capsys.readouterr().err
    assert train_command.main(["--model", "bigram", *FLAGS, "--max_steps", "1"]) == 0
    assert commands.main(["export-weights", "--out_dir", "runs/animals", "--to", "out"]) == 2
    assert "no other program is known to have 'bigram' models" in capsys.readouterr().err


def test_json_says_which_architecture(bigram):
    for model in (ModelConfig(), GPT2Config(), bigram(num_layers=3)):
        name = "gpt2-small" if isinstance(model, GPT2Config) else model.architecture
        config = RunConfig(model, model_name=name, seq_length=16)
        stored = json.loads(json.dumps(to_json(config)))
        assert stored["model"]["architecture"] == model.architecture
        assert from_json(RunConfig, stored) == config
    stored["model"]["architecture"] = "mamba"
    with pytest.raises(ValueError, match="got the architecture 'mamba', need one of transformer"):
        from_json(RunConfig, stored)


def records(run, kind):
    lines = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]
