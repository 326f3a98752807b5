"""`python -m cs_lm selfcheck`: compares each hand-written operation with torch's, on this machine.

Only this file of the library calls torch's own versions.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cs_lm.cli._errors import readable_errors
from cs_lm.config.fields import setting
from cs_lm.config.flags import parse_config
from cs_lm.config.run import DTYPES
from cs_lm.config.shared import device_setting
from cs_lm.device import resolve_device
from cs_lm.errors import Problem
from cs_lm.models.layers import RoPE
from cs_lm.ops import reference as ops
from cs_lm.ops.fused import FAST
from cs_lm.ops.fused_block import transformer_block
from cs_lm.ops.reference import CLEAR, Ops
from cs_lm.optim.adamw import AdamW
from cs_lm.optim.clip import clip_gradients

# Largest difference that rounding explains, relative to the largest entry.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
B, H, T, K, D, FF, V = 2, 4, 96, 16, 64, 160, 512


@dataclass(frozen=True)
class SelfcheckConfig:
    device: str = device_setting()
    dtype: str = setting("float32", "type of the inputs", choices=DTYPES)
    seed: int = setting(0, "the inputs follow from it")

    def validate(self) -> list[Problem]:
        return [] if self.seed >= 0 else [Problem("--seed", f"got {self.seed}", "0 or more")]


@dataclass(frozen=True)
class Check:
    name: str
    ours: Callable[..., Tensor]
    torchs: Callable[..., Tensor]
    inputs: list[Tensor]
    with_gradient: bool = True


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(SelfcheckConfig, "python -m cs_lm selfcheck", __doc__, argv)
    device, dtype = resolve_device(config.device), getattr(torch, config.dtype)
    generator = torch.Generator().manual_seed(config.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    print(f"device {device}, {config.dtype}, torch {torch.__version__}")
    print(f"{'operation':<36}{'value':>10}{'gradient':>10}   largest difference, relative")
    num_wrong = 0
    for check in _checks(normal, generator, device):
        differences = _differences(check)
        good = all(d <= TOLERANCE[dtype] for d in differences)
        num_wrong += not good
        shown = "".join(f"{d:>10.1e}" for d in differences)  # no gradient: the column stays empty
        print(f"{check.name:<36}{shown:<20}   {'ok' if good else 'DIFFERENT'}")
    if num_wrong:
        print(f"{num_wrong} operations differ by more than {TOLERANCE[dtype]:.0e}")
        return 1
    print(f"all within {TOLERANCE[dtype]:.0e}")
    return 0


def _checks(normal, generator: torch.Generator, device: torch.device) -> Iterator[Check]:
    x, gain, scores = normal(B, T, D), normal(D), normal(B, T, V)
    ids = torch.randint(0, V, (B, T), generator=generator).to(device)
    weight, table = normal(FF, D), normal(V, D)
    yield Check("linear", ops.linear, F.linear, [x, weight])
    yield Check(
        "embedding", lambda t: ops.embedding(ids, t), lambda t: F.embedding(ids, t), [table]
    )
    yield Check("silu", ops.silu, F.silu, [x])
    yield Check("softmax", ops.softmax, lambda s: F.softmax(s, -1), [scores])
    yield Check("log_softmax", ops.log_softmax, lambda s: F.log_softmax(s.float(), -1), [scores])
    yield Check(
        "cross_entropy",
        lambda s: ops.cross_entropy(s, ids)[0],
        lambda s: F.cross_entropy(s.float().flatten(0, 1), ids.flatten(), reduction="sum"),
        [scores],
    )
    rope = RoPE(ops.inverse_frequencies(10_000.0, K), T, device=device)
    rotation = rope.rotation(torch.arange(T, device=device))
    swiglu_weights = [normal(FF, D) / 8, normal(D, FF) / 8, normal(FF, D) / 8]
    qkv = [normal(B, H, T, K) for _ in range(3)]
    inputs = _Inputs(x, gain, ids, table, rotation, swiglu_weights, qkv)
    for label, record in (("clear", CLEAR), ("fast", FAST)):
        yield from _record_checks(label, record, inputs)
    gains, squares = [gain, normal(D)], [normal(D, D) / 8 for _ in range(4)]
    yield Check(
        "fast block",
        lambda a, *p: transformer_block(a, *rotation, H, (1e-5, 1e-5), p[:2], p[2:]),
        lambda a, *p: _torch_block(a, rotation, *p),
        [x, *gains, *squares, *swiglu_weights],
    )
    yield Check("AdamW, 10 updates", _adamw(AdamW), _adamw(torch.optim.AdamW), [weight], False)
    clipped = _clipped(clip_gradients), _clipped(torch.nn.utils.clip_grad_norm_)
    yield Check("clip_gradients", *clipped, [x], with_gradient=False)


class _Inputs(NamedTuple):
    """Inputs for the operations of an `Ops` record."""

    x: Tensor
    gain: Tensor
    ids: Tensor
    table: Tensor
    rotation: tuple[Tensor, Tensor]
    weights: list[Tensor]
    qkv: list[Tensor]


def _record_checks(label: str, record: Ops, inputs: _Inputs) -> Iterator[Check]:
    x, gain, ids, table, rotation, weights, qkv = inputs
    yield Check(
        f"{label} rms_norm",
        lambda a, g: record.rms_norm(a, g, 1e-5),
        lambda a, g: F.rms_norm(a, (D,), g, 1e-5),
        [x, gain],
    )
    yield Check(
        f"{label} layer_norm",
        lambda a, g: record.layer_norm(a, g, g / 2, 1e-5),
        _torch_layer_norm,
        [x, gain],
    )
    gelu = functools.partial(F.gelu, approximate="tanh")
    yield Check(f"{label} gelu", record.gelu, gelu, [x])
    yield Check(
        f"{label} rope",
        lambda q: record.rope(q, *rotation),
        lambda q: _complex_rope(q, *rotation),
        [qkv[0]],
    )
    yield Check(
        f"{label} swiglu",
        record.swiglu,
        lambda a, w1, w2, w3: F.linear(F.silu(F.linear(a, w1)) * F.linear(a, w3), w2),
        [x, *weights],
    )
    yield Check(
        f"{label} causal attention",
        lambda q, k, v: record.attention(q, k, v, causal=True),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        qkv,
    )
    yield Check(
        f"{label} linear_cross_entropy",
        lambda a, w: record.linear_cross_entropy(a, w, ids)[0],
        lambda a, w: F.cross_entropy(
            F.linear(a, w).float().flatten(0, 1), ids.flatten(), reduction="sum"
        ),
        [x, table],
    )
    yield Check(
        f"{label} linear_log_probs",
        lambda a, w: record.linear_log_probs(a, w, ids)[0],
        lambda a, w: F.linear(a, w).float().log_softmax(-1).gather(-1, ids.unsqueeze(-1))[..., 0],
        [x, table],
    )
    yield Check(f"{label} log_sigmoid", record.log_sigmoid, F.logsigmoid, [x])


def _torch_layer_norm(x: Tensor, gain: Tensor) -> Tensor:
    """torch's, in float32: on a single thread, torch sums the gain's gradient in bfloat16."""
    wide = gain.float()
    return F.layer_norm(x.float(), (D,), wide, wide / 2, 1e-5).to(x.dtype)


def _complex_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)


def _torch_block(x, rotation, gain1, gain2, wq, wk, wv, wo, w1, w2, w3) -> Tensor:
    h = F.rms_norm(x, (D,), gain1, 1e-5)
    q, k, v = (F.linear(h, w).unflatten(-1, (H, K)).transpose(1, 2) for w in (wq, wk, wv))
    q, k = _complex_rope(q, *rotation), _complex_rope(k, *rotation)
    heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + F.linear(heads.transpose(1, 2).flatten(-2), wo)
    h = F.rms_norm(x, (D,), gain2, 1e-5)
    return x + F.linear(F.silu(F.linear(h, w1)) * F.linear(h, w3), w2)


def _adamw(optimizer_class) -> Callable[[Tensor], Tensor]:
    def run(weight: Tensor) -> Tensor:
        parameter = weight.detach().clone().requires_grad_()
        optimizer = optimizer_class([parameter], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
        for _ in range(10):
            parameter.grad = torch.sin(parameter.detach())
            optimizer.step()
        return parameter.detach()

    return run


def _clipped(clip) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        parameter = x.detach().clone().requires_grad_()
        parameter.grad = x.detach().clone()
        clip([parameter], 1.0)
        return parameter.grad

    return run


def _differences(check: Check) -> list[float]:
    """Largest difference of the value, and of all gradients, relative to the largest entry."""
    results = []
    for function in (check.ours, check.torchs):
        leaves = [t.detach().clone().requires_grad_() for t in check.inputs]
        value = function(*leaves)
        gradients: tuple[Tensor, ...] = ()
        if check.with_gradient:
            weights = torch.linspace(-1, 1, value.numel(), device=value.device)
            total = (value.float() * weights.reshape(value.shape)).sum()
            gradients = torch.autograd.grad(total, leaves)
        results.append([value.detach(), *gradients])
    relative = [
        ((a.float() - b.float()).abs().amax() / b.float().abs().amax().clamp(min=1e-6)).item()
        for a, b in zip(*results, strict=True)
    ]
    return [relative[0], max(relative[1:])] if check.with_gradient else relative
