"""How many weights a model has, and what they cost, from its config alone."""

from cs_lm.config.run import GPT2Config, ModelConfig

Config = ModelConfig | GPT2Config


def num_parameters(config: Config) -> int:
    return _num_product_weights(config) + _num_other_weights(config)


def flops_per_token(config: Config, seq_length: int) -> int:
    """Floating-point operations of forward and backward, for each trained token.

        6 * weights in matrix products + 12 * L * D * T

    Every weight multiplies and adds once forward and twice backward; attention does so for T
    keys of each query (the causal half is counted too, as is the custom).
    Source: Chowdhery et al. 2022, PaLM, appendix B.
    """
    attention = 12 * config.num_layers * config.d_model * seq_length
    return 6 * _num_product_weights(config) + attention


def num_block_product_weights(config: Config) -> int:
    """Weights in the matrix products of one block."""
    num_ffn = 2 if isinstance(config, GPT2Config) else 3
    return 4 * config.d_model**2 + num_ffn * config.d_model * config.d_ff


def _num_product_weights(config: Config) -> int:
    """Those that multiply: all matrices, of which a tied head is one."""
    head = config.vocab_size * config.d_model
    return config.num_layers * num_block_product_weights(config) + head


def _num_other_weights(config: Config) -> int:
    """Norms, biases, and tables that are only looked up."""
    d_model, layers = config.d_model, config.num_layers
    lookup = config.vocab_size * d_model
    if isinstance(config, ModelConfig):
        return lookup + (2 * layers + 1) * d_model
    biases = (4 if config.qkv_bias else 1) * d_model + config.d_ff + d_model
    norms = 2 * (2 * layers + 1) * d_model
    positions = config.context_length * d_model
    return (0 if config.tied_head else lookup) + layers * biases + norms + positions
