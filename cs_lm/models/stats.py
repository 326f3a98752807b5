"""How many weights and FLOPs a model has, from its config alone."""

from cs_lm.config.model import ArchitectureConfig
from cs_lm.models.registry import ARCHITECTURES
from cs_lm.models.weight_counts import WeightCounts

FLOAT_BYTES = 4  # of a stored weight: float32


def count_weights(config: ArchitectureConfig) -> WeightCounts:
    return ARCHITECTURES[config.architecture].count_weights(config)


def num_parameters(config: ArchitectureConfig) -> int:
    return count_weights(config).in_total


def num_scalar_parameters(config: ArchitectureConfig) -> int:
    """Of a reward model: a row and a bias in place of the head for the vocabulary."""
    own_head = 0 if getattr(config, "tied_head", False) else config.vocab_size * config.d_model
    return num_parameters(config) - own_head + config.d_model + 1


def flops_per_token(config: ArchitectureConfig, seq_length: int) -> int:
    """Floating-point operations of forward and backward, for each trained token.

        6 * weights in matrix products + 12 * L * D * T

    Each weight costs one multiplication and one addition forward, and two of each backward.
    Attention costs the same for T keys of each query (the masked half counts too, as is usual).
    Source: Chowdhery et al. 2022, PaLM, appendix B.
    """
    attention = 12 * config.num_layers * config.d_model * seq_length
    return 6 * count_weights(config).in_products + attention
