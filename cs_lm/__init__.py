"""cs_lm: a language-model laboratory, written by hand on raw torch tensor operations.

The names below are imported when they are first used: `import cs_lm` alone loads no torch.
"""

import importlib

_HOME = {
    "BPETokenizer": "cs_lm.tokenizer",
    "train_bpe": "cs_lm.tokenizer",
    "ModelConfig": "cs_lm.config.model",
    "DataConfig": "cs_lm.config.data",
    "OptimConfig": "cs_lm.config.optim",
    "GPT2Config": "cs_lm.config.model",
    "RunConfig": "cs_lm.config.run",
    "CLEAR": "cs_lm.ops.reference",
    "FAST": "cs_lm.ops.fused",
    "TransformerLM": "cs_lm.models.transformer",
    "GPT2LM": "cs_lm.models.gpt2",
    "LanguageModel": "cs_lm.models.base",
    "next_token_loss": "cs_lm.models.base",
    "Batch": "cs_lm.data.batches",
    "AdamW": "cs_lm.optim.adamw",
    "clip_gradients": "cs_lm.optim.clip",
    "learning_rate": "cs_lm.optim.schedule",
    "MemmapManager": "cs_lm.data.token_store",
    "CheckpointManager": "cs_lm.training.checkpoint_manager",
    "DecodingConfig": "cs_lm.inference.decoding_config",
    "generate": "cs_lm.inference.generate",
    "generate_text": "cs_lm.inference.text",
    "evaluate": "cs_lm.evaluation.perplexity",
    "train_step": "cs_lm.training.step",
    "Trainer": "cs_lm.training.trainer",
    "Task": "cs_lm.training.task",
    "LanguageModeling": "cs_lm.training.language_modeling",
    "language_model_trainer": "cs_lm.training.language_modeling",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'cs_lm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__():
    return __all__
