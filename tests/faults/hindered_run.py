"""`run_clm.py` with a fault, which the first argument names."""

import os
import runpy
import sys
import time

import torch

from cs_lm.training.checkpoint_manager import CheckpointManager
from cs_lm.training.trainer import Trainer
from tests.end_to_end.conftest import ROOT

SLOW_S, FLIPPED_AT = 5.0, 13


def _save_slowly() -> None:
    save = CheckpointManager.save

    def slowly(*arguments):
        time.sleep(SLOW_S)
        save(*arguments)

    CheckpointManager.save = slowly


def _flip_a_bit() -> None:
    """In a weight of rank 1."""
    one_step = Trainer._one_step

    def flipping(self):
        one_step(self)
        if self.step == FLIPPED_AT and os.environ["RANK"] == "1":
            with torch.no_grad():
                self.task.model.ln_final.weight.view(torch.int32)[0] ^= 1

    Trainer._one_step = flipping


if __name__ == "__main__":
    {"slow": _save_slowly, "flip": _flip_a_bit}[sys.argv.pop(1)]()
    runpy.run_path(str(ROOT / "run_clm.py"), run_name="__main__")
