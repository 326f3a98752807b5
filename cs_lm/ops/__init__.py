"""The operations of the models, on plain tensors. `reference` is the book: every formula once.

No layer, no parameter and no config lives here. `from cs_lm import ops` gives the definitions.
Read `reference` first. `fused` has quicker twins of its entries, and `FAST`, the record of them;
their parts are `manual_backward` (gradients by hand), `tiled_attention`, `fused_block` (a whole
Transformer block), and `autocast` (which dtype a product takes). Besides: `dropout_mask`,
`activation_checkpoint`, `compile`.
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
    layer_norm,
    linear,
    linear_cross_entropy,
    log_softmax,
    rms_norm,
    rope,
    rope_frequencies,
    silu,
    softmax,
    swiglu,
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
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "log_softmax",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "silu",
    "softmax",
    "swiglu",
]
