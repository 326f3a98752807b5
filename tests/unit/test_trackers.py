"""Each tracker with its real package, and runs whose tracker fails."""

import logging
import time

import pytest

from cs_lm.training import trackers
from cs_lm.training.trackers import Trackers

CONFIG = {"model": {"d_model": 8}, "lr": 0.5}


def write_twice(name, folder):
    """A run, then its resume."""
    for steps in ((1, 2), (3,)):
        tracked = Trackers([name], folder, CONFIG)
        for step in steps:
            tracked.write("train", step, {"loss_nats": 5.0 - step, "spike": True, "text": "x"})
        tracked.close()


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_twice("tensorboard", tmp_path)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert found.Tags()["scalars"] == ["train/loss_nats"]
    assert [(e.step, e.value) for e in found.Scalars("train/loss_nats")] == [(1, 4), (2, 3), (3, 2)]


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    write_twice("wandb", tmp_path)
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1, "one id"
    end_s = time.monotonic() + 20  # W&B's own process writes the file, sometimes a little later
    while b"train/loss_nats" not in files[0].read_bytes():
        assert time.monotonic() < end_s, "no losses in the file"
        time.sleep(0.1)


@pytest.mark.slow
def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_twice("mlflow", tmp_path)
    client = mlflow.tracking.MlflowClient(f"sqlite:///{tmp_path / 'mlflow' / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "cs_lm"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params == {"model.d_model": "8", "lr": "0.5"} and run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/loss_nats")
    assert sorted((m.step, m.value) for m in history) == [(1, 4.0), (2, 3.0), (3, 2.0)]


class Failing:
    def __init__(self, folder, config):
        self.count = 0

    def write(self, values, step):
        raise RuntimeError("the server is gone\nwith a long story")

    def close(self):
        raise AssertionError("it was closed already")


def test_a_failing_tracker_stops_with_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(trackers._KINDS, "wandb", Failing)
    tracked = Trackers(["wandb"], tmp_path, CONFIG)
    with caplog.at_level(logging.WARNING, "cs_lm"):
        for step in range(3):
            tracked.write("train", step, {"loss_nats": 1.0})
        tracked.close()
    assert [record.getMessage() for record in caplog.records] == [
        "wandb stopped (the server is gone); training continues"
    ]


def test_a_tracker_that_cannot_start(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(trackers._KINDS, "mlflow", lambda folder, config: 1 / 0)
    with caplog.at_level(logging.WARNING, "cs_lm"):
        Trackers(["mlflow"], tmp_path, CONFIG).close()
    assert "mlflow stopped (division by zero)" in caplog.text
