"""Speeds that a run shows: never more than the machine can do."""

import io

import pytest
import torch

from cs_lm import device
from cs_lm.config.model import ModelConfig
from cs_lm.config.run import RunConfig
from cs_lm.models.stats import flops_per_token
from cs_lm.training.console import Display
from cs_lm.training.task import Task
from cs_lm.training.throughput import SpeedMeter

CONFIG = RunConfig(ModelConfig(64, 4, 160, 300, 2, 32), seq_length=32, batch_size=4)


def task(num_steps: int) -> Task:
    found = Task()
    found.num_steps, found.tokens_per_step = num_steps, CONFIG.tokens_per_step
    found.flops_per_token = flops_per_token(CONFIG.model, CONFIG.seq_length)
    return found


def shown(speed) -> str:
    out = io.StringIO()
    Display(100, 0, out).report(10, 2.5, 1e-3, 1.0, speed)
    return out.getvalue()


def test_by_hand():
    flops = flops_per_token(CONFIG.model, 32)
    meter = SpeedMeter(task(40), 20, 1000.0 * flops)
    first = meter.look(30, 5.0)
    assert first.tokens_per_s == 10 * 128 / 5 and first.eta_s == 5.0
    assert first.matmul_utilisation == pytest.approx(0.256) and "(26% of peak)" in shown(first)
    second = meter.look(35, 6.0)
    assert second.tokens_per_s == 5 * 128


def test_a_peak_that_is_exceeded_was_measured_wrongly():
    """A peak that was measured too low would show more than 100%."""
    meter = SpeedMeter(task(100), 0, 1e6)
    fast, slow = meter.look(10, 0.1), meter.look(20, 1.1)
    assert fast.matmul_utilisation == 1.0 and meter.peak_flops_per_s == fast.model_flops_per_s
    assert 0 < slow.matmul_utilisation < 1.0


def test_without_a_peak_the_speed_stands_alone():
    speed = SpeedMeter(task(100), 0, None).look(10, 1.0)
    assert speed.matmul_utilisation is None
    assert "GFLOP/s)" in shown(speed) and "peak" not in shown(speed)


def test_a_pause_does_not_decide(monkeypatch):
    """Of many products, one in ten is quick: the others wait for a processor."""
    clock, calls = [0.0], [0]

    def now():
        return clock[0]

    class Matrix:
        def __init__(self, size, *_shape, **_settings):
            self.size = size

        def __len__(self):
            return self.size

        def __matmul__(self, other):
            calls[0] += 1
            clock[0] += 2 * self.size**3 / 1e11 + (0.0 if calls[0] % 10 == 3 else 0.004)
            return self

        def __getitem__(self, _place):
            return torch.zeros(())

    monkeypatch.setattr(device.torch, "ones", Matrix)
    monkeypatch.setattr(device.time, "perf_counter", now)
    found = device.matrix_flops_per_s(torch.device("cpu"), torch.float32)
    assert found == pytest.approx(1e11, rel=0.01)


def test_a_product_that_a_device_does_not_have(monkeypatch):
    def ones(*_shape, **_settings):
        raise RuntimeError("not implemented for 'BFloat16'")

    monkeypatch.setattr(device.torch, "ones", ones)
    found = device.measured_speed(torch.device("cpu"), "bfloat16")
    assert found == (None, "not measured")
