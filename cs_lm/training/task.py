"""The interface between the trainer and one kind of training: the hooks of `Task`.

Training a language model is one kind (language_modeling.py). Another kind, for example a reward
model, is another subclass. The trainer does the loop, checkpoints, resume, logs and errors.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from cs_lm.distributed.sharing import Sharing
from cs_lm.optim.adamw import AdamW
from cs_lm.training.run_dir import RunFolder

CheckStop = Callable[[], None]  # raises after a stop signal; call it often


class Task:
    """Base class of one kind of training.

    model, optimizer  the model to train, and its optimizer
    num_steps         number of updates in the run
    tokens_per_step   for speeds and logs
    flops_per_token   of forward and backward
    sharing           how several processes share the model; None: one process has all of it
    measure           identifies the data of evaluations, as JSON: only losses with equal measures
                      are compared. None: this task has no evaluation
    """

    model: nn.Module
    optimizer: AdamW
    num_steps: int
    tokens_per_step: int
    flops_per_token: int
    sharing: Sharing | None = None
    measure: dict[str, Any] | None = None
    program: str = "run_clm.py"  # what resumes a run of this kind, after "python"

    @property
    def saved_model(self) -> nn.Module:
        """What a checkpoint holds as the model. `model` may hold more, which `save` saves."""
        return self.model

    @property
    def clipped_apart(self) -> Sequence[nn.Module]:
        """Parts of `model` whose gradients are clipped by norms of their own."""
        return (self.model,)

    def after_step(self, step: int) -> list[tuple[str, dict[str, Any]]]:
        """Called when `step` updates are done. Returns records for the log: kind and values."""
        return []

    def batches_of_step(self, step: int) -> Sequence[Any]:
        """The micro-batches of the update. The same step always gives the same batches."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Sum of the losses in the batch, and number of losses."""
        raise NotImplementedError

    def evaluate(self, check_stop: CheckStop) -> dict[str, Any]:
        """Numbers for the log. They include `loss_nats`."""
        raise NotImplementedError

    def selected_by(self, found: dict[str, Any]) -> float | None:
        """The number of an evaluation that selects the best checkpoint: the smallest one."""
        return found["loss_nats"]

    def summary(self, found: dict[str, Any]) -> dict[str, Any]:
        """The numbers of the last evaluation that the last record of the log repeats."""
        return {"loss_nats": found["loss_nats"]}

    def describe_evaluation(self, found: dict[str, Any]) -> str:
        """The evaluation as a line of text."""
        return f"validation loss {found['loss_nats']:.4f}"

    def sample(self, check_stop: CheckStop) -> tuple[dict[str, Any] | None, str]:
        """Sample output of the model: a record for the log (None: nothing), and text to show."""
        return None, ""

    def save(self) -> dict[str, Any]:
        """Extra values for a checkpoint, besides model, optimizer and step: values and tensors."""
        return {}

    def load(self, extras: dict[str, Any]) -> None:
        """Restores the values of `save`. Raises: UserError for a checkpoint that does not fit."""

    def start(self, folder: RunFolder) -> None:
        """Writes further files into the folder of a new run, besides checkpoints and log."""

    def facts(self) -> dict[str, Any]:
        """Values for the first record of the log."""
        return {}

    def describe_batches(self, step: int) -> list[dict[str, Any]]:
        """The source of the data of each micro-batch of the step, for the file of a bad step."""
        return [{"number": number} for number in range(len(self.batches_of_step(step)))]

    def closing_lines(self, found: dict[str, Any] | None) -> list[str]:
        """Lines to show at the end of a run; found  result of the last evaluation."""
        return []

    def next_command(self, out_dir: str) -> str:
        """A line for the end of a run: a command that uses the trained model."""
        return ""
