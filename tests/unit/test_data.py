import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from cs_lm.data.batches import (
    BatchSource,
    Copied,
    load_windows,
    sample_windows,
    shuffle_windows,
)
from cs_lm.data.prefetch import Prefetcher
from cs_lm.data.store_writer import id_dtype
from cs_lm.data.token_store import VERIFIED, ArrayTokens, MemmapManager, StoreOptions, TokenRange
from cs_lm.device import World
from cs_lm.tokenizer import BPETokenizer

CPU = torch.device("cpu")
BYTES = BPETokenizer({i: bytes([i]) for i in range(256)}, [])
TEXT = "".join(chr(33 + i % 90) for i in range(1000))


class WideTokenizer:
    """Ids beyond uint16."""

    vocab_size, fingerprint = 100_000, "wide"

    def safe_blocks(self, parts):
        return iter(parts)

    def encode_each(self, blocks):
        for part in blocks:
            yield [70_000 + ord(character) for character in part]


def save(folder, chunk_size=64, text=TEXT):
    return MemmapManager.save_as_memmap([text[:7], text[7:]], BYTES, folder, chunk_size)


def test_store_by_hand(tmp_path):
    store = save(tmp_path / "s", source := 64)
    assert source == 64 and len(store) == 1000 and store.dtype == np.uint16
    expected = np.frombuffer(TEXT.encode(), np.uint8)
    for start, end in [
        (0, 1000),
        (0, 0),
        (63, 65),
        (60, 200),
        (64, 128),
        (999, 1000),
        (1000, 1000),
    ]:
        ids = store.load_by_range(start, end)
        assert ids.dtype == np.uint16 and np.array_equal(ids, expected[start:end])
    store.verify()


def test_manifest(tmp_path):
    store = MemmapManager.save_as_memmap(
        ["Déjà", " vu"], BYTES, tmp_path / "s", 5, StoreOptions(lambda: {"name": "x"})
    )
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["dtype"] == "<u2" and manifest["num_tokens"] == 9
    assert manifest["text_bytes"] == 9 and manifest["chunk_size"] == 5
    assert manifest["tokenizer_fingerprint"] == BYTES.fingerprint == store.fingerprint
    assert [(name, size) for name, size, _ in manifest["files"]] == [
        ("chunk_00000.bin", 10),
        ("chunk_00001.bin", 8),
    ]
    assert manifest["source"] == {"name": "x"}


def test_large_vocabularies_take_four_bytes(tmp_path):
    assert id_dtype(65_536) == np.uint16 and id_dtype(65_537) == np.uint32
    store = MemmapManager.save_as_memmap(["ab"], WideTokenizer(), tmp_path / "s")
    assert store.load_by_range(0, 2).tolist() == [70_097, 70_098]


def test_store_takes_the_place_of_an_older_one_only_when_complete(tmp_path):
    save(tmp_path / "s")

    def broken():
        yield "some text"
        raise RuntimeError("the text broke off")

    with pytest.raises(RuntimeError, match="broke off"):
        MemmapManager.save_as_memmap(broken(), BYTES, tmp_path / "s")
    assert len(MemmapManager(tmp_path / "s")) == 1000
    save(tmp_path / "s", text=TEXT[:100])
    assert len(MemmapManager(tmp_path / "s")) == 100
    assert os.listdir(tmp_path) == ["s"], "nothing half-written is left"


def test_bad_stores(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no manifest.json; encode a text"):
        MemmapManager(tmp_path)
    with pytest.raises(ValueError, match="got an empty text"):
        MemmapManager.save_as_memmap([], BYTES, tmp_path / "empty")
    assert os.listdir(tmp_path) == []
    store = save(tmp_path / "s")
    for start, end in [(-1, 5), (5, 4), (0, 1001)]:
        with pytest.raises(ValueError, match=r"need a range inside \[0, 1000\)"):
            store.load_by_range(start, end)
    chunk = tmp_path / "s" / "chunk_00001.bin"
    data = bytearray(chunk.read_bytes())
    data[3] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(ValueError, match=r"chunk_00001.bin.* has changed"):
        store.verify()
    chunk.write_bytes(data[:10])
    with pytest.raises(ValueError, match=r"damaged: cannot read .*chunk_00001.bin"):
        store.load_by_range(0, 128)
    (tmp_path / "s" / "manifest.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="delete the folder and encode"):
        MemmapManager(tmp_path / "s")


def test_a_store_is_read_once_until_it_changes(tmp_path, monkeypatch):
    store = save(tmp_path / "s")
    read = []
    monkeypatch.setattr(MemmapManager, "verify", lambda self: read.append(self.folder))
    MemmapManager(tmp_path / "s").verify_once()
    assert read == [], "it was read when it was made"
    (tmp_path / "s" / VERIFIED).unlink()
    MemmapManager(tmp_path / "s").verify_once()
    time.sleep(0.2)  # so long a file may change without a new time
    MemmapManager(tmp_path / "s").verify_once()
    MemmapManager(tmp_path / "s").verify_once()
    assert 1 <= len(read) <= 2
    chunk = tmp_path / "s" / store.files[2].name
    for change in (lambda: os.utime(chunk, ns=(1, 1)), lambda: chunk.write_bytes(bytes(128))):
        before = len(read)
        change()
        MemmapManager(tmp_path / "s").verify_once()
        assert len(read) == before + 1
    (tmp_path / "s" / VERIFIED).write_text("[[", encoding="utf-8")
    MemmapManager(tmp_path / "s").verify_once()
    assert len(read) == before + 2


def test_token_range(tmp_path):
    part = TokenRange(save(tmp_path / "s"), 100, 300)
    assert len(part) == 200
    assert np.array_equal(
        part.load_by_range(5, 90), np.frombuffer(TEXT.encode()[105:190], np.uint8)
    )
    with pytest.raises(ValueError, match=r"need inside \[0, 200\)"):
        part.load_by_range(0, 201)
    with pytest.raises(ValueError, match="TokenRange"):
        TokenRange(ArrayTokens(np.arange(5)), 0, 6)


MEMORY_PROGRAM = """
import re, sys, numpy as np
from cs_lm.data.token_store import MemmapManager

class Numbers:
    vocab_size, fingerprint = 60_000, "numbers"
    def safe_blocks(self, parts):
        return iter(parts)
    def encode_each(self, blocks):
        for part in blocks:
            yield list(range(len(part)))

def memory_kb(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

def texts():
    for _ in range(800):
        yield "x" * 50_000

warm = MemmapManager.save_as_memmap(["x" * 50_000] * 12, Numbers(), sys.argv[1] + "/warm")
before = memory_kb("VmHWM")
store = MemmapManager.save_as_memmap(texts(), Numbers(), sys.argv[1] + "/big")
writing = memory_kb("VmHWM") - before
before = memory_kb("VmRSS")
for start in range(0, len(store), 100_000):
    store.load_by_range(start, start + 100_000)
print(len(store) * 2 // 1024, writing, memory_kb("VmRSS") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_does_not_follow_the_size_of_the_store(tmp_path):
    shown = subprocess.run(
        [sys.executable, "-c", MEMORY_PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    store_kb, writing_kb, reading_kb = map(int, shown.split())
    assert store_kb > 75_000
    assert writing_kb < store_kb / 3 and reading_kb < 5_000


def windows(source, num_batches):
    return [source(i)[0][:, 0].tolist() for i in range(num_batches)]


@pytest.mark.parametrize("sampling", ["random", "epoch"])
def test_batch_is_a_function_of_seed_and_number(sampling):
    tokens = ArrayTokens(np.arange(500))

    def source(seed):
        return BatchSource(tokens, 4, 7, seed, sampling, World(CPU))

    first = source(3)
    x, y = first(5)
    assert x.shape == y.shape == (4, 7) and x.dtype == torch.int64
    assert torch.equal(y, x + 1)
    again = source(3)
    assert torch.equal(again(5)[0], x), "whatever was drawn before"
    assert windows(source(3), 9) != windows(source(4), 9)


def test_every_start_is_equally_likely():
    tokens = ArrayTokens(np.arange(20))
    starts = sample_windows(tokens, 100, 7, seed=0)
    drawn = np.concatenate([starts(i) for i in range(1300)])
    counts = np.bincount(drawn, minlength=13)
    assert len(counts) == 13, "the last window, 12 to 19, included"
    expected = len(drawn) / 13
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 32.9  # 12 degrees of freedom: exceeded once in a thousand seeds


def test_epoch_takes_each_window_once():
    tokens = ArrayTokens(np.arange(7 * 23 + 1))  # exactly 23 windows, the last one included
    starts = shuffle_windows(tokens, 5, 7, seed=1)
    drawn = np.concatenate([starts(i) for i in range(23 * 3)])[: 23 * 5]
    epochs = drawn.reshape(5, 23) // 7
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 5, "a new order each epoch"
    assert load_windows(tokens, np.array([22 * 7]), 7, CPU)[1][0, -1] == 7 * 23


def test_an_epoch_has_an_order_of_its_own():
    """Neighbours land far apart: the mean step of a random permutation is a third of its size."""
    starts = shuffle_windows(ArrayTokens(np.arange(10_001)), 10_000, 1, 0)
    order, next_order = starts(0), starts(1)
    assert sorted(order) == sorted(next_order) == list(range(10_000))
    assert abs(np.abs(np.diff(order)).mean() / (10_000 / 3) - 1) < 0.05
    assert (order == next_order).mean() < 0.01


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_share_a_batch(size):
    """Together they hold the rows of one process, in the same order, however many they are."""
    tokens = ArrayTokens(np.arange(50))
    whole = BatchSource(tokens, 7, 5, 0, "random", World(CPU))(3)
    parts = [
        BatchSource(tokens, 7, 5, 0, "random", World(CPU, rank, size))(3) for rank in range(size)
    ]
    assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
    assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
    lengths = [len(part.inputs) for part in parts]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("sampling", ["random", "epoch"])
def test_too_few_tokens(sampling):
    BatchSource(ArrayTokens(np.arange(8)), 2, 7, 0, sampling, World(CPU))(0)
    with pytest.raises(ValueError, match=r"tokens: got 7, need at least 8 for one window"):
        BatchSource(ArrayTokens(np.arange(7)), 2, 7, 0, sampling, World(CPU))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_batches_reach_cuda():
    x, y = BatchSource(ArrayTokens(np.arange(50)), 2, 7, 0, "random", World(torch.device("cuda")))(
        0
    )
    assert x.device.type == "cuda" and torch.equal(y, x + 1)


@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="no CUDA device here")
def test_a_thread_copies_to_the_run_s_device_beside_its_work():
    """Nothing waits: what is asked for is used by the stream that asks, after the copy."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)  # not always a thread's own
    source = BatchSource(ArrayTokens(np.arange(100_000)), 64, 1000, 0, "random", World(device))
    batches = Prefetcher(source.copied, lambda copied: copied.received())
    matrix = torch.ones(2048, 2048, device=device)
    for index in range(20):
        for _ in range(5):
            matrix @ matrix  # the stream has work to do
        x, y = batches(index)
        assert x.device == device and x.is_cuda
        expected = BatchSource(ArrayTokens(np.arange(100_000)), 64, 1000, 0, "random", World(CPU))(
            index
        )
        assert torch.equal(x.cpu(), expected[0]) and torch.equal(y.cpu(), expected[1])


def test_what_is_received_waits_for_its_event(monkeypatch):
    """On a machine without CUDA, with a stream that only tells what it was asked."""
    told = []

    class Stream:
        def wait_event(self, event):
            told.append(event)

    rows = torch.arange(6).view(2, 3)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _rows, stream: told.append("kept"))
    x, y = Copied(rows, "copied").received()
    assert told == ["copied", "kept"] and x.tolist() == [[0, 1], [3, 4]]
    assert y.tolist() == [[1, 2], [4, 5]]
    Copied(rows).received()
    assert len(told) == 2


def test_a_store_that_was_replaced_is_not_read_as_the_old_one(tmp_path):
    old = save(tmp_path / "s")
    save(tmp_path / "s", text=TEXT[::-1])
    with pytest.raises(ValueError, match="was replaced while in use"):
        old.load_by_range(0, 5)


def test_prefetcher_has_the_next_value_ready():
    asked = []
    prepared = threading.Event()

    def square(index):
        asked.append((index, threading.current_thread() is threading.main_thread()))
        if index == 4:
            prepared.set()
        return index**2

    squares = Prefetcher(square)
    assert squares(3) == 9
    assert prepared.wait(timeout=30), "4 is prepared before anyone asks for it"
    assert [squares(4), squares(9), squares(1)] == [16, 81, 1]
    assert asked[:2] == [(3, True), (4, False)]
    assert [index for index, _ in asked].count(4) == 1, "what was prepared is what is given"


def test_prefetcher_raises_what_the_function_raises():
    def fail_at_one(index):
        if index == 1:
            raise ValueError("one is wrong")
        return index

    numbers = Prefetcher(fail_at_one)
    assert numbers(0) == 0
    with pytest.raises(ValueError, match="one is wrong"):
        numbers(1)
    assert numbers(2) == 2
