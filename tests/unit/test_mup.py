"""muP: learning rates and weights of a width, and activations that do not grow with it."""

import pytest
import torch

from cs_lm.alignment.reward_model import ScalarModel
from cs_lm.cli.train import main as train
from cs_lm.config.model import ModelConfig
from cs_lm.models.init import linear_std
from cs_lm.models.registry import build_model
from cs_lm.optim.param_groups import parameter_groups
from cs_lm.scaling.coordinate_check import coordinate_check, slopes
from cs_lm.training.run_dir import RunFolder, saved_config

SHAPE = {"num_heads": 2, "d_ff": 64, "vocab_size": 300, "num_layers": 1, "context_length": 8}


def model_of(width, base):
    generator = torch.Generator().manual_seed(0)
    return build_model(
        ModelConfig(d_model=width, mup_base_width=base, **SHAPE), generator=generator
    )


def test_at_the_base_width_nothing_changes():
    plain, scaled = model_of(64, None), model_of(64, 64)
    for one, other in zip(plain.parameters(), scaled.parameters()):
        assert torch.equal(one, other)
    assert [sorted(g) for g in parameter_groups(plain, 0.1)] == [
        sorted(g) for g in parameter_groups(scaled, 0.1)
    ]


def test_at_another_width():
    model = model_of(128, 32)
    matrices, others = parameter_groups(model, 0.1)
    assert matrices["lr_scale"] == 1 / 4 and "lr_scale" not in others
    assert matrices["weight_decay"] * matrices["lr_scale"] == pytest.approx(0.1)
    assert {id(p) for p in others["params"]} >= {id(model.token_embeddings.weight)}
    assert model.lm_head.weight.std().item() == pytest.approx(linear_std(32, 300) / 4, rel=0.05)
    inner = model.layers[0].attn.q_proj.weight.std().item()
    assert inner == pytest.approx(linear_std(128, 128), rel=0.05)


def test_a_reward_model_has_the_same_learning_rates():
    config = ModelConfig(d_model=128, mup_base_width=32, **SHAPE)
    matrices, others = parameter_groups(ScalarModel(config), 0.1)
    assert matrices["lr_scale"] == 1 / 4 and "lr_scale" not in others


def test_a_run_uses_them(tmp_path, monkeypatch):
    """A matrix and a gain after one step of AdamW, whose first steps are as large as their rate."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a text of some words " * 200, encoding="utf-8")
    changes = {}
    for name, more in (("plain", []), ("scaled", ["--mup_base_width", "4"])):
        flags = [
            "--corpus_path", "a.txt", "--vocab_size", "300", "--d_model", "32", "--num_heads", "2",
            "--d_ff", "64", "--num_layers", "1", "--max_seq_length", "8", "--seq_length", "8",
            "--batch_size", "2", "--weight_decay", "0", "--warmup_ratio", "0", "--lr", "1e-3",
            "--eval_tokens", "50", "--device", "cpu", "--out_dir", name, *more,
        ]  # fmt: skip
        assert train([*flags, "--max_steps", "1", "--lr_min", "1e-3"]) == 0
        content = RunFolder(name).read("last")
        start = build_model(
            saved_config(content).model, generator=torch.Generator().manual_seed(0)
        ).state_dict()
        changes[name] = [
            (content["model"][key] - start[key]).abs().max().item()
            for key in ("layers.0.ffn.w1.weight", "layers.0.ln1.weight")
        ]
    assert changes["plain"] == pytest.approx([1e-3, 1e-3], rel=0.05)
    assert changes["scaled"] == pytest.approx([1e-3 / 8, 1e-3], rel=0.05)


def test_activations_of_wide_models_change_as_much_as_those_of_narrow_ones():
    widths = (32, 64, 128, 256)
    scaled = slopes(coordinate_check(widths, 32, 1e-2))
    plain = slopes(coordinate_check(widths, None, 1e-2))
    assert set(scaled) == {"block 1", "block 2", "logits"}
    for name in ("block 1", "block 2"):
        assert abs(scaled[name]) < 0.15 and plain[name] > 0.4
    assert scaled["logits"] < 0.1 < plain["logits"]
