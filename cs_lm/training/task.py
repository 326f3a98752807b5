"""What the trainer does not know: the hooks that make one kind of training of it.

Training a language model is one kind (language_modeling.py). Another kind, say of a reward model,
is one more subclass: the loop, checkpoints, resuming, logs and faults are the trainer's.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from cs_lm.optim.adamw import AdamW
from cs_lm.training.run_dir import RunFolder

CheckStop = Callable[[], None]  # raises where a stop signal has come; to be called now and then


class Task:
    """model, optimizer  what is trained
    num_steps         updates until the end
    tokens_per_step   for speeds and logs
    flops_per_token   of forward and backward
    measure           what evaluations are measured on, as JSON: losses of another measure are not
                      compared. None: this task has no evaluation
    """

    model: nn.Module
    optimizer: AdamW
    num_steps: int
    tokens_per_step: int
    flops_per_token: int
    measure: dict[str, Any] | None = None

    def batches_of_step(self, step: int) -> Sequence[Any]:
        """The micro-batches of the update. The same step gives the same batches, at any time."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """The sum of the losses in the batch, and how many they are."""
        raise NotImplementedError

    def evaluate(self, check_stop: CheckStop) -> dict[str, Any]:
        """Numbers for the log. `loss_nats`, the one to keep the best model by, is among them."""
        raise NotImplementedError

    def summary(self, found: dict[str, Any]) -> dict[str, Any]:
        """What the last record of the log repeats of the last evaluation."""
        return {"loss_nats": found["loss_nats"]}

    def describe_evaluation(self, found: dict[str, Any]) -> str:
        """The same for a reader."""
        return f"validation loss {found['loss_nats']:.4f}"

    def sample(self, check_stop: CheckStop) -> tuple[dict[str, Any] | None, str]:
        """What the model does now: for the log (None: nothing), and for a reader."""
        return None, ""

    def save(self) -> dict[str, Any]:
        """What a checkpoint needs besides model, optimizer and step: plain values and tensors."""
        return {}

    def load(self, extras: dict[str, Any]) -> None:
        """Takes back what `save` gave. Raises: UserError for a checkpoint of something else."""

    def start(self, folder: RunFolder) -> None:
        """Writes what the folder of a new run needs besides checkpoints and log."""

    def facts(self) -> dict[str, Any]:
        """For the first record of the log."""
        return {}

    def describe_batches(self, step: int) -> list[dict[str, Any]]:
        """For each micro-batch of the step, where its data come from."""
        return [{"number": number} for number in range(len(self.batches_of_step(step)))]

    def closing_lines(self, found: dict[str, Any] | None) -> list[str]:
        """Said at the end of a run; found  what the last evaluation gave."""
        return []

    def next_command(self, out_dir: str) -> str:
        """What to do with the trained model: a line for the end of a run."""
        return ""
