"""Layer norm, GELU, attention by length, the optimizer's step and clipping, beside torch's own.

python -m benchmarks.parts [--rounds 5]
"""

import argparse
import functools

from benchmarks.measure import Found, in_turns, peak_mb
from benchmarks.training import MODELS, SETTINGS

WIDTHS = {"layer_norm": 768, "gelu": 3072}
SMALL_REPEATS = 20
LENGTHS = {256: 20, 1024: 20, 2048: 8, 4096: 2, 8192: 1}


def attention(length: int, is_ours: bool):
    """Forward and backward, causal, B 1, H 8, K 64; the memory is above that of the inputs."""
    import torch
    import torch.nn.functional as F

    from cs_lm.ops.fused import attention as fast

    operation = functools.partial(fast, causal=True)
    if not is_ours:
        operation = functools.partial(F.scaled_dot_product_attention, is_causal=True)
    inputs = torch.randn(3, 1, 8, length, 64)
    q, k, v = (part.clone().requires_grad_() for part in inputs)
    operation(q[..., :2, :], k[..., :2, :], v[..., :2, :]).sum().backward()
    before_mb = peak_mb()

    def timed() -> Found:
        for _ in range(LENGTHS[length]):
            operation(q, k, v).backward(inputs[0])
        return Found(above_mb=max(1.0, peak_mb() - before_mb))

    return timed


def small_operation(name: str, who: str):
    """Forward and backward of what GPT-2 has between its products: 2,048 rows."""
    import torch
    import torch.nn.functional as F

    from cs_lm.ops.fused import FAST
    from cs_lm.ops.reference import CLEAR

    width = WIDTHS[name]
    x = torch.randn(2048, width, requires_grad=True)
    grad = torch.randn(2048, width)
    gain, bias = (torch.randn(width, requires_grad=True) for _ in range(2))
    if who == "torch":
        norm = functools.partial(F.layer_norm, normalized_shape=(width,), eps=1e-5)
        operations = {
            "layer_norm": lambda: norm(x, weight=gain, bias=bias),
            "gelu": lambda: F.gelu(x, approximate="tanh"),
        }
    else:
        record = FAST if who == "cs_lm" else CLEAR
        operations = {
            "layer_norm": lambda: record.layer_norm(x, gain, bias, 1e-5),
            "gelu": lambda: record.gelu(x),
        }
    operation = operations[name]
    operation().backward(grad)

    def timed() -> None:
        for _ in range(SMALL_REPEATS):
            operation().backward(grad)

    return timed


def _parameters(name: str) -> list:
    import torch

    from cs_lm.config.model import ModelConfig
    from cs_lm.models.transformer import TransformerLM

    parameters = list(TransformerLM(ModelConfig(**MODELS[name][0])).parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def adamw(name: str, is_ours: bool, compiled: bool = False):
    import torch

    from cs_lm.optim.adamw import AdamW
    from cs_lm.training.malloc import keep_freed_memory

    if is_ours:
        keep_freed_memory()  # as a run does
    kind = AdamW if is_ours else functools.partial(torch.optim.AdamW, fused=True)
    optimizer = kind(_parameters(name), **SETTINGS)
    if is_ours and compiled:
        optimizer.compile(print)
    optimizer.step()
    return lambda: [optimizer.step() for _ in range(MODELS[name][2])]


def clipping(name: str, is_ours: bool):
    import torch

    from cs_lm.optim.clip import clip_gradients

    parameters = _parameters(name)
    clip = clip_gradients if is_ours else torch.nn.utils.clip_grad_norm_
    clip(parameters, 1e9)
    return lambda: [clip(parameters, 1e9) for _ in range(MODELS[name][2])]


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args(argv).rounds

    def against(question: str, contestant, key, peer: str, repeats: int) -> None:
        both = {
            "cs_lm": functools.partial(contestant, key, True),
            peer: functools.partial(contestant, key, False),
        }
        in_turns(question, both, rounds, repeats)

    for name, width in WIDTHS.items():
        contestants = {
            who: functools.partial(small_operation, name, who)
            for who in ("cs_lm", "torch", "cs_lm, clear")
        }
        in_turns(f"{name}, 2048 x {width}", contestants, rounds, SMALL_REPEATS)
    for length, repeats in LENGTHS.items():
        against(
            f"attention, T {length}", attention, length, "scaled_dot_product_attention", repeats
        )
    for name, (_, _, repeats) in MODELS.items():
        fused = "fused torch.optim.AdamW"
        against(f"AdamW, {name}", adamw, name, fused, repeats)
        compiled = functools.partial(adamw, compiled=True)
        against(f"AdamW, compiled, {name}", compiled, name, fused, repeats)
        against(f"clipping, {name}", clipping, name, "clip_grad_norm_", repeats)


if __name__ == "__main__":
    main()
