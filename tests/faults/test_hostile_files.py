"""Files that were made to do harm: refused in one line; nothing outside the folder is touched."""

import io
import json
import os
import pickle
import shutil
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cs_lm.config.fields import from_json, to_json, validate_all
from cs_lm.config.model import ModelConfig
from cs_lm.config.run import RunConfig
from cs_lm.data.token_store import MemmapManager
from cs_lm.models.stats import num_parameters
from cs_lm.optim.adamw import AdamW
from cs_lm.storage import manifest
from cs_lm.storage.manifest import FileEntry, read_manifest, write_manifest
from cs_lm.tokenizer import BPETokenizer
from cs_lm.training.checkpoint import (
    checkpoint_content,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from cs_lm.training.checkpoint_manager import CheckpointManager
from cs_lm.training.run_dir import saved_config

BYTES = BPETokenizer({i: bytes([i]) for i in range(256)}, [])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)


def model_and_optimizer(size=3):
    model = torch.nn.Linear(size, 2)
    return model, AdamW(model.parameters())


# ---- checkpoints ----


class Harm:
    def __reduce__(self):
        return (open, ("harm.txt", "w"))


class Memory:
    """`weights_only` lets it pass."""

    def __reduce__(self):
        return (bytearray, (1 << 33,))


def crafted(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def compressed(data, name="archive/data/0", size=1 << 28):
    """A few kilobytes that would unpack to a quarter of a gigabyte."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
        new.writestr(name, bytes(size), zipfile.ZIP_DEFLATED)
    return file.getvalue()


def checkpoint_files():
    content = checkpoint_content(*model_and_optimizer(), 1)
    expanded = {**content, "model": {"weight": torch.zeros(1).expand(10**6, 10**6)}}
    pickled = pickle.dumps({"format_version": 1, "harm": Harm()})
    return {
        "code in a pickle": pickled,
        "code in an archive": crafted({**content, "extras": {"harm": Harm()}}),
        "a tensor larger than its numbers": crafted(expanded),
        "a bomb": compressed(crafted(content)),
        "another iteration": crafted({**content, "iteration": -1}),
        "no model": crafted({**content, "model": [1]}),
        "a list": crafted([1, 2]),
        "memory for nothing": crafted({**content, "extras": {"x": Memory()}}),
        "weights without numbers": crafted({**content, "model": {"w": torch.ones(3).to("meta")}}),
        "nothing": b"",
    }


@pytest.mark.parametrize("kind", checkpoint_files())
def test_crafted_checkpoints(kind, work):
    (work / "a.pt").write_bytes(checkpoint_files()[kind])
    with pytest.raises(ValueError, match=r"checkpoint: cannot read a.pt .*need a file that cs_lm"):
        read_checkpoint("a.pt")
    assert not (work / "harm.txt").exists()


def test_states_of_another_shape_change_nothing(work):
    save_checkpoint(*model_and_optimizer(4), 1, "other.pt")
    model, optimizer = model_and_optimizer()
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match="'weight' and 0 other weights do not fit the model"):
        load_checkpoint("other.pt", model, optimizer)
    content = checkpoint_content(model, optimizer, 1)
    for state, message in [
        ({"exp_avg": torch.zeros(9, 9)}, "exp_avg of another shape"),
        ({"step": "1"}, "step is '1'"),
        ({"exp_avg_sq": None}, "exp_avg_sq is None"),
    ]:
        moments = {"step": 1, "exp_avg": torch.zeros(2, 3), "exp_avg_sq": torch.zeros(2, 3)}
        content["optimizer"]["state"] = {0: moments | state}
        torch.save(content, "moments.pt")
        with pytest.raises(ValueError, match=f"optimizer's state does not fit .{message}"):
            load_checkpoint("moments.pt", model, optimizer)
    content["optimizer"]["state"] = {0: {"step": 1}}
    torch.save(content, "moments.pt")
    with pytest.raises(ValueError, match="optimizer's state does not fit .it has .'step'"):
        load_checkpoint("moments.pt", model, optimizer)
    assert torch.equal(model.weight, before) and not optimizer.state


def saved_config_error(model):
    """Of settings whose number of weights is right."""
    config = {**to_json(RunConfig()), "model": model, "seq_length": 16}
    num_weights = num_parameters(from_json(ModelConfig, model))
    content = {"model": {"weight": torch.empty(num_weights)}, "extras": {"config": config}}
    with pytest.raises(ValueError) as error:
        saved_config(content)
    return str(error.value)


def test_settings_of_a_huge_model_are_refused_before_it_is_made():
    config = to_json(RunConfig())
    content = {"model": {"weight": torch.zeros(3)}, "extras": {"config": config}}
    with pytest.raises(ValueError, match="3 weights, but settings for"):
        saved_config(content)
    assert saved_config_error({**config["model"], "context_length": 10**9}).endswith("10" + "0" * 8)
    config["model"]["d_model"] = 10**15
    with pytest.raises(ValueError, match="its settings cannot be those of a run: --d_model"):
        saved_config(content)


@given(JSON)
def test_any_settings(stored):
    try:
        validate_all(from_json(RunConfig, stored))
    except ValueError as error:
        assert str(error).startswith("config: ")


@given(st.sampled_from(sorted(to_json(RunConfig()))), JSON)
def test_one_setting_that_is_anything(name, value):
    stored = {**to_json(RunConfig()), name: value}
    try:
        validate_all(from_json(RunConfig, stored))
    except ValueError as error:
        assert str(error).startswith("config: ")


# ---- manifests ----


def with_manifest(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / manifest.MANIFEST).write_text(text, encoding="utf-8")
    return folder


def with_checksum(content):
    content["checksum"] = manifest._checksum(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "a/b", "..", "", "a\\b", "a\0b", "manifest.json", 3, "é"]
)
def test_names_that_lead_elsewhere(name, work):
    entry = [name, 1, "0" * 64]
    folder = with_manifest(work / "x", with_checksum({"files": [entry]}))
    with pytest.raises(ValueError, match="lists an invalid file"):
        read_manifest(folder)


def test_links_that_lead_elsewhere(work):
    manager = CheckpointManager(work)
    manager.save(checkpoint_content(*model_and_optimizer(), 1))
    state = work / "step-00000001" / "state.pt"
    state.rename(work / "elsewhere.pt")
    state.symlink_to(work / "elsewhere.pt")
    with pytest.raises(ValueError, match="is missing or not a regular file"):
        manager.read(1)


def test_manifests_that_are_no_plain_files(work):
    """A device that never ends, a pipe that never begins."""
    for make in (lambda path: path.symlink_to("/dev/zero"), os.mkfifo):
        (work / "x").mkdir()
        make(work / "x" / manifest.MANIFEST)
        with pytest.raises(ValueError, match="is not a regular file"):
            read_manifest(work / "x")
        shutil.rmtree(work / "x")


def test_checkpoints_of_another_run_by_a_link(work):
    manager = CheckpointManager(work / "other")
    manager.save(checkpoint_content(*model_and_optimizer(), 1))
    ours = CheckpointManager(work / "ours")
    ours.folder.mkdir()
    ours.path(1).symlink_to(manager.path(1))
    for step in (2, 3, 4):
        ours.save(checkpoint_content(*model_and_optimizer(), step))
    assert ours.steps() == [4, 3] and manager.read(1)["iteration"] == 1


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"checksum": ' + "9" * 5000 + "}", "null", "[]", '"x"', "{}", "NaN", "\ud7ff"],
    ids=lambda text: text[:9],
)
def test_manifests_that_are_none(text, work):
    with pytest.raises(ValueError, match=r"manifest.json' is damaged"):
        read_manifest(with_manifest(work / "x", text))


def test_a_manifest_without_end(work):
    path = with_manifest(work / "x", "{}") / manifest.MANIFEST
    with open(path, "r+b") as file:
        file.truncate(1 << 40)  # a hole: it takes no room on the disk
    with pytest.raises(ValueError, match="has more than 64 MB"):
        read_manifest(work / "x")


@given(JSON)
def test_any_manifest(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("any")
    text = with_checksum(content) if isinstance(content, dict) else json.dumps(content)
    for open_it in (read_manifest, MemmapManager):
        with pytest.raises(ValueError):
            open_it(with_manifest(folder, text))


def store_with(work, **facts):
    """A store whose manifest says something else, with a checksum that is right."""
    MemmapManager.save_as_memmap(["abcdefghij"], BYTES, work / "s", 4)
    files, found = read_manifest(work / "s")
    write_manifest(work / "s", facts.pop("files", files), {**found, **facts})
    return work / "s"


@pytest.mark.parametrize(
    "facts",
    [
        {"num_tokens": 10**4000},  # found by the fuzzer, with a chunk_size of 1
        {"num_tokens": 11},
        {"chunk_size": 0},
        {"chunk_size": -4},
        {"chunk_size": 4.0},
        {"chunk_size": True},
        {"dtype": "<f8"},
        {"dtype": ["<u2"]},
        {"vocab_size": "256"},
        {"source": []},
        {"tokenizer_fingerprint": None},
        {"format_version": 1},
        {"files": []},
        {"files": [FileEntry("chunk_00000.bin", 20, "0" * 64)]},
    ],
    ids=lambda facts: str(facts)[:40],
)
def test_stores_that_cannot_be(facts, work):
    with pytest.raises(ValueError, match="token store: .* is damaged: "):
        MemmapManager(store_with(work, **facts))


def test_ids_that_the_vocabulary_does_not_have(work):
    store = MemmapManager(store_with(work, vocab_size=106))  # "j" is 106
    with pytest.raises(ValueError, match=r"chunk_00002.bin' holds the id 106, and the vocabulary"):
        store.verify()
