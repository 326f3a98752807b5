"""What "best" was measured on, runs that begin with other weights, and unexpected exceptions."""

import json

import pytest
import torch

from cs_lm.cli.commands import main as command
from cs_lm.cli.train import main as run_clm
from cs_lm.storage.manifest import MANIFEST
from cs_lm.training.checkpoint_manager import STATE
from cs_lm.training.console import log_to
from cs_lm.training.run_dir import RunFolder
from cs_lm.training.trainer import Trainer
from tests.end_to_end.conftest import TINY, laid_over, write_corpus
from tests.faults.tiny_run import CONFIG, prepared, trainer_of

RUN = [*TINY, "--corpus_path", "animals.txt", "--device", "cpu", "--max_steps", "20"]


@pytest.fixture
def trained(work):
    """runs/animals, and a text that has little to do with it."""
    write_corpus(work)
    (work / "other.txt").write_text("9876543210 zyx wvu tsr qpo! " * 300, encoding="utf-8")
    assert run_clm(laid_over([*RUN, "--eval_interval", "4"])) == 0
    return RunFolder("runs/animals")


def test_another_text_begins_its_own_best(trained, capsys):
    first = trained.checkpoints.best()
    again = ["--resume", "--out_dir", "runs/animals"]
    assert run_clm([*again, "--corpus_path", "other.txt", "--max_steps", "24"]) == 0
    assert "the best checkpoint is reset" in capsys.readouterr().out
    best = trained.checkpoints.best()
    assert best.step > 20 and best.loss > first.loss, "the older one was no rival"
    assert best.measured_on != first.measured_on
    assert trained.read("best")["iteration"] == best.step
    assert run_clm([*again, "--max_steps", "25"]) == 0
    assert "checkpoint is reset" not in capsys.readouterr().out, "the text is the same as before"


@pytest.mark.parametrize("flags", [["--eval_tokens", "200"], ["--seq_length", "8"]])
def test_another_measure_of_the_same_text(trained, flags, capsys):
    again = ["--resume", "--out_dir", "runs/animals", "--max_steps", "21"]
    assert run_clm([*again, *flags]) == 0
    assert "the best checkpoint is reset" in capsys.readouterr().out
    assert trained.checkpoints.best().step == 21


def test_before_the_first_validation_the_last_one_is_taken(trained):
    trained.checkpoints.set_best_aside()
    said = []
    with log_to(said.append):
        assert trained.read("best")["iteration"] == 20
    assert "using the last one" in said[0]


def test_a_best_of_an_earlier_version_is_kept_for_the_same_settings(trained, capsys):
    """Its manifest does not say what it was measured on."""
    path = trained.checkpoints.path(trained.checkpoints.best().step, "best") / MANIFEST
    content = json.loads(path.read_text(encoding="utf-8"))
    from cs_lm.storage.manifest import FileEntry, write_manifest

    files = [FileEntry(*entry) for entry in content.pop("files")]
    facts = {k: v for k, v in content.items() if k not in ("checksum", "measured_on")}
    write_manifest(path.parent, files, facts)
    again = ["--resume", "--out_dir", "runs/animals", "--max_steps", "21"]
    assert run_clm(again) == 0
    assert "checkpoint is reset" not in capsys.readouterr().out
    assert run_clm([*again[:-1], "22", "--corpus_path", "other.txt"]) == 0
    assert "checkpoint is reset" in capsys.readouterr().out


def test_a_run_begins_with_the_weights_of_another(trained, work, capsys):
    flags = [
        "--corpus_path",
        "other.txt",
        "--out_dir",
        "tuned",
        "--max_steps",
        "2",
        "--seq_length",
        "16",
        "--batch_size",
        "4",
        "--device",
        "cpu",
    ]
    assert run_clm(["--init_from", "runs/animals", *flags, "--d_model", "32"]) == 2
    assert "--d_model: got 32, but --init_from has 16" in capsys.readouterr().err
    assert run_clm(["--init_from", "runs/animals", *flags, "--dry_run"]) == 0
    assert not (work / "tuned").exists()
    assert run_clm(["--init_from", "runs/animals", *flags, "--lr", "1e-20", "--lr_min", "0"]) == 0
    source, tuned = trained.read("best"), RunFolder("tuned").read("last")
    assert tuned["iteration"] == 2 and tuned["extras"]["trained_tokens"] == 2 * 64
    for name, weight in source["model"].items():
        torch.testing.assert_close(weight, tuned["model"][name], rtol=0, atol=1e-6)
    assert RunFolder("tuned").load_tokenizer().fingerprint == trained.load_tokenizer().fingerprint
    assert RunFolder("tuned").checkpoints.best().step == 2
    assert trained.checkpoints.best().step != 2, "the source is as it was"
    step = trained.checkpoints.path(20)
    assert run_clm(["--init_from", str(step), *flags[:2], "--dry_run", "--seq_length", "16"]) == 0
    capsys.readouterr()
    for path, message in (("none", "'none', which is not there"), ("other.txt", "no config.json")):
        assert run_clm(["--init_from", path, *flags[:2]]) == 2
        assert message in capsys.readouterr().err
    assert run_clm(["--resume", "--out_dir", "tuned", "--init_from", "runs/animals"]) == 2
    assert "--init_from: begins a new run" in capsys.readouterr().err


def test_a_run_begins_with_exported_weights(trained, capsys):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    assert command(["export-weights", "--out_dir", "runs/animals", "--to", "weights"]) == 0
    flags = [
        "--corpus_path",
        "other.txt",
        "--out_dir",
        "tuned",
        "--max_steps",
        "1",
        "--seq_length",
        "16",
        "--batch_size",
        "2",
        "--device",
        "cpu",
    ]
    assert run_clm(["--init_from", "weights", *flags]) == 0
    assert (RunFolder("tuned").checkpoints.path(1) / STATE).is_file()


def fail_at(monkeypatch, place, step, error):
    """An exception in step `step`, counted from 0: before its update, within it, or after it."""
    original = Trainer._one_step

    def one_step(self):
        if self.step == step and place == "within":
            foreach = torch._foreach_addcdiv_

            def broken(*args, **kwargs):
                foreach(*args, **kwargs)
                raise error

            monkeypatch.setattr(torch, "_foreach_addcdiv_", broken)
        if self.step == step and place == "before":
            self.task.batches_of_step = lambda _: (_ for _ in ()).throw(error)
        original(self)
        if self.step == step and place == "after":
            raise error

    monkeypatch.setattr(Trainer, "_one_step", one_step)


@pytest.mark.parametrize("place, kept", [("before", 8), ("after", 8), ("within", 6)])
def test_an_unexpected_exception_saves_first(work, place, kept, monkeypatch, capsys):
    data = prepared(work, CONFIG)
    fail_at(monkeypatch, place, 8, ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        trainer_of(work / "run", data, CONFIG).fit()
    shown = capsys.readouterr().out
    assert RunFolder(work / "run").checkpoints.steps()[0] == kept, shown
    if place == "within":
        assert (
            "interrupted an update, so the weights are not saved: the checkpoint of step "
            "6 is kept" in shown
        )


def test_its_traceback_is_shown(trained, monkeypatch, capsys):
    fail_at(monkeypatch, "after", 22, ValueError("a bug that looks like bad input"))
    again = ["--resume", "--out_dir", "runs/animals", "--max_steps", "30"]
    assert run_clm(again) == 1
    errors = capsys.readouterr().err
    assert "Traceback (most recent call last)" in errors and "a bug that looks" in errors
    assert trained.checkpoints.steps()[0] == 22
