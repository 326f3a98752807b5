"""Trains a run from a command: messages and exit status."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cs_lm.cli._errors import is_out_of_memory, print_error
from cs_lm.cli._outputs import no_place
from cs_lm.errors import UserError

UNEXPECTED, NON_FINITE = 1, 3  # exit status


def check_writable(folder: Path) -> None:
    """Raises: UserError if no run can be written to the folder."""
    if problems := no_place("--out_dir", str(folder), folder):
        raise UserError(*problems)


def fit(make_trainer: Callable[[], Any]) -> int:
    from cs_lm.training.nonfinite import NonFiniteError

    trainer = make_trainer()
    if trainer.has_ended:
        print(
            f"resume: the run is at step {trainer.step} of {trainer.num_steps} already; raise "
            "--num_epochs or --max_steps to train on"
        )
        return 0
    try:
        return trainer.fit()
    except NonFiniteError as error:
        print_error(error)
        return NON_FINITE
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        traceback.print_exc()
        return UNEXPECTED
