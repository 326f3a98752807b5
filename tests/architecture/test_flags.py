"""The flags of run_clm.py are frozen: courses and scripts name them."""

import argparse
import importlib
import typing
from pathlib import Path

import pytest

from cs_lm.cli.commands import COMMANDS
from cs_lm.cli.commands import main as command
from cs_lm.cli.train import main as train
from cs_lm.config.fields import choices_of, flag_of, plain_type, settings_of, value_of
from cs_lm.config.flags import FlagParser, add_flags, read_flags
from cs_lm.config.run import RunConfig

# spelling: (field, default), the course's own
COURSE_FLAGS = {
    "--d_model": ("d_model", 512),
    "--num_heads": ("num_heads", 8),
    "--d_ff": ("d_ff", 1344),
    "--vocab_size": ("vocab_size", 32000),
    "--num_layers": ("num_layers", 6),
    "--max_seq_length": ("context_length", 512),
    "--seq_length": ("seq_length", 256),
    "--batch_size": ("batch_size", 32),
    "--theta": ("rope_theta", 100000.0),
    "--device": ("device", "auto"),
    "--num_epochs": ("num_epochs", 10.0),
    "--lr": ("lr", 1e-4),
    "--lr_min": ("lr_min", 1e-5),
    "--warmup_ratio": ("warmup_ratio", 0.1),
    "--warmfix_ratio": ("warmfix_ratio", 0.9),
    "--corpus_size": ("corpus_size", None),
    "--chunk_size": ("chunk_size", 500_000),
    "--vocab_path": ("vocab_path", None),
    "--merges_path": ("merges_path", None),
    "--special_tokens": ("special_tokens", ("<|endoftext|>",)),
    "--log_interval": ("log_interval", 10),
    "--save_interval": ("save_interval", 500),
    "--weight_decay": ("weight_decay", 0.01),
    "--betas": ("betas", (0.9, 0.95)),
    "--eps": ("eps", 1e-8),
    "--max_norm": ("max_norm", 1.0),
}
OUR_FLAGS = {
    "--corpus_path",
    "--valid_path",
    "--valid_fraction",
    "--encoding_errors",
    "--mup_base_width",
    "--replicas",
    "--tensor_parallel",
    "--context_parallel",
    "--pipeline_parallel",
    "--optimizer_sharding",
    "--no-optimizer_sharding",
    "--sampling",
    "--grad_accum",
    "--dtype",
    "--compile",
    "--no-compile",
    "--activation_checkpointing",
    "--no-activation_checkpointing",
    "--eval_interval",
    "--eval_tokens",
    "--sample_interval",
    "--prompt",
    "--seed",
    "--max_steps",
    "--out_dir",
    "--resume",
    "--resume_step",
    "--keep_last",
    "--on_nan",
    "--init_from",
    "--text_field",
    "--document_separator",
    "--no-resume",
    "--dry_run",
    "--no-dry_run",
    "--tensorboard",
    "--no-tensorboard",
    "--wandb",
    "--no-wandb",
    "--mlflow",
    "--no-mlflow",
    "--ops",
    "--context_length",
    "--rope_theta",
    "--model",
    "--model_name",
    "--dropout",
    "--drop_rate",
    "--qkv_bias",
    "--no-qkv_bias",
    "--tied_head",
    "--no-tied_head",
    "--eval_train",
    "--no-eval_train",
    "--eval_first",
    "--no-eval_first",
    "--init",
    "--parallel",
    "--dist_timeout_s",
    "--check_interval",
}
HELP = {"-h", "--help"}


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = FlagParser(prog="run_clm.py")
    add_flags(parser, RunConfig)
    return parser


def test_flags_are_these(parser):
    spellings = {s for action in parser._actions for s in action.option_strings}
    assert spellings == set(COURSE_FLAGS) | OUR_FLAGS | HELP


@pytest.mark.parametrize("flag", COURSE_FLAGS)
def test_course_flag_keeps_field_type_and_default(parser, flag):
    name, default = COURSE_FLAGS[flag]
    owner, each = settings_of(RunConfig)[name]
    assert each.default == default
    hint = typing.get_type_hints(owner)[name]
    given = {"d_model": "7", "betas": "0.5 0.25"}.get(name)
    if default is not None and not isinstance(default, (str, tuple)):
        assert hint is type(default)
        given = "7"
    values, problems = read_flags(parser.parse_args([flag, *(given or "word").split()]), RunConfig)
    assert not problems and list(values) == [name]
    assert type(values[name]) is (type(default) if default is not None else str)


def test_help_shows_every_flag_with_default_and_unit(capsys):
    with pytest.raises(SystemExit) as end:
        train(["--help"])
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for flag, (_, default) in COURSE_FLAGS.items():
        assert flag in shown
        if default is not None:
            one = " ".join(map(str, default)) if isinstance(default, tuple) else default
            assert f"(default: {one})" in shown, flag
    assert "[tokens]" in shown and "[steps]" in shown and "(default: off)" in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_with_defaults(name, capsys):
    with pytest.raises(SystemExit) as end:
        command([name, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "default: " in shown or "required" in shown or name == "cache"


CONFIGS = {
    "run_clm.py": "cs_lm.config.run.RunConfig",
    "train-tokenizer": "cs_lm.cli.train_tokenizer.TrainTokenizerConfig",
    "encode": "cs_lm.cli.encode.EncodeConfig",
    "convert": "cs_lm.cli.convert.ConvertConfig",
    "evaluate": "cs_lm.cli.evaluate.EvaluateConfig",
    "generate": "cs_lm.cli.generate.GenerateConfig",
    "import-weights": "cs_lm.cli.import_weights.ImportConfig",
    "export-weights": "cs_lm.cli.export_weights.ExportConfig",
    "book": "cs_lm.cli.book.BookConfig",
    "score": "cs_lm.cli.score.ScoreConfig",
    "eval": "cs_lm.cli.eval.EvalConfig",
    "plot": "cs_lm.cli.plot.PlotConfig",
    "report": "cs_lm.cli.report.ReportConfig",
    "serve": "cs_lm.cli.serve.ServeConfig",
    "verify": "cs_lm.cli.verify.VerifyConfig",
    "cache": "cs_lm.cli.cache.CacheConfig",
    "sft": "cs_lm.alignment.sft.SFTConfig",
    "rank": "cs_lm.cli.rank.RankConfig",
    "reward": "cs_lm.alignment.reward_training.RewardConfig",
    "dpo": "cs_lm.alignment.dpo.DPOConfig",
    "ppo": "cs_lm.alignment.ppo.PPOConfig",
    "grpo": "cs_lm.alignment.grpo.GRPOConfig",
    "chat": "cs_lm.cli.chat.ChatConfig",
    "compare": "cs_lm.cli.compare.CompareConfig",
    "rlhf": "cs_lm.cli.rlhf.RLHFConfig",
    "plan": "cs_lm.cli.plan.PlanConfig",
    "sweep": "cs_lm.cli.sweep.SweepConfig",
    "scaling-law": "cs_lm.cli.scaling_law.ScalingLawConfig",
}
MAY_BE_NEGATIVE = ("frequency_penalty", "presence_penalty", "length_penalty")
FROZEN = Path(__file__).with_name("flags.txt")


def config_of(name: str) -> type:
    module, _, attribute = CONFIGS[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def all_flags() -> str:
    """One line a flag: command, spelling, default, unit, choices, help."""
    lines = []
    for name in CONFIGS:
        defaults = config_of(name)()
        for setting, (_, each) in settings_of(config_of(name)).items():
            facts, default = each.metadata, value_of(defaults, setting, each.default)
            parts = [name, flag_of(each), repr(default), facts["unit"], choices_of(each)]
            lines.append(" | ".join([*map(str, parts), facts["help"]]))
    return "\n".join(lines) + "\n"


def test_flags_defaults_and_help_are_frozen():
    """A change is meant and said: write what `all_flags` gives to flags.txt with it."""
    assert all_flags() == FROZEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("value", ["many", "nan", "-1", "1e999"])
@pytest.mark.parametrize("command_name", CONFIGS)
def test_each_number_refuses_what_is_none(command_name, value, capsys, tmp_path, monkeypatch):
    """One line that names the flag, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    for name, (owner, each) in settings_of(config_of(command_name)).items():
        kind = plain_type(typing.get_type_hints(owner)[name])
        if kind not in (int, float) or (name, value) == ("max_norm", "1e999"):  # inf: never
            continue
        if value == "-1" and name in MAY_BE_NEGATIVE:
            continue
        argv = [flag_of(each), value]
        if command_name == "run_clm.py":
            status = train([*argv, "--dry_run"])
        else:
            status = command([command_name, *argv])
        errors = capsys.readouterr().err.splitlines()
        assert status == 2 and any(flag_of(each) in line for line in errors), (argv, errors)
        assert all(line.startswith("error: ") for line in errors), errors
    assert list(tmp_path.iterdir()) == []
