"""The measure of a validation loss: text, part of it, window length and tokenizer.

Two losses are comparable only if their measures are equal.
"""

import logging
from typing import Any

from cs_lm.config.run import RunConfig
from cs_lm.training.checkpoint_manager import CheckpointManager

_log = logging.getLogger("cs_lm")


def is_comparable(
    checkpoints: CheckpointManager,
    measure: dict[str, Any] | None,
    before: RunConfig,
    now: RunConfig,
) -> bool:
    """Whether the losses of a resumed run are comparable with the best checkpoint's loss.

    before, now  the run's settings; used if the best checkpoint has no measure (earlier versions)
    """
    best = checkpoints.best()
    if measure is not None and best is not None and best.measured_on is not None:
        return best.measured_on == measure
    return _settings(before) == _settings(now)


def start_best_anew(checkpoints: CheckpointManager) -> None:
    """Sets the best checkpoint aside: its loss was measured on something else."""
    if checkpoints.best() is not None:
        checkpoints.set_best_aside()
        _log.info(
            "the best checkpoint is reset: validation now uses another text, part of the text, "
            "window length or tokenizer; the old one is renamed to *.aside"
        )


def _settings(config: RunConfig) -> tuple:
    data = config.data
    text = data.corpus_path, data.corpus_size, data.valid_path, data.valid_fraction
    return (*text, config.seq_length, config.eval_tokens)
