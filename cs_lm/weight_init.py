"""How weights begin: truncated normals drawn from a generator that is passed in."""

import math

import torch
from torch import Tensor

TRUNCATE_AT_STD = 3.0


def truncated_normal_(weight: Tensor, std: float, generator: torch.Generator | None) -> Tensor:
    """Fills the tensor in place from N(0, std^2), cut off at +-3 std; returns it.

    Numerics: a uniform number between the two cut-offs' probabilities goes through the inverse
    of the normal distribution: one draw an entry, no rejection. The draw is made on the
    generator's device, so one seed gives the same weights on every device.
    """
    if weight.is_meta:
        return weight
    edge = math.erf(TRUNCATE_AT_STD / math.sqrt(2))
    device = generator.device if generator is not None else weight.device
    uniform = torch.empty(weight.shape, dtype=torch.float32, device=device)
    uniform.uniform_(-edge, edge, generator=generator)
    normal = uniform.erfinv_().mul_(math.sqrt(2))
    # float32 rounding near the edge may step over it by an ulp
    normal.clamp_(-TRUNCATE_AT_STD, TRUNCATE_AT_STD)
    with torch.no_grad():
        return weight.copy_(normal.mul_(std))


def linear_std(d_in: int, d_out: int) -> float:
    """Keeps the variance of activations and of gradients near 1 (Glorot and Bengio 2010)."""
    return math.sqrt(2 / (d_in + d_out))


EMBEDDING_STD = 1.0


def gpt2_std(name: str, num_layers: int) -> float:
    """How a weight matrix of GPT-2 begins; the name is that of the state dict.

    What is added to the residual stream 2 L times is made smaller by the root of that.
    Source: Radford et al. 2019, section 2.3, and the code published with it.
    """
    if name.startswith("position_embeddings"):
        return 0.01
    adds_to_stream = name.endswith(("attn.output_proj.weight", "ffn.w2.weight"))
    return 0.02 / math.sqrt(2 * num_layers) if adds_to_stream else 0.02
