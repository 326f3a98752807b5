"""Hand-written forward and backward of small operations, for `fused.py` and `fused_block.py`.

N is the product of all leading axes. Norms and rotations compute in at least float32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from cs_lm.ops.reference import GELU_CUBIC, GELU_SLOPE, at_least_float32

# On a CPU, consecutive passes work on parts of this many numbers, which stay in its cache.
CACHE_NUMBERS = 1 << 18


def cached_parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of all tensors, few enough for a CPU's cache; all rows on other devices."""
    first = tensors[0]
    whole = first.numel() <= CACHE_NUMBERS or first.device.type != "cpu"
    if whole or torch.compiler.is_compiling():
        return iter((tensors,))
    rows = max(1, CACHE_NUMBERS // first.shape[-1])
    return zip(*(tensor.split(rows) for tensor in tensors))


def rms_norm_forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """n = x / rms(x) and 1 / rms(x), (N, 1)."""
    wide = at_least_float32(x)
    # a product with 1 / D costs a CPU less than the division inside mean()
    mean = (wide * wide).sum(-1, keepdim=True).mul_(1 / x.shape[-1])
    scale = mean.add_(eps).rsqrt_()
    return wide * scale, scale


def rms_norm_backward(
    grad: Tensor, normal: Tensor, scale: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight w, given the gradient g of the output n w:

    dw = sum(g n)      dx = (g w - n mean(g w n)) / rms(x)
    """
    product = normal * grad
    mean = (product @ weight.to(product.dtype)).div_(normal.shape[-1]).unsqueeze(-1)  # (N, 1)
    grad_x = grad.to(product.dtype) * weight
    grad_x.addcmul_(normal, mean, value=-1).mul_(scale)
    return grad_x, product.sum(0).to(weight.dtype)


def layer_norm_forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """n = (x - mean) / sigma and 1 / sigma, (N, 1), where sigma^2 is the variance plus eps."""
    wide = at_least_float32(x)
    centred = wide - wide.mean(-1, keepdim=True)
    scale = centred.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return centred.mul_(scale), scale


def layer_norm_backward(
    grad: Tensor, normal: Tensor, scale: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight w and bias b, given the gradient g of the output n w + b:

    dw = sum(g n)   db = sum(g)   dx = (g w - mean(g w) - n mean(g w n)) / sigma
    """
    grad_x, grad_weight = rms_norm_backward(grad, normal, scale, weight)
    wide = grad.to(grad_x.dtype)
    mean = (wide @ weight.to(wide.dtype)).div_(normal.shape[-1]).unsqueeze(-1)  # (N, 1)
    return grad_x.sub_(mean * scale), grad_weight, wide.sum(0).to(weight.dtype)


def _twice_argument(x: Tensor, cubic: float) -> Tensor:
    """2 sqrt(2 / pi) (x + cubic x^3), in two passes."""
    linear = x.new_full((), 2 * GELU_SLOPE)
    return torch.addcmul(linear, x, x, value=2 * GELU_SLOPE * cubic).mul_(x)


def gelu_forward(x: Tensor) -> Tensor:
    """`ops.gelu` as x s, with s = sigmoid(2 u) = (1 + tanh(u)) / 2."""
    output = torch.empty_like(x)
    for part, out in cached_parts(x, output):
        wide = at_least_float32(part)
        torch.mul(_twice_argument(wide, GELU_CUBIC).sigmoid_(), wide, out=out)
    return output


def gelu_backward(x: Tensor, grad: Tensor) -> Tensor:
    """Gradient of x, given the gradient g of the output x s; s is that of `gelu_forward`:

    g (s + (s - s^2) 2 sqrt(2 / pi) (x + 3 * 0.044715 x^3))
    """
    grad_x = torch.empty_like(x)
    for part, of_part, out in cached_parts(x, grad, grad_x):
        part = at_least_float32(part)
        sigmoid = _twice_argument(part, GELU_CUBIC).sigmoid_()
        spread = sigmoid.addcmul(sigmoid, sigmoid, value=-1)
        slope = sigmoid.addcmul_(spread, _twice_argument(part, 3 * GELU_CUBIC))
        torch.mul(slope, of_part, out=out)
    return grad_x


def freqs_cis(cos: Tensor, sin: Tensor) -> Tensor:
    """cos + i sin: multiplication by it rotates a pair, by its conjugate rotates it back."""
    return torch.complex(at_least_float32(cos), at_least_float32(sin))


def view_as_complex_pairs(x: Tensor) -> Tensor:
    """A view of the pairs (0,1), (2,3), ... as complex numbers: (..., K) float32 to (..., K/2)."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def apply_rope(x: Tensor, rotation: Tensor) -> Tensor:
    """x (..., T, K) rotated by `rotation` (..., T, K/2), in x's dtype."""
    pairs = view_as_complex_pairs(at_least_float32(x)) * rotation
    return torch.view_as_real(pairs).flatten(-2).to(x.dtype)


def gated(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value."""
    hidden = torch.empty_like(gate)
    for a, b, out in cached_parts(gate, value, hidden):
        torch.sigmoid(a, out=out).mul_(a).mul_(b)
    return hidden


def swiglu_forward(x: Tensor, w1: Tensor, w3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.swiglu` up to the product with w2: x W1^T, x W3^T, and silu(x W1^T) * x W3^T."""
    gate, value = x @ w1.T, x @ w3.T  # (N, F)
    return gate, value, gated(gate, value)


def swiglu_backward(
    grad: Tensor,
    x: Tensor,
    gate: Tensor,
    value: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w1, w2 and w3. Computes the gated product, the input of w2, again."""
    hidden, grad_gate, grad_value = _gated_backward(gate, value, grad @ w2)
    grad_w2 = (hidden.T @ grad).T  # a quarter faster than grad.T @ hidden where D is 128
    grad_x = (grad_gate @ w1).addmm_(grad_value, w3)
    return grad_x, grad_gate.T @ x, grad_w2, grad_value.T @ x


def _gated_backward(
    gate: Tensor, value: Tensor, grad_hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`gated` again, and the gradients of gate (overwrites grad_hidden) and value.

    With a = gate, b = value, u = grad_hidden and s = sigmoid(a):

        db = u a s      da = u b (s + a s (1 - s))
    """
    hidden, grad_value = torch.empty_like(gate), torch.empty_like(gate)
    one = torch.ones((), dtype=gate.dtype, device=gate.device)
    for a, b, u, out, db in cached_parts(gate, value, grad_hidden, hidden, grad_value):
        sigmoid = torch.sigmoid(a)
        silu = a * sigmoid
        torch.mul(silu, b, out=out)
        torch.mul(u, silu, out=db)
        u.mul_(b).mul_(sigmoid.lerp_(one, silu))
    return hidden, grad_hidden, grad_value
