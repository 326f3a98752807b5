"""Every file of a run and of its data, damaged in many places: told by name, or made good."""

import random
import shutil

import pytest

from cs_lm.config.fields import replace
from cs_lm.data.pipeline import prepare
from cs_lm.data.token_store import MemmapManager
from cs_lm.training.run_dir import RunFolder, load_trained
from tests.faults.tiny_run import CONFIG, assert_same_run, prepared, trainer_of

CONFIG = replace(CONFIG, {"max_steps": 9, "chunk_size": 1500})


def flipped(content, chosen):
    place = chosen.randrange(len(content))
    return (
        content[:place] + bytes([content[place] ^ 1 << chosen.randrange(8)]) + content[place + 1 :]
    )


def damages(content, chosen, flips):
    """Ways to damage a file: cut short, emptied, gone (None), a bit flipped, a byte added."""
    yield None
    yield b""
    yield content[: len(content) // 2]
    yield content[:-1]
    yield content + b"x"
    for _ in range(flips):
        yield flipped(content, chosen)


@pytest.fixture
def run(work):
    data = prepared(work, CONFIG)
    assert trainer_of(work / "run", data, CONFIG).fit() == 0
    shutil.copytree(work / "run", work / "quiet")
    return data


def each_damage(folder, flips):
    chosen = random.Random(0)
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size):
        original = path.read_bytes()
        for damage in damages(original, chosen, flips):
            if path.exists() and path.stat().st_nlink > 1:  # the best one, not both
                path.unlink()
            if damage is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(damage)
            yield path, damage
            path.write_bytes(original)


def _is_the_same(folder, tokenizer):
    """A last newline that is missing, or a header that nobody reads, makes no other tokenizer."""
    try:
        return folder.load_tokenizer().fingerprint == tokenizer.fingerprint
    except (ValueError, OSError):
        return False


@pytest.mark.slow
def test_every_file_of_a_run(work, run, capsys):
    """`verify` names it; what reads the run refuses it, or takes a checkpoint that is whole."""
    told = 0
    for path, _damage in each_damage(work / "run", flips=12):
        folder, name = RunFolder(work / "run"), str(path.relative_to(work / "run"))
        try:
            lines = folder.verify()
        except (ValueError, OSError) as error:
            lines = [str(error)]
        may_pass = path.name == "metrics.jsonl"  # there is no checksum of its digits
        may_pass |= path.parent.name == "tokenizer" and _is_the_same(folder, run.tokenizer)
        assert lines or may_pass, name
        told += bool(lines)
        assert all("\n" not in line for line in lines)
        if not may_pass:
            where = "tokenizer" if path.parent.name == "tokenizer" else path.parent.name
            assert any(where in line for line in lines), (name, lines)
        for use in ("last", "best"):
            try:
                content = folder.read(use)
            except (ValueError, OSError) as error:
                assert use == "best" and path.parent.name.startswith("best"), (name, error)
            else:
                assert content["iteration"] in (6, 9)
        try:
            load_trained(folder, "last", "cpu")
        except (ValueError, OSError) as error:
            assert path.parent.name == "tokenizer" and "tokenizer" in str(error), (name, error)
    assert told > 100


def test_resume_from_any_damaged_checkpoint_ends_the_same(work, run):
    """The newest one lost in each way: the interval before the end is trained again."""
    checkpoints = work / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "best-00000009")
    newest = checkpoints / "step-00000009"
    for path, _damage in each_damage(newest, flips=2):
        shutil.rmtree(work / "again", ignore_errors=True)
        shutil.copytree(work / "run", work / "again")
        trainer = trainer_of(work / "again", run, CONFIG)
        assert trainer.step == 6, path
        assert trainer.fit() == 0
        assert_same_run(work / "quiet", work / "again")


def test_every_file_of_the_data(work, run):
    """A run's preparation makes good what it can, and names what it cannot."""
    (store,) = (work / "data").glob("animals_chunks-*")
    assert len(MemmapManager(store).files) > 2
    named = 0
    for path, damage in each_damage(work / "data", flips=4):
        try:
            data = prepare(CONFIG)
        except (ValueError, OSError) as error:
            assert path.parent.name in str(error) and "\n" not in str(error), (path, error)
            named += 1
        else:
            assert data.tokenizer.fingerprint == run.tokenizer.fingerprint, (path, damage)
            MemmapManager(store).verify()
            assert len(data.train) == len(run.train)
    assert named > 20
