"""The published sizes of GPT-2 and GPT-3, as settings of a run."""

from typing import NamedTuple

from cs_lm.config.model import ArchitectureConfig, GPT2Config, ModelConfig


class GPTSize(NamedTuple):
    """One row of a paper's table of model sizes."""

    num_layers: int
    d_model: int
    num_heads: int
    lr: float | None = None  # None: not published for GPT-2
    tokens_per_step: float | None = None


DEFAULT_MODEL = "transformer"


# Sources: Radford et al. 2019, table 2; Brown et al. 2020, table 2.1. All attention is dense.
# In two rows of table 2.1, the heads do not fit the width. 1.3B has 24 heads of size 128 in width
# 2,048; here it has 16, which gives the 1.3 G parameters. 13B has 40 heads in width 5,140; here
# the width is 5,120.
GPT_SIZES = {
    "gpt2-small": GPTSize(12, 768, 12),
    "gpt2-medium": GPTSize(24, 1024, 16),
    "gpt2-large": GPTSize(36, 1280, 20),
    "gpt2-xl": GPTSize(48, 1600, 25),
    "gpt3-125M": GPTSize(12, 768, 12, 6e-4, 0.5e6),
    "gpt3-350M": GPTSize(24, 1024, 16, 3e-4, 0.5e6),
    "gpt3-760M": GPTSize(24, 1536, 16, 2.5e-4, 0.5e6),
    "gpt3-1.3B": GPTSize(24, 2048, 16, 2e-4, 1e6),
    "gpt3-2.7B": GPTSize(32, 2560, 32, 1.6e-4, 1e6),
    "gpt3-6.7B": GPTSize(32, 4096, 32, 1.2e-4, 2e6),
    "gpt3-13B": GPTSize(40, 5120, 40, 1e-4, 2e6),
    "gpt3-175B": GPTSize(96, 12288, 96, 0.6e-4, 3.2e6),
}


def model_names() -> tuple[str, ...]:
    """The values of `--model`: the plain transformer, the GPT sizes, other architectures."""
    others = ArchitectureConfig.registered.keys() - {ModelConfig.architecture, "gpt2"}
    return (DEFAULT_MODEL, *GPT_SIZES, *sorted(others))


def named_model(model_name: str) -> ArchitectureConfig:
    """The default settings of a model: those of its size, or the defaults of its architecture.

    Raises: KeyError for a name that is not among `model_names()`.
    """
    if model_name not in GPT_SIZES:
        return ArchitectureConfig.registered[model_name]()
    size = GPT_SIZES[model_name]
    is_gpt2 = size.lr is None
    return GPT2Config(
        d_model=size.d_model,
        num_heads=size.num_heads,
        d_ff=4 * size.d_model,
        num_layers=size.num_layers,
        context_length=GPT2Config.context_length if is_gpt2 else 2048,
        drop_rate=GPT2Config.drop_rate if is_gpt2 else 0.0,
    )


def nearest_model_name(config: ArchitectureConfig) -> str:
    """The `--model` of this architecture with the nearest number of layers; no GPT-3 size."""
    names = [
        name
        for name in model_names()
        if type(named_model(name)) is type(config) and not name.startswith("gpt3-")
    ]
    return min(names, key=lambda name: abs(named_model(name).num_layers - config.num_layers))
