"""Experiment trackers that people use: TensorBoard, Weights & Biases, MLflow.

Each is an optional package behind the same small interface, imported only when it is used.
"""

import contextlib
import logging
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from cs_lm.config.fields import flat
from cs_lm.storage.atomic import atomic_write

_log = logging.getLogger("cs_lm")
EXTRA_OF_TRACKER = {"tensorboard": "ui", "wandb": "wandb", "mlflow": "mlflow"}


class Tracker(Protocol):
    """Receives the numbers of a run. `close` is called once, at the end."""

    def write(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def names_of(config: Any) -> list[str]:
    """The trackers that a run's config switches on."""
    return [name for name in EXTRA_OF_TRACKER if getattr(config, name)]


class Trackers:
    """All trackers of a run. One that fails is closed, with a warning; the run goes on."""

    def __init__(self, names: Sequence[str], folder: Path, config: dict[str, Any]):
        self._open: dict[str, Tracker] = {}
        for name in names:
            self._attempt(name, lambda n=name: self._open.update({n: _KINDS[n](folder, config)}))

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Writes the floats among the values, as kind/name."""
        numbers = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, float)}
        for name in list(self._open) if numbers else ():
            self._attempt(name, lambda n=name: self._open[n].write(numbers, step))

    def close(self) -> None:
        for name in list(self._open):
            self._attempt(name, self._open[name].close)
        self._open.clear()

    def _attempt(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # another program's: whatever it raises must not end a run
            failed = self._open.pop(name, None)
            with contextlib.suppress(Exception):
                failed.close()
            first_line = str(error).partition("\n")[0]
            _log.warning("%s stopped (%s); training continues", name, first_line)


class _TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, folder: Path, config: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """An offline run in the run's folder (`wandb sync` uploads it), or what WANDB_MODE says.

    A resumed run has the same id, so that its parts are one run after `wandb sync`.
    """

    def __init__(self, folder: Path, config: dict[str, Any]):
        import wandb

        id_file = folder / "wandb" / "cs_lm-run-id"
        run_id = _read(id_file) or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "cs_lm"),
            name=folder.resolve().name,
            id=run_id,
            resume="allow",
            dir=str(folder),
            config=config,
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=wandb.Settings(silent=True, console="off"),
        )
        _write(id_file, run_id)

    def write(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """A run in a database in the run's folder, or on the server that MLFLOW_TRACKING_URI names."""

    def __init__(self, folder: Path, config: dict[str, Any]):
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        from mlflow.tracking import MlflowClient

        (folder / "mlflow").mkdir(parents=True, exist_ok=True)
        database = f"sqlite:///{(folder / 'mlflow' / 'mlflow.db').resolve()}"
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", database))
        id_file = folder / "mlflow" / "cs_lm-run-id"
        self._run_id = _read(id_file)
        if self._run_id is not None:
            return
        experiment = self._client.get_experiment_by_name("cs_lm")
        number = experiment.experiment_id if experiment else self._client.create_experiment("cs_lm")
        run = self._client.create_run(number, run_name=folder.resolve().name)
        self._run_id = run.info.run_id
        for name, value in flat(config).items():
            self._client.log_param(self._run_id, name, str(value)[:500])
        _write(id_file, self._run_id)

    def write(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run_id, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


_KINDS: dict[str, Callable[[Path, dict[str, Any]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
    "mlflow": _MLflow,
}


def _read(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8").strip() or None
    return None


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, text.encode("utf-8"))
