"""A loss or gradient that is not finite: the weights never hear of it, and it can be replayed."""

import json
import math
import re

import numpy as np
import pytest
import torch

from cs_lm.cli.commands import main as command
from cs_lm.config.fields import replace, to_json
from cs_lm.config.model import GPT2Config
from cs_lm.data.batches import BatchSource
from cs_lm.data.token_store import ArrayTokens
from cs_lm.device import World
from cs_lm.models.base import next_token_loss
from cs_lm.models.registry import build_model
from cs_lm.ops.fused import OPS
from cs_lm.training.checkpoint import checkpoint_content
from cs_lm.training.metrics_log import MetricsLog
from cs_lm.training.nonfinite import write_bad_step
from cs_lm.training.reporter import LossSpikeDetector
from cs_lm.training.run_dir import RunFolder
from cs_lm.training.step import accumulate_gradients
from cs_lm.training.task import Task
from tests.faults.tiny_run import CONFIG, NON_FINITE, assert_same_run, prepared, trainer_of

CONFIG = replace(CONFIG, {"max_steps": 12, "grad_accum": 2, "eval_interval": 0})
BAD = 8  # the step, counted from 1


def bad_loss(is_bad, what):
    """The loss, spoilt in the second micro-batch of a bad step."""

    def loss(model, batch):
        total, count = next_token_loss(model, batch)
        if not is_bad(batch.inputs):
            return total, count
        if what == "loss":
            return total * math.nan, count
        total.register_hook(lambda gradient: gradient * math.inf)  # under a loss that is finite
        return total, count

    return loss


class Spoilt:
    """Which micro-batches are bad: told by their tokens, as bad data would be."""

    def __init__(self, trainer, steps):
        self._bad = [trainer.task.batches(2 * step - 1).inputs for step in steps]

    def __call__(self, x):
        return any(torch.equal(x, bad) for bad in self._bad)


def spoilt_trainer(folder, data, config, steps, what="loss"):
    trainer = trainer_of(folder, data, config)
    trainer.task.loss = bad_loss(Spoilt(trainer, steps), what)
    return trainer


def run(trainer):
    from cs_lm.training.nonfinite import NonFiniteError

    try:
        return trainer.fit(), ""
    except NonFiniteError as error:
        return NON_FINITE, str(error)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_stops_with_the_weights_from_before(work, what):
    data = prepared(work, CONFIG)
    short = trainer_of(work / "short", data, CONFIG)
    while short.step < BAD - 1:
        if short.step == 0:
            short._begin()
        short._one_step()
    status, message = run(spoilt_trainer(work / "run", data, CONFIG, [BAD], what))
    assert status == NON_FINITE
    assert (
        f"gradient of step {BAD} is not finite; the saved weights are those from before it"
        in message
    )
    assert "the checkpoint of step 7 is kept" in message
    content = RunFolder(work / "run").read("last")
    assert content["iteration"] == BAD - 1
    for name, weight in short.task.model.state_dict().items():
        assert torch.equal(weight, content["model"][name]), name
    states = zip(short.task.optimizer.state.values(), content["optimizer"]["state"].values())
    for expected, actual in states:
        assert expected["step"] == actual["step"]
        assert torch.equal(expected["exp_avg_sq"], actual["exp_avg_sq"])


def test_what_is_written_out_and_the_replay(work):
    data = prepared(work, CONFIG)
    trainer = spoilt_trainer(work / "run", data, CONFIG, [BAD])
    _, message = run(trainer)
    found = json.loads((work / "run" / "bad_step_00000008.json").read_text(encoding="utf-8"))
    assert found["step"] == BAD and [batch["number"] for batch in found["batches"]] == [14, 15]
    assert found["batches"][1]["window_starts"] == trainer.task.batches.starts(15).tolist()
    good, bad = found["batches"]
    assert math.isfinite(good["loss_nats"]) and bad["loss_nats"] == "nan"
    names = set(dict(trainer.task.model.named_parameters()))
    assert set(good["grad_norms"]) == set(bad["grad_norms"]) == set(found["weight_norms"]) == names
    assert all(norm > 0 for norm in good["grad_norms"].values())
    assert set(bad["grad_norms"].values()) == {"nan"}
    records = list(MetricsLog(work / "run" / "metrics.jsonl").records())
    assert records[-1]["kind"] == "bad_step" and records[-1]["step"] == BAD
    assert re.search(r"python run_clm.py --out_dir .*run --resume --on_nan stop\n", message)
    replayed = spoilt_trainer(work / "run", data, CONFIG, [BAD])
    assert replayed.step == BAD - 1
    assert run(replayed)[0] == NON_FINITE and replayed.step == BAD - 1
    # the data mended, it goes on to the end that it would have had
    assert run(trainer_of(work / "run", data, CONFIG))[0] == 0
    assert run(trainer_of(work / "quiet", data, CONFIG))[0] == 0
    assert_same_run(work / "quiet", work / "run")


def test_the_replay_drops_what_the_step_dropped(work):
    """Each micro-batch again with its own dropout: the same losses, whatever came in between."""
    config = GPT2Config(
        d_model=12,
        num_heads=2,
        d_ff=20,
        vocab_size=40,
        num_layers=2,
        context_length=8,
        drop_rate=0.4,
    )
    model = build_model(config, OPS["fast"], generator=torch.Generator().manual_seed(0))
    source = BatchSource(
        ArrayTokens(np.arange(400) % 40), 2, 8, 0, "random", World(torch.device("cpu"))
    )
    model.seed_dropout(77)
    losses = []
    for number in (4, 5, 6):
        loss_sum, count = accumulate_gradients(model, [source(number)])
        losses.append((loss_sum / count).item())
    accumulate_gradients(model, [source(9)])

    class ThreeBatches(Task):
        def __init__(self):
            self.model = model

        def batches_of_step(self, step):
            return [source(number) for number in (4, 5, 6)]

        def loss(self, model, batch):
            return next_token_loss(model, batch)

    path = work / "bad.json"
    model.seed_dropout(77)
    write_bad_step(path, 2, 0.1, ThreeBatches())
    found = json.loads(path.read_text(encoding="utf-8"))["batches"]
    assert [batch["loss_nats"] for batch in found] == losses


def test_scores_that_are_no_numbers_name_the_checkpoint(work, capsys):
    data = prepared(work, CONFIG)
    trainer = trainer_of(work / "run", data, replace(CONFIG, {"max_steps": 3}))
    assert trainer.fit() == 0
    with torch.no_grad():
        trainer.task.model.ln_final.weight[3] = math.nan
    content = checkpoint_content(
        trainer.task.model,
        trainer.task.optimizer,
        4,
        config=to_json(trainer.config),
        elapsed_s=0.0,
        tokenizer_fingerprint=data.tokenizer.fingerprint,
        trained_tokens=0,
    )
    RunFolder(work / "run").checkpoints.save(content)
    argv = ["generate", "--out_dir", "run", "--prompt", "The cat", "--checkpoint", "last"]
    for more in ([], ["--temperature", "0"], ["--top_k", "3"], ["--top_p", "0.5"]):
        assert command([*argv, *more]) == 2
        shown = capsys.readouterr().err
        assert "not numbers (NaN or infinite)" in shown and "step 4 in 'run'" in shown, shown
        assert shown.startswith("error: --checkpoint")
    record, shown = trainer.task.sample(lambda: None)
    assert record is None and shown.startswith("the model's logits are not numbers")


def test_skip_leaves_the_step_out_and_goes_on(work, capsys):
    config = replace(CONFIG, {"on_nan": "skip"})
    data = prepared(work, config)
    trainer = spoilt_trainer(work / "run", data, config, [4, BAD])
    assert run(trainer) == (0, "")
    shown = capsys.readouterr().out
    assert "step 4 | loss or gradient is not finite: the step is skipped" in shown
    train = [r for r in MetricsLog(work / "run/metrics.jsonl").records() if r["kind"] == "train"]
    assert [r["step"] for r in train] == list(range(1, 13))
    assert [r["step"] for r in train if r["loss_nats"] is None] == [4, BAD]
    assert all(p.isfinite().all() for p in trainer.task.model.parameters())


def test_a_full_disk_does_not_hide_a_bad_step(work, monkeypatch):
    data = prepared(work, CONFIG)
    trainer = spoilt_trainer(work / "run", data, CONFIG, [BAD])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cs_lm.training.nonfinite.atomic_write", full)
    assert run(trainer)[0] == NON_FINITE
    assert RunFolder(work / "run").read("last")["iteration"] == BAD - 1


def test_skip_has_an_end(work):
    config = replace(CONFIG, {"on_nan": "skip", "max_steps": 30})
    data = prepared(work, config)
    status, message = run(spoilt_trainer(work / "run", data, config, range(5, 30)))
    assert status == NON_FINITE and "step 15 is not finite" in message
    assert "it was the 11th bad step in a row" in message
    assert RunFolder(work / "run").verify() == []


def test_a_bad_first_step(work):
    data = prepared(work, CONFIG)
    status, message = run(spoilt_trainer(work / "run", data, CONFIG, [1]))
    assert status == NON_FINITE and "the checkpoint of step 0 is kept" in message
    assert run(spoilt_trainer(work / "run", data, CONFIG, [1]))[0] == NON_FINITE  # again
    assert run(trainer_of(work / "run", data, CONFIG))[0] == 0
    assert run(trainer_of(work / "quiet", data, CONFIG))[0] == 0
    assert_same_run(work / "quiet", work / "run")


def test_spikes_are_marked():
    is_spike = LossSpikeDetector([None, 2.0, 2.2])
    marked = [is_spike(loss) for loss in (2.3, 2.5, 2.6, 3.0)]
    assert marked == [False, False, False, True]
    for _ in range(20):
        is_spike(1.0)
    assert is_spike(1.2), "only the last 20 count"
    assert not LossSpikeDetector()(5.0)
