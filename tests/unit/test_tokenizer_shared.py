"""One tokenizer for many threads, workers of any caller, special tokens as text, odd characters."""

import os
import subprocess
import sys
import zipapp
from concurrent.futures import ThreadPoolExecutor

import pytest

from cs_lm.tokenizer import BPETokenizer, train_bpe
from cs_lm.tokenizer.tokenizer import SHORT_TEXT_CHARS
from cs_lm.tokenizer.worker_pool import WorkerGroup
from tests.end_to_end.conftest import ROOT

BYTES = {i: bytes([i]) for i in range(256)}
USER, END = "<|user|>", "<|end|>"
CHAT = BPETokenizer(BYTES | {256: b"th", 257: b"<|"}, [(b"t", b"h"), (b"<", b"|")], [USER, END])


@pytest.mark.parametrize("length", [50, pytest.param(6_000, marks=pytest.mark.slow)])
def test_threads_share_a_tokenizer(length):
    """Each thread has its own words: what is remembered of one must not come out of another."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    shared = BPETokenizer(BYTES | {256: b"th", 257: b"he"}, [(b"t", b"h"), (b"h", b"e")], [END])
    texts = [
        "".join(f"the w{number}x{i} {END}" for i in range(length // 10)) for number in range(8)
    ]

    def is_right(text):
        ids = shared.encode(text)
        streamed = list(shared.encode_iterable([text[:99], text[99:]]))
        return ids == streamed and shared.decode(ids) == text

    try:
        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(is_right, texts * 5))
    finally:
        sys.setswitchinterval(before)


PROGRAM = """
import sys
from cs_lm.tokenizer import train_bpe
from cs_lm.tokenizer.parallel_encode import ParallelEncoder
from cs_lm.tokenizer import BPETokenizer
print("once")
vocab, merges = train_bpe(sys.argv[1], 270, ["<|x|>"], num_workers=2)
encoder = ParallelEncoder(BPETokenizer(vocab, merges), 2)
blocks = encoder.safe_blocks(["the cat sat " * 5000] * 4)
print(len(merges), sum(map(len, encoder.encode_each(blocks))))
"""


@pytest.mark.parametrize("caller", ["standard input", "script without a guard", "zipapp", "-c"])
def test_workers_start_whatever_the_caller_is(caller, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 200, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv, piped = [sys.executable, "-", text], PROGRAM
    if caller == "script without a guard":
        script = tmp_path / "script.py"
        script.write_text(PROGRAM, encoding="utf-8")
        argv, piped = [sys.executable, script, text], None
    elif caller == "zipapp":
        (tmp_path / "app").mkdir()
        (tmp_path / "app" / "__main__.py").write_text(PROGRAM, encoding="utf-8")
        zipapp.create_archive(tmp_path / "app", tmp_path / "app.pyz")
        argv, piped = [sys.executable, tmp_path / "app.pyz", text], None
    elif caller == "-c":
        argv, piped = [sys.executable, "-c", PROGRAM, text], None
    found = subprocess.run(
        argv, input=piped, capture_output=True, text=True, env=environment, timeout=120
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split()[0] == "once" and found.stdout.count("once") == 1
    vocab, merges = train_bpe(text, 270, ["<|x|>"])
    num_ids = len(BPETokenizer(vocab, merges).encode("the cat sat " * 20_000))
    assert found.stdout.split()[1:] == [str(len(merges)), str(num_ids)]


def _fails(tasks, results):
    raise ValueError(f"got {tasks.get()!r}, need something else")


def test_what_a_worker_raises_arrives():
    with WorkerGroup(1, _fails) as workers:
        workers.put("this")
        with pytest.raises(ValueError, match="got 'this', need something else"):
            workers.get()


LARGE = bytes(1 << 20)  # more than a pipe takes that nobody reads


def _fails_at_once(tasks, results):
    raise ValueError("no work for me")


@pytest.mark.slow
def test_what_all_workers_raise_arrives_while_tasks_are_put():
    error = pytest.raises(ValueError, match="no work for me")
    with WorkerGroup(2, _fails_at_once) as workers, error:
        for _ in range(100):
            workers.put(LARGE)


def _echoes(tasks, results):
    while True:
        results.put(tasks.get())


def test_workers_that_are_killed_are_told_of_while_results_wait():
    with WorkerGroup(2, _echoes) as workers:
        workers.put("one")
        assert workers.get() == "one"
        workers.put("two")
        for process in workers._processes:
            process.kill()
        with pytest.raises(ValueError, match="a process ended with status"):
            for _ in range(100):
                workers.put(LARGE)


def _ends(tasks, results):
    os._exit(7)


def test_a_worker_that_dies_is_told_of():
    with WorkerGroup(2, _ends) as workers, pytest.raises(ValueError, match="ended with status 7"):
        workers.get()


@pytest.mark.parametrize("length", [1, SHORT_TEXT_CHARS])
def test_special_tokens_as_text(length):
    text = f"the {USER}" * length
    as_text = CHAT.encode(text, allowed_special=())
    assert 257 in as_text and CHAT._special_ids[USER] not in as_text
    assert CHAT.decode(as_text) == text
    assert CHAT.encode(text).count(CHAT._special_ids[USER]) == length
    assert CHAT.encode(text, allowed_special={END}) == as_text
    assert CHAT.encode(text, allowed_special={USER}) == CHAT.encode(text)
    for settings in ({"allowed_special": ()}, {"allowed_special": {END}}, {}):
        parts = [text[i : i + 3] for i in range(0, len(text), 3)]
        assert list(CHAT.encode_iterable(parts, **settings)) == CHAT.encode(text, **settings)
    for disallowed in ("all", [USER]):
        settings = {"allowed_special": {END}, "disallowed_special": disallowed}
        with pytest.raises(ValueError, match=r"the special token '<\|user\|>', which is not allow"):
            CHAT.encode(text, **settings)
        for cut in (1, 7, len(text) - 2):
            with pytest.raises(ValueError, match=r"special token '<\|user\|>', which is not allow"):
                list(CHAT.encode_iterable([text[:cut], text[cut:]], **settings))
    with pytest.raises(ValueError, match="allowed_special: got '<x>', need special tokens of the"):
        CHAT.encode(text, allowed_special={"<x>"})


@pytest.mark.parametrize("length", [1, SHORT_TEXT_CHARS])
def test_surrogates_without_a_partner(length):
    """As tiktoken: a pair becomes its character, others U+FFFD."""
    text = "the \ud800 é\ud83d\ude42 \udc00x\ud835\udc00a" * length  # the last pair is a letter
    clean = "the \ufffd é🙂 \ufffdx\U0001d400a" * length
    assert CHAT.encode(text) == CHAT.encode(clean)
    for size in (3, 7, len(text)):
        parts = [text[i : i + size] for i in range(0, len(text), size)]
        assert list(CHAT.encode_iterable(parts)) == CHAT.encode(clean)
    assert CHAT.decode(CHAT.encode(text)) == clean


def test_the_split_pattern_is_part_of_the_fingerprint():
    class Other(BPETokenizer):
        split_pattern = r"\S+|\s+"

    one, other = BPETokenizer(BYTES, []), Other(BYTES, [])
    assert one.fingerprint != other.fingerprint
    assert one.fingerprint.startswith("284e24af"), "as earlier versions had it"
