import gc
import io
import json
import os
import subprocess
import sys
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from cs_lm.tokenizer import BPETokenizer, train_bpe
from cs_lm.tokenizer.parallel_encode import ParallelEncoder
from cs_lm.tokenizer.text_source import TextSource
from cs_lm.tokenizer.word_counts import count_words

END = "<|endoftext|>"
TEXT = (
    "The cat sat on the mat. It wasn't sad; the cat'll sleep 12 hours.\n\n"
    "  Déjà vu: naïve café, 北京 and 🙂 smiles!\r\n\tTabs  and   runs of spaces   \n"
)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> BPETokenizer:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(TEXT * 20 + END + TEXT * 10, encoding="utf-8", newline="")
    vocab, merges = train_bpe(path, 330, [END])
    return BPETokenizer(vocab, merges, [END])


def write(path, text):
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_train_by_hand(tmp_path):
    """low x5, lower x2, widest x3, newest x6: the worked example of Sennrich et al. (2016)."""
    words = ["low"] * 5 + ["lower"] * 2 + ["widest"] * 3 + ["newest"] * 6
    path = write(tmp_path / "t.txt", "|".join(words))
    vocab, merges = train_bpe(path, 256 + 6, [])
    # st and es occur 9 times: "st" is the greater pair; then e+st, o+w, l+ow, w+est, n+e.
    # ("|" stands 15 times, but alone in its word.)
    assert merges == [
        (b"s", b"t"),
        (b"e", b"st"),
        (b"o", b"w"),
        (b"l", b"ow"),
        (b"w", b"est"),
        (b"n", b"e"),
    ]
    assert vocab[256] == b"st" and len(vocab) == 262


def test_equal_counts_take_the_greatest_pair(tmp_path):
    _, merges = train_bpe(write(tmp_path / "t.txt", "ac bd,ce"), 257, [])
    assert merges == [(b"c", b"e")]


def test_special_tokens_split_documents_and_never_merge(tmp_path):
    path = write(tmp_path / "t.txt", f"ab{END}cd" * 50)
    vocab, merges = train_bpe(path, 300, [END])
    joined = {a + b for a, b in merges}
    assert joined == {b"cd", b"ab", b"cdab"}  # "abcd" and anything with "<" never stand together
    assert vocab[max(vocab)] == END.encode()
    assert list(vocab.values()).count(END.encode()) == 1


def test_too_little_text_gives_a_smaller_vocabulary(tmp_path):
    vocab, merges = train_bpe(write(tmp_path / "t.txt", "ab"), 1000, [])
    assert merges == [(b"a", b"b")] and len(vocab) == 257


def test_vocab_size_below_bytes_and_specials(tmp_path):
    path = write(tmp_path / "t.txt", "ab")
    with pytest.raises(ValueError, match=r"--vocab_size: got 256, need at least 257 .*raise it"):
        train_bpe(path, 256, [END])


@pytest.mark.parametrize(
    "content, error, message",
    [
        (None, FileNotFoundError, "not a file, folder or pattern"),
        (b"", ValueError, "is empty; need a UTF-8 text file"),
        (b"caf\xc3\xa9 \xff oops", ValueError, r"not UTF-8 at byte offset 6 .*--encoding_errors"),
        (b"ends inside \xf0\x9f", ValueError, r"not UTF-8 at byte offset 12 "),
    ],
)
def test_bad_corpus(tmp_path, content, error, message):
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message):
        train_bpe(path, 300, [])


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 5, 1 << 20])
def test_byte_offset_does_not_depend_on_the_block(tmp_path, block_bytes):
    path = tmp_path / "t.txt"
    path.write_bytes("aé北🙂".encode() + b"\xe5\x8c\xffz")
    with pytest.raises(ValueError, match="byte offset 10 "):
        list(TextSource(path, "strict", block_bytes).read())
    joined = "".join(TextSource(path, "replace", block_bytes).read())
    assert joined == path.read_bytes().decode("utf-8", "replace")


def test_workers_count_the_same_words(tmp_path):
    text = (TEXT + END) * 300
    parts = [text[i : i + 777] for i in range(0, len(text), 777)]
    one = count_words(parts, [END], 1)
    two = count_words(parts, [END], 2, block_chars=5000)
    assert isinstance(one, Counter) and one == two


def test_training_ignores_the_hash_seed_and_the_number_of_workers(tmp_path):
    write(tmp_path / "t.txt", (TEXT + END) * 50)
    program = (
        "import sys, hashlib\nfrom cs_lm.tokenizer import train_bpe\n"
        "if __name__ == '__main__':\n"
        f"    r = train_bpe({str(tmp_path / 't.txt')!r}, 400, num_workers=int(sys.argv[1]))\n"
        "    print(hashlib.sha256(repr(r).encode()).hexdigest())\n"
    )
    script = write(tmp_path / "train.py", program)
    digests = {
        subprocess.run(
            [sys.executable, script, workers],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.getcwd()},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, workers in [("0", "1"), ("1", "1"), ("2", "2")]
    }
    assert len(digests) == 1


def test_round_trip_and_special_tokens(small):
    text = TEXT + END + "<|endof" + END * 2
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert ids.count(small.vocab_size - 1) == 3
    assert small.encode("") == [] and small.decode([]) == ""


def test_without_special_tokens_their_text_is_ordinary(small):
    plain = BPETokenizer(small.vocab, small.merges)
    assert len(plain.encode(END)) > 1 and plain.decode(plain.encode(END)) == END


def test_overlapping_special_tokens_longest_first(small):
    tokenizer = BPETokenizer(small.vocab, small.merges, [END, END + END])
    ids = tokenizer.encode(END * 3)
    assert [tokenizer.vocab[i] for i in ids] == [(END * 2).encode(), END.encode()]
    assert list(tokenizer.encode_iterable([*(END * 3)])) == ids


def test_missing_special_token_is_appended(small):
    tokenizer = BPETokenizer(small.vocab, small.merges, ["<|user|>"])
    assert tokenizer.vocab_size == small.vocab_size + 1
    assert tokenizer.encode("<|user|>") == [small.vocab_size]
    assert len(small.vocab) == small.vocab_size, "the caller's vocabulary is left alone"


def test_decode_bad_bytes_and_ids(small):
    assert small.decode([0xF0, 0x9F]) == "�"
    with pytest.raises(ValueError, match=r"decode: got token id 99999, need an id .*0 to 329"):
        small.decode([1, 99999])


def test_save_and_load(small, tmp_path):
    small.save(tmp_path / "a" / "vocab.json", tmp_path / "a" / "merges.txt")
    loaded = BPETokenizer.from_files(
        tmp_path / "a" / "vocab.json", tmp_path / "a" / "merges.txt", [END]
    )
    assert (loaded.vocab, loaded.merges) == (small.vocab, small.merges)
    assert loaded.fingerprint == small.fingerprint
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["merges.txt", "vocab.json"]


def test_fingerprint_follows_every_part(small):
    others = [
        BPETokenizer(small.vocab, small.merges),
        BPETokenizer(small.vocab, small.merges[:-1], [END]),
        BPETokenizer({**small.vocab, 1000: b"a new one"}, small.merges, [END]),
    ]
    assert len({small.fingerprint, *(t.fingerprint for t in others)}) == 4


def test_hostile_vocabularies(tmp_path):
    """Each would take all memory, loop, or leave a choice."""
    for vocab, merges, message in [
        ({10**12: b"a"}, [], "got the id 1000000000000, need 0 to"),
        ({0: b"a", 1: b""}, [], "a token without bytes"),
        ({0: b"a", 1: b"b", 2: b"ab"}, [(b"a", b"b")] * 2, "merge 1 of .* occurs twice"),
    ]:
        with pytest.raises(ValueError, match=message):
            BPETokenizer(vocab, merges)
    (tmp_path / "merges.txt").write_text("", encoding="utf-8")
    for text, message in [
        ('{"a": 0, "a": 1}', "a token name occurs twice"),
        ('{"a": true}', "an id is not an integer"),
        ("[" * 100_000, "is not a vocab.json"),
    ]:
        (tmp_path / "vocab.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            BPETokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt")


def test_bad_vocabularies(small, tmp_path):
    with pytest.raises(ValueError, match="has two ids"):
        BPETokenizer({0: b"a", 1: b"a"}, [])
    with pytest.raises(ValueError, match="got the id -1, need 0 to"):
        BPETokenizer({-1: b"a"}, [])
    with pytest.raises(ValueError, match="is not in the vocabulary"):
        BPETokenizer({0: b"a"}, [(b"a", b"b")])
    with pytest.raises(ValueError, match="need a vocabulary with all 256 bytes"):
        BPETokenizer({0: b"a"}, []).encode("b")
    with pytest.raises(ValueError, match="special_tokens: got an empty string"):
        BPETokenizer(small.vocab, small.merges, [""])
    with pytest.raises(FileNotFoundError, match="--vocab_path"):
        BPETokenizer.from_files(tmp_path / "no.json", tmp_path / "no.txt")
    vocab, merges = tmp_path / "v.json", tmp_path / "m.txt"
    small.save(vocab, merges)
    with pytest.raises(FileNotFoundError, match="--merges_path"):
        BPETokenizer.from_files(vocab, tmp_path / "no.txt")
    merges.write_text("a b c\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1 of .* need two tokens"):
        BPETokenizer.from_files(vocab, merges)
    merges.write_bytes(b"\xff a\n")
    with pytest.raises(ValueError, match="--merges_path: .* is not UTF-8"):
        BPETokenizer.from_files(vocab, merges)
    two_names = json.dumps({"a": 1, "b": 1})
    for content in ["[1]", "{", json.dumps({"a": "x"}), json.dumps({"a b": 1}), two_names]:
        vocab.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=r"--vocab_path|vocabulary:"):
            BPETokenizer.from_files(vocab, merges)


@pytest.fixture(scope="module")
def five_megabytes(tmp_path_factory):
    """Lines of many alphabets, with a new word on each."""
    path = tmp_path_factory.mktemp("text") / "five_megabytes.txt"
    line = "".join(f"{word} {i}" for i, word in enumerate(TEXT.split(" ")))
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for i in range(5_000_000 // len(line.encode()) + 1):
            file.write(f"{line} {i:x}\n")
    assert path.stat().st_size >= 5_000_000
    return path


def test_stream_holds_under_a_megabyte(small, five_megabytes):
    with open(five_megabytes, encoding="utf-8", newline="") as file:
        gc.collect()
        tracemalloc.start()
        num_tokens = sum(1 for _ in small.encode_iterable(file))
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert num_tokens > 1_000_000
    assert peak_bytes < 1_000_000


UNDER_A_LIMIT = """
import resource, sys
from pathlib import Path
from cs_lm import BPETokenizer

tokenizer = BPETokenizer.from_files(sys.argv[1], sys.argv[2])
with open(sys.argv[3], encoding="utf-8", newline="") as file:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 1_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(sum(1 for _ in tokenizer.encode_iterable(file)))
    try:
        file.seek(0)
        tokenizer.encode(file.read())
    except MemoryError:
        print("the whole text does not fit")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs an address-space limit and /proc")
def test_stream_works_where_no_more_than_a_megabyte_is_left(small, five_megabytes, tmp_path):
    files = [str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")]
    small.save(*files)
    run = subprocess.run(
        [sys.executable, "-c", UNDER_A_LIMIT, *files, str(five_megabytes)],
        capture_output=True,
        text=True,
        # Python's own allocator claims a whole megabyte for the first object that does not fit;
        # glibc's grows by more than it is asked for, and keeps what is freed between other things
        env={
            **os.environ,
            "PYTHONMALLOC": "malloc",
            "MALLOC_MMAP_THRESHOLD_": "32768",
            "MALLOC_TOP_PAD_": "4096",
        },
    )
    assert run.returncode == 0, run.stderr
    num_tokens, whole_text = run.stdout.splitlines()
    assert int(num_tokens) > 1_000_000
    assert whole_text == "the whole text does not fit"


def test_a_giant_word_is_not_quadratic(small):
    """A million signs without a border: the quadratic way would take hours, not seconds."""
    text = "=" * 1_000_000
    ids = list(small.encode_iterable(text[i : i + 9] for i in range(0, len(text), 9)))
    assert small.decode(ids) == text


def test_importing_the_tokenizer_does_not_import_torch():
    program = "import sys, cs_lm, cs_lm.tokenizer; print('torch' in sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert shown.strip() == "False"


def test_several_files_and_a_pipe_are_one_text(small, tmp_path, monkeypatch):
    data = TEXT.encode()
    first, second = tmp_path / "1.txt", tmp_path / "2.txt"
    first.write_bytes(data[:40])
    second.write_bytes(data[40:])
    source = TextSource([first, second])
    assert "".join(source.read()) == TEXT
    assert (source.bytes_read, source.total_bytes) == (len(data), len(data))
    whole = write(tmp_path / "whole.txt", TEXT)
    assert source.description() == TextSource([first, second]).describe()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    pipe = TextSource("-")
    assert pipe.total_bytes is None and "".join(pipe.read()) == TEXT
    assert train_bpe(TextSource([first, second]), 300) == train_bpe(whole, 300)
    between = write(tmp_path / "between.txt", TEXT[:12] + "<|x|>" + TEXT[12:])
    first.write_text(TEXT[:12], encoding="utf-8", newline="")
    second.write_text(TEXT[12:], encoding="utf-8", newline="")
    assert train_bpe([first, second], 300, ["<|x|>"]) == train_bpe(between, 300, ["<|x|>"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(ValueError, match="got nothing from the pipe"):
        list(TextSource("-").read())


def test_processes_encode_the_same_ids(small):
    parts = [(TEXT + END) * 400] * 20  # several blocks
    expected = np.concatenate(list(small.encode_blocks(parts)))
    for num_workers in (1, 2):
        encoder = ParallelEncoder(small, num_workers)
        assert (encoder.fingerprint, encoder.vocab_size) == (small.fingerprint, small.vocab_size)
        assert np.array_equal(
            np.concatenate(list(encoder.encode_each(encoder.safe_blocks(parts)))), expected
        )


def test_progress_names_phases_and_totals(tmp_path):
    path = write(tmp_path / "t.txt", TEXT * 50)
    size = path.stat().st_size
    seen = []
    train_bpe(path, 300, num_workers=2, progress=lambda *shown: seen.append(shown))
    phases = [phase for phase, *_ in seen]
    assert phases == sorted(phases) and set(phases) == {"counting words, bytes read", "merging"}
    assert seen[-1] == ("merging", 44, 44, "")
    assert all(total == size for phase, _, total, _ in seen if phase.startswith("counting"))


@pytest.mark.parametrize("text", ["a", "-", " ", "\n", "的", "ab\ufffd'll "])
def test_runs_are_not_quadratic(small, text):
    """400,000 characters of one kind: looking through all pairs again and again takes hours."""
    whole = (text * 400_000)[:400_000]
    ids = small.encode(whole)
    assert small.decode(ids) == whole


def test_training_on_one_giant_word(tmp_path):
    path = write(tmp_path / "t.txt", "abcab" * 200_000)
    _, merges = train_bpe(path, 262)
    assert merges[:3] == [(b"a", b"b"), (b"c", b"ab"), (b"ab", b"cab")]
