"""Initial weights, drawn from a generator that the caller passes."""

import math

import torch
from torch import Tensor

TRUNCATE_AT_STD = 3.0


def truncated_normal_(weight: Tensor, std: float, generator: torch.Generator | None) -> Tensor:
    """Fills the tensor in place from N(0, std^2), cut off at +-3 std; returns it.

    Numerics: the inverse of the normal distribution maps a uniform number between the cut-offs'
    probabilities to each entry: one draw an entry, no rejection. The generator's device draws, so
    one seed gives the same weights on every device.
    """
    if weight.is_meta:
        return weight
    edge = math.erf(TRUNCATE_AT_STD / math.sqrt(2))
    device = generator.device if generator is not None else weight.device
    uniform = torch.empty(weight.shape, dtype=torch.float32, device=device)
    uniform.uniform_(-edge, edge, generator=generator)
    normal = uniform.erfinv_().mul_(math.sqrt(2))
    # float32 rounding may exceed the edge by one unit in the last place
    normal.clamp_(-TRUNCATE_AT_STD, TRUNCATE_AT_STD)
    with torch.no_grad():
        return weight.copy_(normal.mul_(std))


def linear_std(d_in: int, d_out: int) -> float:
    """Standard deviation of the weights of a linear layer.

    It keeps the variance of activations and gradients near 1 (Glorot and Bengio 2010).
    """
    return math.sqrt(2 / (d_in + d_out))


EMBEDDING_STD = 1.0


def init_gpt2_(
    name: str, weight: Tensor, num_layers: int, generator: torch.Generator | None
) -> None:
    """Fills a matrix with GPT-2's initial weights; `name` is its name in the state dict.

    The 2 L matrices whose products are added to the residual stream get a standard deviation that
    is smaller by sqrt(2 L). Biases start at 0.
    Source: Radford et al. 2019, section 2.3, and the code published with it.
    """
    adds_to_stream = name.endswith(("attn.output_proj.weight", "ffn.w2.weight"))
    std = 0.02 / math.sqrt(2 * num_layers) if adds_to_stream else 0.02
    if name.startswith("position_embeddings"):
        std = 0.01
    truncated_normal_(weight, std, generator)


def init_torch_default_(
    name: str, weight: Tensor, d_in: int, generator: torch.Generator | None
) -> None:
    """Fills a matrix or bias as torch's own layers do: tables N(0, 1), others U(+-1 / sqrt(d_in)).

    Models built from those layers start with these weights by default.
    """
    device = generator.device if generator is not None else weight.device
    drawn = torch.empty(weight.shape, device=device)
    if "embeddings" in name:
        drawn.normal_(generator=generator)
    else:
        drawn.uniform_(-1, 1, generator=generator).div_(math.sqrt(d_in))
    with torch.no_grad():
        weight.copy_(drawn)
