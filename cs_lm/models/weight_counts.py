"""How many weights each architecture has, from its config alone."""

from typing import NamedTuple

from cs_lm.config.model import GPT2Config, ModelConfig


class WeightCounts(NamedTuple):
    """Numbers of weights.

    in_block     in the matrix products of one block
    in_products  in all matrix products; a tied head is one of them
    in_total     all parameters: also norms, biases, and tables that are only looked up
    """

    in_block: int
    in_products: int
    in_total: int


def count_transformer(config: ModelConfig) -> WeightCounts:
    d_model, layers = config.d_model, config.num_layers
    in_block = 4 * d_model**2 + 3 * d_model * config.d_ff
    table = config.vocab_size * d_model
    in_products = layers * in_block + table
    norms = (2 * layers + 1) * d_model
    return WeightCounts(in_block, in_products, in_products + table + norms)


def count_gpt2(config: GPT2Config) -> WeightCounts:
    d_model, layers = config.d_model, config.num_layers
    in_block = 4 * d_model**2 + 2 * d_model * config.d_ff
    table = config.vocab_size * d_model
    in_products = layers * in_block + table
    own_head = 0 if config.tied_head else table
    positions = config.context_length * d_model
    biases = layers * ((5 if config.qkv_bias else 2) * d_model + config.d_ff)
    norms = 2 * (2 * layers + 1) * d_model
    return WeightCounts(in_block, in_products, in_products + own_head + positions + biases + norms)
