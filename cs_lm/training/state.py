"""The training state of a run, which a checkpoint saves."""

from dataclasses import replace
from typing import Any

from torch import nn

from cs_lm.config.fields import to_json
from cs_lm.config.run import NOT_SAVED_SETTINGS, RunConfig
from cs_lm.distributed.sharing import Sharing
from cs_lm.optim.adamw import AdamW
from cs_lm.training.checkpoint import checkpoint_content, restore, restore_parts


class TrainState:
    """Model, optimizer and progress of a run.

    step            number of updates so far
    trained_tokens  number of tokens in these updates
    elapsed_s       training time before the resume [s]
    """

    def __init__(self, model: nn.Module, optimizer: AdamW, sharing: Sharing):
        """sharing  how processes share the model; it has taken model and optimizer"""
        self.model, self.optimizer, self._sharing = model, optimizer, sharing
        self.step, self.trained_tokens, self.elapsed_s = 0, 0, 0.0
        self._updates_before: set[int] = set()

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Loads a checkpoint. Raises: UserError for a checkpoint of another model."""
        if self._sharing.ranks.size > 1:
            restore_parts(checkpoint, self._sharing)
        else:
            restore(checkpoint, self.model, self.optimizer, keep_settings=True)
        self._updates_before = self.optimizer.num_updates()
        self.step = checkpoint["iteration"]
        self.trained_tokens = checkpoint["extras"]["trained_tokens"]
        self.elapsed_s = checkpoint["extras"]["elapsed_s"]

    def content(self, config: RunConfig, elapsed_s: float, **extras: Any) -> dict[str, Any]:
        """The content of a checkpoint, which `load` reads."""
        return checkpoint_content(
            self.model,
            self.optimizer,
            self.step,
            self._sharing,
            config=to_json(replace(config, **NOT_SAVED_SETTINGS)),
            elapsed_s=elapsed_s,
            trained_tokens=self.trained_tokens,
            **extras,
        )

    def begin_update(self) -> None:
        self._updates_before = self.optimizer.num_updates()

    def end_update(self, num_tokens: int) -> None:
        self.step += 1
        self.trained_tokens += num_tokens
        self._updates_before = self.optimizer.num_updates()

    @property
    def is_within_update(self) -> bool:
        """Whether an update is incomplete: some parameters are updated and others are not."""
        return self.optimizer.num_updates() != self._updates_before

    def rewind(self, step: int, tokens_per_step: int) -> None:
        """Sets the counters back to `step`: the later updates changed no weights and moments."""
        made, self.step = self.step - step, step
        self.trained_tokens -= made * tokens_per_step
        for state in self.optimizer.state.values():
            state["step"] -= made
