"""The operations of the models, as functions on tensors. `reference` defines each formula once.

No layer, no parameter and no config lives here. `from cs_lm import ops` gives the definitions.
Read `reference` first. `fused` has faster versions of the same operations; `FAST` is their record.
They use `manual_backward` (hand-derived gradients), `tiled_attention`, `few_rows` (products of
generation), `log_probs` (of given tokens), `fused_block` (a whole Transformer block) and `autocast`
(the dtype of a product). The other files are `dropout_mask`, `activation_checkpoint`, `compile` and
`triton_attention` (a kernel for CUDA, which the harness asks for).
"""

from cs_lm.ops.reference import (
    CLEAR,
    IGNORE_INDEX,
    Ops,
    attention,
    causal_mask,
    cross_entropy,
    dropout,
    embedding,
    gelu,
    inverse_frequencies,
    layer_norm,
    linear,
    linear_cross_entropy,
    linear_log_probs,
    log_sigmoid,
    log_softmax,
    rms_norm,
    rope,
    silu,
    softmax,
    swiglu,
    token_log_probs,
)

__all__ = [
    "CLEAR",
    "IGNORE_INDEX",
    "Ops",
    "attention",
    "causal_mask",
    "cross_entropy",
    "dropout",
    "embedding",
    "gelu",
    "inverse_frequencies",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_log_probs",
    "log_sigmoid",
    "log_softmax",
    "rms_norm",
    "rope",
    "silu",
    "softmax",
    "swiglu",
    "token_log_probs",
]
