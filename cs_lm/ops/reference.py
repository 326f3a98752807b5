"""The definitions: every formula of the model once, as a pure function on tensors.

Axes: B batch, T query positions, S key positions, D d_model, H heads, K head size, F d_ff,
V vocabulary. `...` is any number of leading batch axes, also none.

Sums and exponentials of bfloat16 and float16 inputs are computed in float32. float64 stays
float64. `fused.py` has faster versions of the entries of `Ops`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
GELU_SLOPE, GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715


def at_least_float32(x: Tensor) -> Tensor:
    """x itself, or in float32 if it is narrower."""
    return x if x.dtype == torch.float32 else x.to(torch.promote_types(x.dtype, torch.float32))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T, plus the bias if there is one.

    Shapes: x (..., d_in), weight (d_out, d_in), bias (d_out), returns (..., d_out)
    """
    if bias is None:
        return x @ weight.T
    rows = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight.T)
    return rows.view(*x.shape[:-1], len(weight))


def embedding(token_ids: Tensor, weight: Tensor) -> Tensor:
    """The row of the table for each id.

    Shapes: token_ids (...) int64, weight (V, D), returns (..., D)
    Raises: IndexError (on CPU) for an id outside [0, V).
    """
    rows = weight.index_select(0, token_ids.reshape(-1))
    return rows.view(*token_ids.shape, weight.shape[-1])


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x), elementwise."""
    return x * torch.sigmoid(x)


def log_sigmoid(x: Tensor) -> Tensor:
    """log(1 / (1 + exp(-x))), elementwise                           [nats, <= 0]

        min(x, 0) - log(1 + exp(-|x|))

    Numerics: the exponential is at most 1, so no x overflows: -1e4 gives -1e4, with gradient 1.
    `minimum` halves the gradient where x is 0, as is right there. float32 inside.
    """
    wide = at_least_float32(x)
    below = torch.minimum(wide, wide.new_zeros(()))
    return (below - torch.exp(-wide.abs()).log1p()).to(x.dtype)


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """exp(x), scaled to sum 1 along `dim`. A row that is all -inf gives zeros, not NaN.

    Numerics: the row maximum is subtracted first, so exp() stays in [0, 1] and the sum is at
    least 1. The clamps only matter for a row that is all -inf. Same shape and dtype as x.
    """
    logits = at_least_float32(x)
    if not x.shape[dim]:  # an empty axis has no maximum
        return x.clone()
    peak = logits.detach().amax(dim, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    weights = torch.exp(logits - peak)
    return (weights / weights.sum(dim, keepdim=True).clamp(min=1.0)).to(x.dtype)


def _shifted_logits_and_log_normaliser(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """x minus its row maximum, and log(sum(exp())) of that, for log-probabilities.

    Both are relative to the maximum, so their difference is exact for logits of any size.
    Without the shift, 1e4 + log(2) in float32 loses the last ten bits of log(2).
    """
    logits = at_least_float32(x)
    peak = logits.detach().amax(dim, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    shifted = logits - peak
    # the sum is below 1 only in a row that is all -inf: the clamp makes its gradient 0, not NaN
    return shifted, torch.exp(shifted).sum(dim, keepdim=True).clamp(min=1.0).log()


def log_softmax(x: Tensor, dim: int = -1) -> Tensor:
    """Logarithm of softmax, computed without the log of a rounded probability.

        x_v - log(sum_u exp(x_u))                                   [nats, <= 0]

    An entry of -inf stays -inf. bfloat16 and float16 logits give float32.
    """
    shifted, log_normaliser = _shifted_logits_and_log_normaliser(x, dim)
    return shifted - log_normaliser


def check_targets(targets: Tensor, leading_shape: torch.Size, vocab_size: int, ignore_index: int):
    """Raises ValueError for targets of another shape or outside the vocabulary.

    The values are checked on the CPU only. Reading them from another device would stop its queue
    in every step, and there the index kernel checks the range itself.
    """
    if targets.shape != leading_shape:
        raise ValueError(
            f"cross_entropy: got targets of shape {tuple(targets.shape)}, need "
            f"{tuple(leading_shape)}: the shape of the logits without their last axis"
        )
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = ((targets < 0) | (targets >= vocab_size)) & (targets != ignore_index)
    if wrong.any():
        raise ValueError(
            f"cross_entropy: got target {targets[wrong][0].item()}, need an id in "
            f"[0, {vocab_size}) or ignore_index ({ignore_index}); was the text encoded with "
            "this vocabulary?"
        )


def cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor]:
    """Total surprise of the targets under the logits, and how many targets were counted.

    One position with logits z (one per vocabulary entry) and true id t contributes

        log(sum_v exp(z_v)) - z_t                                   [nats, >= 0]

    Shapes
        logits   (..., V)  float; unnormalised
        targets  (...)     int64; ids in [0, V), or `ignore_index`
        returns  loss_sum () float32 [nats],  num_counted () int64 [positions]

    Why two numbers: micro-batches, padded rows and ranks count different numbers of positions,
    so a mean of means is not the mean. Add both first, divide once (training/step.py).

    Numerics: exact for logits of +-1e4 and for entries of -inf (a target there costs inf).
    No counted target gives (0.0, 0), never NaN.
    Raises: ValueError for targets of a wrong shape or outside the vocabulary.
    Cost: about four times the memory of float32 logits, including the gradient.
    """
    check_targets(targets, logits.shape[:-1], logits.shape[-1], ignore_index)
    counted = targets != ignore_index
    safe_targets = torch.where(counted, targets, 0).unsqueeze(-1)  # (..., 1)
    shifted, log_normaliser = _shifted_logits_and_log_normaliser(logits, -1)
    losses = (log_normaliser - shifted.gather(-1, safe_targets)).squeeze(-1)  # (...)
    return torch.where(counted, losses, 0.0).sum(), counted.sum()


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor]:
    """`cross_entropy` of the logits x W^T: the last layer and the loss in one operation.

    Shapes: x (..., D), weight (V, D), targets (...), returns as `cross_entropy`
    """
    return cross_entropy(linear(x, weight), targets, ignore_index)


def token_log_probs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor]:
    """The log-probability of each target, and the entropy of each distribution.

    One position with logits z, target t and p = softmax(z / temperature) gives

        log p_t            [nats, <= 0]
        -sum_v p_v log p_v [nats, >= 0]

    Shapes: logits (..., V), targets (...) int64, returns two of (...), in at least float32
    Numerics: an entry of -inf has probability 0 and adds nothing to the entropy. Both results are
    0 where the target is `ignore_index`.
    Raises: ValueError for targets of a wrong shape or outside the vocabulary.
    """
    check_targets(targets, logits.shape[:-1], logits.shape[-1], ignore_index)
    log_probs = log_softmax(at_least_float32(logits) / temperature)
    probabilities = torch.exp(log_probs)
    terms = probabilities * log_probs.masked_fill(probabilities == 0, 0.0)
    counted = targets != ignore_index
    safe_targets = torch.where(counted, targets, 0).unsqueeze(-1)  # (..., 1)
    chosen = log_probs.gather(-1, safe_targets).squeeze(-1)
    return torch.where(counted, chosen, 0.0), torch.where(counted, -terms.sum(-1), 0.0)


def linear_log_probs(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[Tensor, Tensor]:
    """`token_log_probs` of the logits x W^T.

    Shapes: x (..., D), weight (V, D), targets (...), returns as `token_log_probs`
    """
    return token_log_probs(linear(x, weight), targets, temperature, ignore_index)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x divided by its root mean square along the last axis, times a learnt gain.

        x / sqrt(mean(x^2) + eps) * weight

    Shapes: x (..., D), weight (D), returns (..., D) in x's dtype
    Numerics: float32 inside, whatever the input's dtype.
    """
    wide = at_least_float32(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x shifted to mean 0 and scaled to variance 1 along the last axis, with learnt gain and bias.

        (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias

    Shapes: x (..., D), weight and bias (D), returns (..., D) in x's dtype
    Numerics: float32 inside, whatever the input's dtype.
    """
    wide = at_least_float32(x)
    centred = wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (centred * scale * weight + bias).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """GPT-2's GELU, elementwise: about x times the probability that a normal number is below x.

        x / 2 * (1 + tanh(u))  =  x sigmoid(2 u)        with u = sqrt(2 / pi) (x + 0.044715 x^3)

    Source: Hendrycks and Gimpel 2016; within 5e-4 of x Phi(x), Phi being the normal distribution.
    Numerics: float32 inside. At negative x, 1 + tanh(u) cancels, and the sigmoid stays exact: in
    bfloat16, 1 + tanh(u) is 0 for x from about -3 down.
    """
    wide = at_least_float32(x)
    u = GELU_SLOPE * (wide + GELU_CUBIC * wide * wide * wide)
    return (wide * torch.sigmoid(2 * u)).to(x.dtype)


def dropout(x: Tensor, kept: Tensor, probability: float) -> Tensor:
    """x / (1 - probability) where `kept` is True, and 0 elsewhere; the expected value stays x.

    kept  boolean, of x's shape; False with `probability` (dropout_mask.py draws it)
    Source: Srivastava et al. 2014.
    """
    return x * kept / (1 - probability)


def inverse_frequencies(theta: float, head_size: int) -> Tensor:
    """The rotation of each pair of a head from one position to the next.

        theta^(-2i/K)   for pair i of K/2                           [radians per position]

    Shapes: returns (K/2) float64, on the CPU
    Raises: ValueError for an odd head size.
    """
    if head_size % 2:
        raise ValueError(f"RoPE: got head size {head_size}, need an even one")
    return theta ** -(torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x with each pair of neighbouring entries (0,1), (2,3), ... rotated by its position's angle.

    Shapes: x (..., T, K), cos and sin (..., T, K/2) or broadcastable, returns x's shape and dtype
    Source: Su et al. 2021, RoFormer, equation 34.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def swiglu(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """Gated feed-forward layer: W2 (silu(W1 x) * W3 x).

    Shapes: x (..., D), w1 and w3 (F, D), w2 (D, F), returns (..., D)
    Source: Shazeer 2020, GLU variants improve Transformer.
    """
    return linear(silu(linear(x, w1)) * linear(x, w3), w2)


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """(T, S), True where a query may attend: to keys up to its own position.

    The last query stands at the position of the last key.
    """
    query = torch.arange(num_queries, device=device).unsqueeze(-1) + (num_keys - num_queries)
    return torch.arange(num_keys, device=device) <= query


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The values, averaged by how well each key matches the query: softmax(q k^T / sqrt(K)) v.

    mask    boolean, True = attend, broadcastable to (..., T, S)
    causal  a query attends to no later key; with more keys than queries (a key-value cache), the
            last query stands at the last key
    drop    dropout, applied to the weights (..., T, S)
    Shapes: q (..., T, K), k (..., S, K), v (..., S, K'), returns (..., T, K')
    Numerics: softmax in float32. A query that may attend to nothing gives zeros.
    Cost: O(T S) memory.
    """
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)  # (..., T, S)
    if causal and q.shape[-2] > 1:  # a single query stands last and attends to every key
        earlier = causal_mask(q.shape[-2], k.shape[-2], q.device)
        mask = earlier if mask is None else mask & earlier
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = softmax(scores)
    return (weights if drop is None else drop(weights)) @ v


class Ops(NamedTuple):
    """The operations that a model calls; each record is one implementation of all of them."""

    linear: Callable[..., Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    gelu: Callable[[Tensor], Tensor]
    rope: Callable[[Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    attention: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., tuple[Tensor, Tensor]]
    linear_log_probs: Callable[..., tuple[Tensor, Tensor]]
    log_sigmoid: Callable[[Tensor], Tensor]


CLEAR = Ops(
    linear,
    rms_norm,
    layer_norm,
    gelu,
    rope,
    swiglu,
    attention,
    linear_cross_entropy,
    linear_log_probs,
    log_sigmoid,
)
