import os
import platform
import signal
import subprocess
import sys

import pytest
import torch

from cs_lm import device
from cs_lm.config.model import ModelConfig
from cs_lm.config.run import RunConfig
from cs_lm.data.batches import Batch
from cs_lm.models.base import next_token_loss
from cs_lm.models.transformer import TransformerLM
from cs_lm.ops.compile import CompileWithFallback
from cs_lm.ops.fused import OPS
from cs_lm.ops.reference import IGNORE_INDEX
from cs_lm.optim.adamw import AdamW
from cs_lm.optim.param_groups import parameter_groups
from cs_lm.training import malloc
from cs_lm.training.signals import StopRequested, StopSignals
from cs_lm.training.step import autocast_context, train_step, under_autocast
from tests.conftest import no_compiler
from tests.tolerances import DEEP, close

CONFIG = ModelConfig(12, 3, 20, 17, 2, 11)
B, T = 4, 5


def model_and_optimizer(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    model = TransformerLM(CONFIG, generator=generator, device=device)
    return model, AdamW(parameter_groups(model, 0.1), lr=1e-2)


def batch():
    ids = torch.randint(0, 17, (B, T + 1), generator=torch.Generator().manual_seed(1))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def test_micro_batches_are_one_batch():
    """Also when they hold different numbers of counted targets: a mean of means would differ."""
    x, y = batch()
    y[0] = IGNORE_INDEX
    results = []
    for parts in ([slice(4)], [slice(1), slice(1, 3), slice(3, 4)]):
        batches = [Batch(x[part], y[part]) for part in parts]
        model, optimizer = model_and_optimizer()
        loss, norm = train_step(model, optimizer, batches, 0.5)
        results.append((loss, norm, [p.detach() for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ops", OPS)
def test_activation_checkpointing_changes_memory_alone(ops, dtype):
    """The same loss and gradients, and of each block only its input is kept."""
    results, kept = [], []
    for checkpointing in (False, True):
        generator = torch.Generator().manual_seed(0)
        model = TransformerLM(
            CONFIG, OPS[ops], generator=generator, activation_checkpointing=checkpointing
        )
        kept.append(0)

        def keep(tensor):
            if not isinstance(tensor, torch.nn.Parameter):
                kept[-1] += tensor.numel()
            return tensor

        x, y = batch()
        counted = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with counted, autocast_context(torch.device("cpu"), dtype):
            loss, _ = next_token_loss(model, Batch(x, y))
        loss.backward()
        results.append((loss.detach(), *(p.grad for p in model.parameters())))
    for expected, actual in zip(*results):
        close(actual, expected, DEEP, getattr(torch, dtype))
    of_blocks = CONFIG.num_layers * B * T * CONFIG.d_model
    assert of_blocks <= kept[1] < 0.5 * kept[0]


def test_activation_checkpointing_with_frozen_parameters():
    gradients = []
    for checkpointing in (False, True):
        generator = torch.Generator().manual_seed(0)
        model = TransformerLM(CONFIG, generator=generator, activation_checkpointing=checkpointing)
        model.token_embeddings.weight.requires_grad_(False)
        model.layers[0].ln1.weight.requires_grad_(False)
        next_token_loss(model, batch())[0].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert [g is None for g in gradients[0]] == [g is None for g in gradients[1]]
    for plain, checkpoint_activations in zip(*gradients):
        if plain is not None:
            close(checkpoint_activations, plain, DEEP)


def test_without_a_compiler_there_is_one_line_and_the_same_result(monkeypatch):
    monkeypatch.setattr(torch, "compile", no_compiler)
    said = []
    function = CompileWithFallback(lambda x: x + 1, said.append)
    assert [function(1), function(2)] == [2, 3]
    assert said == [
        "--compile: torch.compile failed (No compiler found); continuing without compilation"
    ]


def test_an_error_of_the_function_itself_is_not_the_compilers(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)

    def broken(_x):
        raise RuntimeError("of its own")

    said = []
    with pytest.raises(RuntimeError, match="of its own"):
        CompileWithFallback(broken, said.append)(1)
    assert not said


def test_returns_loss_and_norm_from_before_the_update():
    model, optimizer = model_and_optimizer()
    x, y = batch()
    expected = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).detach()
    loss, norm = train_step(model, optimizer, [Batch(x, y)], 1e-3)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    clipped = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    assert norm.item() > 1e-3 and clipped == pytest.approx(1e-3, rel=1e-3)


def test_a_step_learns():
    model, optimizer = model_and_optimizer()
    losses = [train_step(model, optimizer, [batch()], 1.0)[0].item() for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_step_never_waits_for_the_device():
    """Tensors without memory have no values: reading one back, as .item() would, is an error."""
    model, optimizer = model_and_optimizer("meta")
    x, y = (ids.to("meta") for ids in batch())
    for _ in range(2):
        loss, norm = train_step(model, optimizer, [Batch(x, y)] * 2, 1.0)
    assert loss.is_meta and norm.is_meta
    with pytest.raises(RuntimeError):
        loss.item()


def test_bfloat16_keeps_float32_weights_and_comes_close():
    losses = {}
    for dtype in ("float32", "bfloat16"):
        model, optimizer = model_and_optimizer()
        loss_function = under_autocast(next_token_loss, torch.device("cpu"), dtype)
        for _ in range(3):
            loss, _ = train_step(model, optimizer, [batch()], 1.0, loss_function)
        losses[dtype] = loss.item()
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert {s["exp_avg"].dtype for s in optimizer.state.values()} == {torch.float32}
    assert losses["float32"] != losses["bfloat16"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_number_of_steps():
    config = RunConfig(batch_size=4, seq_length=8, grad_accum=2, num_epochs=2.5)
    assert config.num_steps(640) == 25
    assert config.num_steps(3) == 1
    limited = RunConfig(batch_size=4, seq_length=8, num_epochs=100.0, max_steps=7)
    assert limited.num_steps(640) == 7


def test_no_counted_target_changes_nothing_to_nan():
    model, optimizer = model_and_optimizer()
    x, y = batch()
    loss, norm = train_step(model, optimizer, [Batch(x, torch.full_like(y, IGNORE_INDEX))], 1.0)
    assert (loss.item(), norm.item()) == (0.0, 0.0)
    assert all(p.isfinite().all() for p in model.parameters())


def test_first_signal_is_noted():
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as signals:
        signals.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StopRequested, match="SIGTERM") as stopped:
            signals.check()
    assert stopped.value.exit_status == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is before


SIGNALS_PROGRAM = """
import signal, sys
from cs_lm.training.signals import StopRequested, StopSignals, StopRequested, raise_on_signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
signal.raise_signal(signal.SIGHUP)
if sys.argv[1] == "noted":
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGHUP)
        signals.check()
        signal.raise_signal(signal.SIGTERM)
        print("noted", flush=True)
        signal.raise_signal(signal.SIGINT)
else:
    with raise_on_signal():
        try:
            signal.raise_signal(signal.SIGTERM)
        except StopRequested:
            print("noted", flush=True)
            signal.raise_signal(signal.SIGINT)
print("never")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither signal")
@pytest.mark.parametrize("how", ["noted", "at once"])
def test_second_signal_ends_the_process_at_once(how):
    result = subprocess.run(
        [sys.executable, "-c", SIGNALS_PROGRAM, how], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (128 + signal.SIGINT, "noted\n")


@pytest.mark.parametrize("of_float32, hint", [(1e9, ""), (152e9, "; float32: 152 GFLOP/s, so")])
def test_a_device_that_is_slow_in_bfloat16_is_told_of(monkeypatch, of_float32, hint):
    speeds = {torch.float32: of_float32, torch.bfloat16: 1e9}
    monkeypatch.setattr(device, "matrix_flops_per_s", lambda _device, dtype: speeds[dtype])
    assert device.measured_speed(None, "float32") == (of_float32, f"{of_float32 / 1e9:.0f} GFLOP/s")
    flops_per_s, text = device.measured_speed(None, "bfloat16")
    assert flops_per_s == 1e9 and text.startswith("1 GFLOP/s" + hint)
    assert bool(hint) == (text != "1 GFLOP/s")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is a setting of glibc")
def test_freed_memory_is_kept(monkeypatch):
    """Both settings are taken; `python -m benchmarks.memory` counts the page faults they save."""
    asked = []

    class Library:
        def __init__(self, _name):
            pass

        @staticmethod
        def mallopt(name, value):
            asked.append((name, value))
            return 1

    monkeypatch.setattr(malloc.ctypes, "CDLL", Library)
    malloc.keep_freed_memory()
    mmap_max, trim_threshold = -4, -1  # glibc's malloc.h
    assert asked == [(mmap_max, 0), (trim_threshold, -1)]
