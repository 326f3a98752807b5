"""Converts other programs' settings to our configs and back, with one pair of functions each."""

import math
from pathlib import Path
from typing import Any

from cs_lm.config.fields import MAX_COUNT
from cs_lm.config.model import GPT2Config, ModelConfig
from cs_lm.errors import UserError
from cs_lm.storage.json_file import read_json

_DROPOUT_RATES = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


class Settings:
    """A JSON object; `get` checks the type of a value.

    Raises: UserError naming the file and the setting.
    """

    def __init__(self, path: Path, values: dict[str, Any] | None = None):
        self.path = path
        self.values = read_json(path, "weights") if values is None else values

    def get(self, name: str, kind: type, *default: Any) -> Any:
        value = self.values.get(name)
        if value is None and default:
            return default[0]
        if kind is float and type(value) is int and abs(value) < MAX_COUNT:
            value = float(value)
        if type(value) is not kind or (kind is float and not math.isfinite(value)):
            raise UserError(
                f"weights: {name} of {str(self.path)!r} is {value!r:.40}, need {kind.__name__}"
            )
        return value

    def refuse_unless(self, **needed: tuple) -> None:
        """Raises: UserError for a setting with another value; the first value is the default."""
        for name, values in needed.items():
            value = self.values.get(name)
            if value is not None and value not in values:
                raise UserError(
                    f"weights: {name} of {str(self.path)!r} is {value!r}; need {values[0]!r}: "
                    "our model does not support another value"
                )


def read_gpt2(settings: Settings) -> GPT2Config:
    settings.refuse_unless(
        activation_function=("gelu_new", "gelu_pytorch_tanh"),
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        add_cross_attention=(False,),
    )
    d_model = settings.get("n_embd", int)
    rates = {name: settings.get(name, float, 0.1) for name in _DROPOUT_RATES}
    if len(set(rates.values())) > 1:
        shown = ", ".join(f"{name} {rate}" for name, rate in rates.items())
        raise UserError(
            f"weights: the dropout rates of {str(settings.path)!r} differ ({shown}), and our model "
            "has one for all three; set them to the same number there (--dropout changes it later)"
        )
    return GPT2Config(
        d_model=d_model,
        num_heads=settings.get("n_head", int),
        d_ff=settings.get("n_inner", int, 4 * d_model),
        vocab_size=settings.get("vocab_size", int),
        num_layers=settings.get("n_layer", int),
        context_length=settings.get("n_positions", int, 1024),
        drop_rate=rates["resid_pdrop"],
        tied_head=settings.get("tie_word_embeddings", bool, True),
        norm_eps=settings.get("layer_norm_epsilon", float, 1e-5),
    )


def read_nanogpt(settings: Settings) -> GPT2Config:
    """The config from the `model_args` in nanoGPT's `ckpt.pt`."""
    d_model = settings.get("n_embd", int)
    return GPT2Config(
        d_model=d_model,
        num_heads=settings.get("n_head", int),
        d_ff=4 * d_model,
        vocab_size=settings.get("vocab_size", int),
        num_layers=settings.get("n_layer", int),
        context_length=settings.get("block_size", int),
        drop_rate=settings.get("dropout", float, 0.0),
    )


def read_openai(settings: Settings) -> GPT2Config:
    d_model = settings.get("n_embd", int)
    return GPT2Config(
        d_model=d_model,
        num_heads=settings.get("n_head", int),
        d_ff=4 * d_model,
        vocab_size=settings.get("n_vocab", int),
        num_layers=settings.get("n_layer", int),
        context_length=settings.get("n_ctx", int),
    )


def read_llama(settings: Settings) -> ModelConfig:
    settings.refuse_unless(
        hidden_act=("silu",), attention_bias=(False,), mlp_bias=(False,), rope_scaling=(None,)
    )
    num_heads, d_model = (settings.get(n, int) for n in ("num_attention_heads", "hidden_size"))
    settings.refuse_unless(num_key_value_heads=(num_heads,))
    if num_heads > 0:
        settings.refuse_unless(head_dim=(d_model // num_heads,))
    rope = settings.get("rope_parameters", dict, {})
    if rope.get("rope_type", "default") != "default":
        raise UserError(
            f"weights: rope_parameters of {str(settings.path)!r} are {rope}; need rope_type "
            "'default': our model does not support another value"
        )
    rope = Settings(settings.path, {**settings.values, **rope})
    return ModelConfig(
        d_model=d_model,
        num_heads=num_heads,
        d_ff=settings.get("intermediate_size", int),
        vocab_size=settings.get("vocab_size", int),
        num_layers=settings.get("num_hidden_layers", int),
        context_length=settings.get("max_position_embeddings", int, 2048),
        rope_theta=rope.get("rope_theta", float, 10000.0),
        norm_eps=settings.get("rms_norm_eps", float, 1e-6),
    )


# ---- writing ----


def write_gpt2(config: GPT2Config) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": config.d_model,
        "n_head": config.num_heads,
        "n_layer": config.num_layers,
        "n_inner": config.d_ff,
        "n_positions": config.context_length,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "resid_pdrop": config.drop_rate,
        "embd_pdrop": config.drop_rate,
        "attn_pdrop": config.drop_rate,
    }


def write_openai(config: GPT2Config) -> dict[str, Any]:
    return {
        "n_vocab": config.vocab_size,
        "n_ctx": config.context_length,
        "n_embd": config.d_model,
        "n_head": config.num_heads,
        "n_layer": config.num_layers,
    }


def write_llama(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": config.d_model,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "max_position_embeddings": config.context_length,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }
