"""cs_lm: a language-model laboratory, written by hand on raw torch tensor operations.

The names below are imported when they are first used: `import cs_lm` alone loads no torch.
"""

import importlib

_HOME = {
    "BPETokenizer": "cs_lm.tokenizer",
    "train_bpe": "cs_lm.tokenizer",
    "ModelConfig": "cs_lm.config",
    "DataConfig": "cs_lm.config",
    "OptimConfig": "cs_lm.config",
    "GPT2Config": "cs_lm.config",
    "RunConfig": "cs_lm.config",
    "CLEAR": "cs_lm.ops",
    "FAST": "cs_lm.fast_ops",
    "TransformerLM": "cs_lm.model",
    "GPT2LM": "cs_lm.gpt2",
    "LanguageModel": "cs_lm.language_model",
    "next_token_loss": "cs_lm.language_model",
    "AdamW": "cs_lm.optim",
    "clip_gradients": "cs_lm.optim",
    "learning_rate": "cs_lm.schedule",
    "MemmapManager": "cs_lm.token_store",
    "CheckpointManager": "cs_lm.checkpoint_manager",
    "DecodingConfig": "cs_lm.decoding",
    "generate": "cs_lm.decoding",
    "generate_text": "cs_lm.decoding",
    "evaluate": "cs_lm.evaluation",
    "train_step": "cs_lm.training_step",
    "Trainer": "cs_lm.train",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'cs_lm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__():
    return __all__
