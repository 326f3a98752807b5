"""What a validation loss was measured on: only losses of one measure can be compared."""

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
    """Whether the best checkpoint's loss may be compared with those of a run that goes on.

    before, now  its settings, for a checkpoint of an earlier version, which says no more than that
    """
    best = checkpoints.best()
    if best is not None and best.measured_on is not None:
        return best.measured_on == measure
    return _settings(before) == _settings(now)


def start_best_anew(checkpoints: CheckpointManager) -> None:
    """Sets the best checkpoint aside: its loss was measured on something else."""
    if checkpoints.best() is not None:
        checkpoints.set_best_aside()
        _log.info(
            "best: begins anew, as validation losses are measured on another text, part of it, "
            "window or tokenizer from here on; the earlier best is set aside"
        )


def _settings(config: RunConfig) -> tuple:
    data = config.data
    text = data.corpus_path, data.corpus_size, data.valid_path, data.valid_fraction
    return (*text, config.seq_length, config.eval_tokens)
