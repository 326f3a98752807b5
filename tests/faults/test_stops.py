"""Stopped at any place where a signal is looked for, a run goes on to the same end, bit for bit."""

import dataclasses
import functools
import os
import signal
from collections import Counter

import pytest
import torch

from cs_lm.config.fields import replace
from cs_lm.config.model import GPT2Config
from cs_lm.config.run import RunConfig
from cs_lm.models.base import next_token_loss
from cs_lm.training.run_dir import RunFolder
from tests.faults.tiny_run import CONFIG, assert_same_run, prepared, trainer_of

SHORT = replace(CONFIG, {"max_steps": 14, "eval_interval": 6, "sample_interval": 6})


class StopAt:
    """Takes the place of a trainer's look for signals, and sends one at the n-th look."""

    def __init__(self, trainer, number_of_look, signal_number=signal.SIGTERM):
        self._check = trainer.signals.check
        self._at, self._signal = number_of_look, signal_number
        self.looks = 0
        trainer.signals.check = self

    def __call__(self):
        self.looks += 1
        if self.looks == self._at:
            os.kill(os.getpid(), self._signal)
        self._check()


def noisy_loss(model, batch):
    """Draws from torch's generator: its draws must come back too."""
    total, count = next_token_loss(model, batch)
    return total * (1 + 0.1 * torch.rand(())), count


def run_to_the_end(folder, data, config, looks, loss_function):
    """Told to stop at every so many-th look; returns how often it was."""
    stops = 0
    for _ in range(1000):
        trainer = trainer_of(folder, data, config)
        if trainer.has_ended:
            return stops
        if loss_function is not None:
            trainer.task.loss = loss_function
        StopAt(trainer, looks)
        status = trainer.fit()
        assert status in (0, 128 + signal.SIGTERM)
        stops += status != 0
    raise AssertionError("it gets no further")


CASES = {
    "random": {},
    "epoch, accumulation": {"sampling": "epoch", "grad_accum": 2},
    "epochs end inside": {"sampling": "epoch", "batch_size": 96},
    "bfloat16": {"dtype": "bfloat16"},
    "clear": {"ops": "clear"},
    "checkpointing": {"activation_checkpointing": True},
    "skip": {"on_nan": "skip"},
    "compiled": {"compile": True},
    "dropout, accumulation": {"model_name": "gpt2-small", "grad_accum": 2},
    "dropout, checkpointing": {"model_name": "gpt2-small", "activation_checkpointing": True},
    "dropout, compiled": {"model_name": "gpt2-small", "compile": True},
}
GPT2 = GPT2Config(16, 2, 40, 300, 1, 32, drop_rate=0.2)


def config_of(case: str) -> RunConfig:
    model = GPT2 if "dropout" in case else SHORT.model
    return replace(dataclasses.replace(SHORT, model=model), CASES[case])


SLOW_CASES = {
    "compiled",
    "dropout, checkpointing",
    "dropout, compiled",
    "dropout, accumulation",
    "epoch, accumulation",
    "bfloat16",
    "clear",
    "skip",
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow) if case in SLOW_CASES else case for case in CASES],
)
def test_stopped_anywhere(case, work, monkeypatch):
    torch._dynamo.reset()  # what other tests compiled, of other models
    # a backend that needs no compiler
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(
        "cs_lm.training.language_modeling.SAMPLE_TOKENS", 4
    )  # a sample must fit between two stops
    config = config_of(case)
    loss_function = None if config.compile else noisy_loss
    data = prepared(work, config)
    assert run_to_the_end(work / "quiet", data, config, None, loss_function) == 0
    for looks in (13,) if config.compile else (9, 11, 13):
        folder = work / f"stopped{looks}"
        assert run_to_the_end(folder, data, config, looks, loss_function) > 1
        assert_same_run(work / "quiet", folder)


def noted(method, stop_at, interrupted, name):
    """Calls the method and counts whether a look inside it ended it."""
    before = stop_at.looks
    try:
        method()
    except BaseException:
        interrupted[name] += stop_at.looks > before
        raise


def test_a_signal_is_seen_in_every_kind_of_work(work, capsys, monkeypatch):
    """In each micro-batch, batch of the validation and token of the sample; and then saved."""
    config = replace(SHORT, {"grad_accum": 3})
    data = prepared(work, config)
    interrupted = Counter()
    for number_of_look in range(3, 60, 3):
        folder = work / str(number_of_look)
        trainer = trainer_of(folder, data, config)
        stop_at = StopAt(trainer, number_of_look)
        for name in ("_one_step", "_evaluate", "_sample"):
            method = functools.partial(noted, getattr(trainer, name), stop_at, interrupted, name)
            monkeypatch.setattr(trainer, name, method)
        assert trainer.fit() == 128 + signal.SIGTERM
        assert stop_at.looks == number_of_look, "it ends at the first look after the signal"
        if trainer.step:
            assert RunFolder(folder).read("last")["iteration"] == trainer.step
        assert "saved; run the same command with --resume to continue" in capsys.readouterr().out
    assert min(interrupted[name] for name in ("_one_step", "_evaluate", "_sample")) > 0


@pytest.mark.parametrize("name", ["_evaluate", "_sample"])
def test_saved_before_what_may_fail(name, work, monkeypatch):
    """A mistake of ours in the evaluation, out of memory in the sample: the work is safe."""
    config = replace(SHORT, {"save_interval": 0})
    data = prepared(work, config)
    trainer = trainer_of(work / "run", data, config)

    def fails():
        raise RuntimeError("out of memory")

    monkeypatch.setattr(trainer, name, fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.fit()
    assert RunFolder(work / "run").read("last")["iteration"] == 6
