"""A run of a few milliseconds a step, in this process, for tests that end it in many ways."""

import os
from pathlib import Path
from typing import Any

from cs_lm.cli._fit import NON_FINITE
from cs_lm.config.data import DataConfig
from cs_lm.config.fields import replace as replaced
from cs_lm.config.model import ModelConfig
from cs_lm.config.optim import OptimConfig
from cs_lm.config.run import RunConfig
from cs_lm.data.pipeline import PreparedData, prepare
from cs_lm.training.language_modeling import language_model_trainer
from cs_lm.training.metrics_log import MetricsLog
from cs_lm.training.nonfinite import NonFiniteError
from cs_lm.training.run_dir import RunFolder, saved_config
from cs_lm.training.trainer import Trainer
from tests.end_to_end.conftest import write_corpus
from tests.sameness import assert_equal

CONFIG = RunConfig(
    ModelConfig(16, 2, 40, 300, 1, 32),
    DataConfig("animals.txt"),
    OptimConfig(lr=1e-2),
    seq_length=16,
    batch_size=2,
    max_steps=60,
    num_epochs=1e6,
    device="cpu",
    log_interval=1,
    save_interval=3,
    eval_interval=9,
    eval_tokens=64,
    sample_interval=18,
)


def prepared(folder: Path, config: RunConfig = CONFIG) -> PreparedData:
    """The corpus in the folder, which becomes the current one, as data to train on."""
    os.chdir(folder)
    write_corpus(folder)
    return prepare(config)


def trainer_of(folder: Path, data: PreparedData, config: RunConfig = CONFIG) -> Trainer:
    """For a new run in the folder, or for the one that is there."""
    run = RunFolder(folder)
    if not run.exists():
        return language_model_trainer(config, data, run)
    checkpoint = run.read("last")
    saved = saved_config(checkpoint)
    assert replaced(saved, {}) == config, "settings come back as they were"
    return language_model_trainer(config, data, run, checkpoint)


def train(folder: Path, data: PreparedData, config: RunConfig = CONFIG) -> int:
    """Begins or goes on, as run_clm.py would; returns the exit status."""
    with RunFolder(folder).lock():
        trainer = trainer_of(folder, data, config)
        if trainer.has_ended:
            return 0
        try:
            return trainer.fit()
        except NonFiniteError as error:
            print(error)
            return NON_FINITE


def assert_same_run(expected: Path, actual: Path) -> None:
    """The last and best checkpoints and the logs agree to the last bit, times aside."""
    one, two = RunFolder(expected), RunFolder(actual)
    for which in ("last", "best"):
        assert_equal(one.read(which), two.read(which), which)
    assert _log(one) == _log(two)


def _log(run: RunFolder) -> list[dict[str, Any]]:
    """Every record of the training, in order, without what a clock or a machine has a part in."""
    timed = {"tokens_per_s", "model_flops_per_s", "utilisation", "elapsed_s"}
    return [
        {key: value for key, value in record.items() if key not in timed}
        for record in MetricsLog(run.metrics).records()
        if record["kind"] not in ("config", "resume", "bad_step")
    ]
