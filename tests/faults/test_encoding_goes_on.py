"""An encoding that was ended, even by SIGKILL, goes on: the same bytes as an uninterrupted one."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from cs_lm.data.store_writer import JOURNAL
from cs_lm.data.token_store import VERIFIED, MemmapManager, StoreOptions
from cs_lm.tokenizer import BPETokenizer
from cs_lm.tokenizer.parallel_encode import ParallelEncoder
from tests.end_to_end.conftest import ROOT
from tests.end_to_end.test_interrupt import wait_for_the_end_of_group

WORDS = ["the", "cat", "sat", "née", "🙂", "on", "1000", "mats", "\n\n", "  "]
TOKENIZER = BPETokenizer(
    {i: bytes([i]) for i in range(256)} | {256: b"th", 257: b"the", 258: b" c"},
    [(b"t", b"h"), (b"th", b"e"), (b" ", b"c")],
    ["<|end|>"],
)


def text_of(num_words, seed=0):
    chosen = random.Random(seed)
    return " ".join(chosen.choice(WORDS) for _ in range(num_words))


def contents(folder):
    files = [path for path in sorted(folder.iterdir()) if path.name != VERIFIED]
    return {path.name: path.read_bytes() for path in files}


class Ended(Exception):
    pass


def ends_after(blocks, count):
    for number, block in enumerate(blocks):
        if number == count:
            raise Ended
        yield block


class Encoder:
    """Small blocks, and an end after so many of them."""

    vocab_size, fingerprint = TOKENIZER.vocab_size, TOKENIZER.fingerprint

    def __init__(self, num_blocks=None):
        self._num_blocks = num_blocks
        self.num_encoded = 0

    def safe_blocks(self, parts):
        return TOKENIZER.safe_blocks(parts, 300)

    def encode_each(self, blocks):
        for ids in TOKENIZER.encode_each(ends_after(blocks, self._num_blocks)):
            self.num_encoded += 1
            yield ids


def encode(folder, text, encoder, chunk_size, key="this text"):
    parts = [text[i : i + 1000] for i in range(0, len(text), 1000)]
    return MemmapManager.save_as_memmap(
        parts, encoder, folder, chunk_size, StoreOptions(text_key=key)
    )


@pytest.mark.parametrize("chunk_size", [pytest.param(30, marks=pytest.mark.slow), 100, 1000, 5000])
def test_ended_after_any_block(work, chunk_size):
    text = text_of(4000)
    whole = Encoder()
    encode(work / "whole", text, whole, chunk_size)
    for count in (0, 1, 2, 5, 17, whole.num_encoded - 1):
        folder = work / f"ended{count}"
        with pytest.raises(Ended):
            encode(folder, text, Encoder(count), chunk_size)
        assert not folder.exists()
        rest = Encoder()
        encode(folder, text, rest, chunk_size)
        assert contents(folder) == contents(work / "whole")
        ids_a_block = len(MemmapManager(folder)) / whole.num_encoded
        blocks_again = 2 + chunk_size / ids_a_block
        assert rest.num_encoded <= whole.num_encoded - count + blocks_again


@pytest.mark.parametrize("change", ["text", "chunk size", "journal", "chunk"])
def test_only_the_same_work_is_gone_on_with(work, change):
    text = text_of(4000)
    with pytest.raises(Ended):
        encode(work / "store", text, Encoder(20), 100)
    writing = work / "store.writing"
    key, chunk_size = "this text", 100
    if change == "text":
        text, key = text_of(4000, seed=1), "another text"
    elif change == "chunk size":
        chunk_size = 99
    elif change == "journal":  # its last line was cut by the end of power
        journal = writing / JOURNAL
        journal.write_bytes(journal.read_bytes()[:-9])
    else:
        (writing / "chunk_00003.bin").write_bytes(b"short")
    encode(work / "store", text, Encoder(), chunk_size, key)
    encode(work / "whole", text, Encoder(), chunk_size)
    assert contents(work / "store") == contents(work / "whole")


def test_without_a_key_nothing_is_left(work):
    with pytest.raises(Ended):
        encode(work / "store", text_of(4000), Encoder(20), 100, key=None)
    assert list(work.iterdir()) == []


def test_in_several_processes(work):
    text = text_of(30_000)
    encode(work / "whole", text, TOKENIZER, 1000)
    with pytest.raises(Ended):
        encode(work / "store", text, Encoder(200), 1000)
    encode(work / "store", text, ParallelEncoder(TOKENIZER, 2), 1000)
    assert contents(work / "store") == contents(work / "whole")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda n: n.name)
def test_the_command_is_killed_and_given_again(work, number):
    (work / "text.txt").write_text(text_of(1_500_000), encoding="utf-8")
    TOKENIZER.save(work / "vocab.json", work / "merges.txt")
    argv = [
        sys.executable,
        "-m",
        "cs_lm",
        "encode",
        "--corpus_path",
        "text.txt",
        "--special_tokens",
        "<|end|>",
        "--chunk_size",
        "50000",
        "--num_workers",
        "2",
        "--store",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*argv, "whole"], check=True, env=environment, capture_output=True)
    process = subprocess.Popen(
        [*argv, "store"], env=environment, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (work / "store.writing" / "chunk_00002.bin").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(number)
    status = process.wait()
    wait_for_the_end_of_group(process.pid)  # its workers too
    assert status == (-number if number == signal.SIGKILL else 128 + number)
    assert not (work / "store").exists()
    started = len(list((work / "store.writing").glob("*.bin")))
    subprocess.run([*argv, "store"], check=True, env=environment, capture_output=True)
    assert started >= 3 and contents(work / "store") == contents(work / "whole")


def test_ids_beyond_the_vocabulary_are_found(work):
    """Before the store gets its name: what is made is read again."""

    class Wrong(Encoder):
        def encode_each(self, blocks):
            for ids in TOKENIZER.encode_each(blocks):
                yield np.where(ids == ids.max(), 5000, ids)

    with pytest.raises(ValueError, match="chunk_00000.bin' holds the id 5000, and the vocabulary"):
        encode(work / "store", text_of(100), Wrong(), 1000)
    assert not (work / "store").exists()
