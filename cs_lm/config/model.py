"""The settings that determine the shape of a model."""

from dataclasses import dataclass, field
from typing import ClassVar

from cs_lm.config.fields import not_positive, setting
from cs_lm.errors import Problem


class ArchitectureConfig:
    """Base class for the settings of one architecture. It registers each subclass by name.

    A new architecture has two parts: a frozen dataclass
    `class NewConfig(ArchitectureConfig, architecture="new")`, and an entry in `models/registry.py`.
    """

    architecture: ClassVar[str]  # stored in the JSON of a config
    registered: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, architecture: str):
        cls.architecture = architecture
        cls.registered[architecture] = cls

    def validate(self) -> list[Problem]:
        """All problems of the settings."""
        raise NotImplementedError


def _validate_shape(config: ArchitectureConfig) -> list[Problem]:
    found = not_positive(config)
    if not 0 < config.norm_eps < 1:
        found.append(Problem("norm_eps", f"got {config.norm_eps}", "above 0 and below 1"))
    if config.d_model > 0 and config.num_heads > 0 and config.d_model % config.num_heads:
        need = f"a divisor of --d_model ({config.d_model})"
        fix = "change one of the two"
        found.append(Problem("--num_heads", f"got {config.num_heads}", need, fix))
    return found


@dataclass(frozen=True)
class ModelConfig(ArchitectureConfig, architecture="transformer"):
    """Settings that determine the shape of the model."""

    d_model: int = setting(512, "width of the residual stream")
    num_heads: int = setting(8, "attention heads; must divide d_model into even parts")
    d_ff: int = setting(1344, "width inside the feed-forward layers")
    vocab_size: int = setting(32000, "token ids; a new tokenizer is trained to this size")
    num_layers: int = setting(6, "Transformer blocks")
    context_length: int = setting(
        512, "longest sequence the model can see", "tokens", flag="--max_seq_length"
    )
    rope_theta: float = setting(100000.0, "base of the rotary angles", flag="--theta")
    mup_base_width: int | None = setting(
        None,
        "muP: the best --lr of a model of this width is the best one of --d_model, too; keep the "
        "head size and d_ff / d_model. None: no scaling",
    )
    norm_eps: float = field(default=1e-5)

    @property
    def mup_scale(self) -> float:
        """What muP multiplies the learning rates of matrices with: base width / width."""
        return 1.0 if self.mup_base_width is None else self.mup_base_width / self.d_model

    def validate(self) -> list[Problem]:
        found = _validate_shape(self)
        is_shape = self.d_model > 0 and self.num_heads > 0
        if is_shape and self.d_model % (2 * self.num_heads) == self.num_heads:  # odd head size
            head_size = self.d_model // self.num_heads
            what = f"got {self.num_heads}, which makes the head size {head_size}"
            found.append(Problem("--num_heads", what, "an even one for rotary positions"))
        return found


@dataclass(frozen=True)
class GPT2Config(ArchitectureConfig, architecture="gpt2"):
    """Settings for models of the GPT-2 family only."""

    d_model: int = setting(768, "width of the residual stream")
    num_heads: int = setting(12, "attention heads; must divide d_model")
    d_ff: int = setting(3072, "width inside the feed-forward layers")
    vocab_size: int = setting(50257, "token ids; a new tokenizer is trained to this size")
    num_layers: int = setting(12, "Transformer blocks")
    context_length: int = setting(
        1024, "longest sequence the model can see", "tokens", flag="--max_seq_length"
    )
    drop_rate: float = setting(
        0.1, "dropout: fraction of activations set to 0 in training", flag="--dropout"
    )
    qkv_bias: bool = setting(True, "biases of queries, keys and values")
    tied_head: bool = setting(True, "use the embedding matrix as the output head (tied weights)")
    init: str = setting(
        "gpt2",
        "weight initialisation: as in GPT-2, or as in torch's own layers",
        choices=("gpt2", "torch"),
    )
    norm_eps: float = field(default=1e-5)

    def validate(self) -> list[Problem]:
        found = [problem for problem in _validate_shape(self) if problem.where != "--dropout"]
        if not 0 <= self.drop_rate <= 0.99:
            found.append(Problem("--dropout", f"got {self.drop_rate}", "0 to 0.99"))
        return found
