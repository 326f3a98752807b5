"""Trains a run from a command: messages and exit status."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cs_lm.cli._errors import print_error
from cs_lm.cli._outputs import no_place
from cs_lm.distributed.launch import is_first_rank
from cs_lm.errors import UserError, is_out_of_memory

UNEXPECTED, NON_FINITE, RANK_LOST = 1, 3, 5  # exit status
# How long the other ranks wait for rank 0 at the end, which may be saving [s].
_SAVING_S, _LOST_S = 3600.0, 60.0


def check_writable(folder: Path) -> None:
    """Raises: UserError if no run can be written to the folder."""
    if problems := no_place("--out_dir", str(folder), folder):
        raise UserError(*problems)


def fit(make_trainer: Callable[[], Any], ranks: Any = None) -> int:
    """Trains; returns the exit status. ranks  the processes that share the run, if several do."""
    status = _fit(make_trainer)
    if ranks is not None and status != UNEXPECTED:
        ranks.wait_for_first(_LOST_S if status == RANK_LOST else _SAVING_S)
    return status


def _fit(make_trainer: Callable[[], Any]) -> int:
    from cs_lm.distributed.ranks import RankLostError
    from cs_lm.training.nonfinite import NonFiniteError

    trainer = make_trainer()
    if trainer.has_ended:
        if is_first_rank():
            print(
                f"resume: the run is at step {trainer.step} of {trainer.num_steps} already; raise "
                "--num_epochs, and --max_steps if it is given, to train on"
            )
        return 0
    try:
        return trainer.fit()
    except NonFiniteError as error:
        print_error(error)
        return NON_FINITE
    except RankLostError as error:
        kept = f"; {trainer.saver.kept}" if is_first_rank() else ""  # it knows
        fix = "start the same command again, with --resume if there is a checkpoint"
        print_error(RankLostError(f"{error}{kept}; {fix}"))
        return RANK_LOST
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        traceback.print_exc()
        return UNEXPECTED
