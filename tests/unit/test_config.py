import argparse
from dataclasses import replace

import pytest

from cs_lm.config.data import DataConfig
from cs_lm.config.fields import from_json, to_json, validate_all
from cs_lm.config.fields import replace as replace_settings
from cs_lm.config.flags import FlagParser, add_flags, config_from_flags
from cs_lm.config.model import ModelConfig
from cs_lm.config.optim import OptimConfig
from cs_lm.config.run import RunConfig


def from_flags(*argv: str) -> RunConfig:
    parser = FlagParser(prog="run_clm.py")
    add_flags(parser, RunConfig)
    return config_from_flags(RunConfig(), parser.parse_strictly(argv))


def test_defaults_are_sound():
    assert validate_all(RunConfig()) == [] and from_flags() == RunConfig()


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--num_heads 5", r"--num_heads: got 5, need a divisor of --d_model \(512\)"),
        ("--num_heads 512", r"--num_heads: got 512, which makes the head size 1, need an even one"),
        ("--d_model 0", "--d_model: got 0, need 1 or more"),
        ("--d_model x", "--d_model: got 'x', need a whole number"),
        ("--lr x", "--lr: got 'x', need a number"),
        ("--lr nan", "--lr: got 'nan', need a number"),
        ("--lr 0", "--lr: got 0.0, need more than 0"),
        ("--lr_min 1", r"--lr_min: got 1.0, need 0 to --lr \(0.0001\)"),
        ("--seq_length 513", r"--seq_length: got 513, need at most --max_seq_length \(512\)"),
        ("--vocab_size 256", r"--vocab_size: got 256, need at least 257 \(256 bytes \+ 1 special"),
        ("--betas 0.9", "--betas: got 0.9, need two numbers from 0 to below 1"),
        ("--betas 0.9 0.95 0.99", "--betas: got 0.9 0.95 0.99, need two numbers"),
        ("--betas 0.9 1", "--betas: got 0.9 1.0, need two numbers"),
        ("--warmup_ratio 0.95", "--warmup_ratio, --warmfix_ratio: got 0.95 and 0.9, need"),
        ("--weight_decay -1", "--weight_decay: got -1.0, need 0 to 1000"),
        ("--device tpu", "--device: got 'tpu', need one of auto, cuda, cpu, mps"),
        ("--dtype float16", "--dtype: got 'float16', need one of float32, bfloat16"),
        ("--sampling all", "--sampling: got 'all', need one of random, epoch"),
        ("--encoding_errors x", "--encoding_errors: got 'x', need one of strict, replace"),
        ("--valid_fraction 1", "--valid_fraction: got 1.0, need a number between 0 and 1"),
        ("--valid_path a --valid_fraction 0.5", "--valid_fraction: has no effect beside --valid"),
        ("--vocab_path a", "--vocab_path: got it without --merges_path; give both or none"),
        ("--merges_path a", "--merges_path: got it without --vocab_path; give both or none"),
        ("--corpus_size a/b", "--corpus_size: got 'a/b', need a label without path characters"),
        ("--corpus_size ..", "--corpus_size: got '..', need a name for the store"),
        ("--num_epochs inf", "--num_epochs: got inf, need less than 1e"),
        ("--num_epochs 1e308", "--num_epochs: got 1e\\+308, need less than 1e\\+12"),
        ("--seed 99999999999999999999", "--seed: got 99999999999999999999, need less than 1e"),
        ("--chunk_size 2000000000", "--chunk_size: got 2000000000, need at most 1073741824"),
        ("--lr inf", "--lr: got inf, need more than 0, at most 1000"),
        ("--prompt \udcff", "--prompt: got .*, need text that UTF-8 can hold"),
        (
            "--compile --activation_checkpointing",
            "--activation_checkpointing: cannot be used with --compile, .*; leave one",
        ),
        ("--log_interval 0", "--log_interval: got 0, need 1 or more"),
        ("--max_steps 0", "--max_steps: got 0, need 1 or more"),
        ("--seed -1", "--seed: got -1, need 0 or more"),
        ("--max_seq_lenght 5", "--max_seq_lenght: unknown flag; did you mean --max_seq_length?"),
        ("--qqqqq", "--qqqqq: unknown flag; see --help"),
        ("5", "got '5', which belongs to no flag; see --help"),
        ("--d_model", "run_clm.py: argument --d_model: expected one argument; see --help"),
    ],
)
def test_each_wrong_flag_is_named(argv, message):
    with pytest.raises(ValueError, match=message):
        from_flags(*argv.split())


def test_empty_texts():
    for name in ("--prompt", "--special_tokens"):
        with pytest.raises(ValueError, match=rf"{name}: got an empty"):
            from_flags(name, "")


def test_everything_wrong_is_reported_at_once():
    with pytest.raises(ValueError) as error:
        from_flags("--num_heads", "5", "--lr", "x", "--betas", "1", "--dtype", "int8", "--seed=-2")
    lines = str(error.value).splitlines()
    assert sorted(line.split(":")[0] for line in lines) == sorted(
        ["--num_heads", "--lr", "--betas", "--dtype", "--seed"]
    )


def test_special_tokens_may_be_none_or_several():
    assert from_flags("--special_tokens").data.special_tokens == ()
    assert from_flags("--special_tokens", "a", "b").data.special_tokens == ("a", "b")


def test_both_spellings_reach_the_field():
    assert from_flags("--theta", "7").model == from_flags("--rope_theta", "7").model
    assert from_flags("--compile").compile and not from_flags("--no-compile").compile


def test_json_round_trip():
    config = RunConfig(
        ModelConfig(d_model=64), DataConfig(special_tokens=("a", "b")), OptimConfig(lr=1e-3), seed=4
    )
    assert from_json(RunConfig, to_json(config)) == config
    stored = to_json(config)
    stored["model"]["num_experts"] = 4
    with pytest.raises(ValueError, match=r"unknown settings \['num_experts'\]"):
        from_json(RunConfig, stored)


def test_settings_of_an_earlier_version_are_read():
    """It had one path of a corpus, or none."""
    stored = to_json(RunConfig())
    stored["data"].update(corpus_path="a.txt", valid_path=None)
    for name in ("text_field", "document_separator"):
        del stored["data"][name]
    del stored["init_from"]
    config = from_json(RunConfig, stored)
    assert config.data.corpus_path == ("a.txt",) and config.data.valid_path == ()
    assert from_json(RunConfig, to_json(config)) == config


def test_replace_reaches_nested_fields():
    config = replace_settings(RunConfig(), {"d_model": 64, "lr": 0.5, "seed": 9})
    assert (config.model.d_model, config.optim.lr, config.seed) == (64, 0.5, 9)
    assert config.data == RunConfig().data
    assert replace(config.model, d_model=512) == ModelConfig()


def test_flags_that_are_not_given_leave_the_base_alone():
    parser = FlagParser(prog="x")
    add_flags(parser, RunConfig)
    base = RunConfig(seed=5, batch_size=7)
    namespace = parser.parse_args(["--batch_size", "8"])
    assert isinstance(namespace, argparse.Namespace)
    assert config_from_flags(base, namespace) == replace(base, batch_size=8)


def test_an_odd_head_size_is_told_beside_other_problems():
    found = ModelConfig(d_model=12, num_heads=4, vocab_size=0).validate()
    assert [problem.where for problem in found] == ["--vocab_size", "--num_heads"]


def parsed(*argv: str) -> dict:
    parser = FlagParser(prog="run_clm.py")
    add_flags(parser, RunConfig)
    return vars(parser.parse_strictly(argv))


def test_values_that_begin_with_a_dash():
    assert parsed("--prompt", "-x")["prompt"] == "-x"
    assert parsed("--prompt", "--", "--special_tokens", "--", "a") == {
        "prompt": "--",
        "special_tokens": ["--", "a"],
    }
    assert parsed("--prompt", "- a list", "--lr", "-1") == {"prompt": "- a list", "lr": "-1"}
    assert parsed("--prompt=--resume")["prompt"] == "--resume"
    assert parsed("--special_tokens", "-a", "b", "--seed", "1")["special_tokens"] == ["-a", "b"]
    assert parsed("--special_tokens=--x--", "--special_tokens", "y")["special_tokens"] == [
        "--x--",
        "y",
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--special_tokens", "<|e|>", "--fp16"], "--fp16: unknown flag"),
        (["--corpus_path", "a", "--seed=1", "-v"], "-v: unknown flag"),
        (["--prompt", "--lr_mn", "3"], "--prompt: expected one argument"),
        (["--corpus_path"], "--corpus_path: expected at least one argument"),
        (["--lr", "1", "--lr=2"], r"--lr: is given 2 times \(--lr, --lr\); give it once"),
        (["--theta", "1", "--rope_theta", "2"], r"--theta: is given 2 times \(--theta, --rope_th"),
    ],
)
def test_words_that_are_no_values(argv, message):
    with pytest.raises(ValueError, match=message):
        parsed(*argv)


def test_lists_collect():
    given = parsed("--corpus_path", "a", "b", "--seed", "1", "--corpus_path", "c")
    assert given == {"corpus_path": ["a", "b", "c"], "seed": "1"}
