"""Corpora as people have them: many files, folders, patterns, formats, packed or not."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import threading
import time
from pathlib import Path

import pytest

from cs_lm.cli._ranks import kept_for_ranks
from cs_lm.cli.commands import main as command
from cs_lm.config.data import DataConfig
from cs_lm.config.model import ModelConfig
from cs_lm.config.run import RunConfig
from cs_lm.data import cache
from cs_lm.data.cache import entries
from cs_lm.data.corpus import label_of
from cs_lm.data.pipeline import prepare
from cs_lm.data.pipes import check_no_pipe, with_pipes_kept
from cs_lm.errors import UserError
from cs_lm.tokenizer.text_source import TextSource
from cs_lm.training.console import log_to
from tests.ranks import launch_variables

END = "<|endoftext|>"
TEXTS = ["The cat sat.\n", "née 🙂\r\n", "1, 2, 3"]
RECORDS = [{"id": i, "text": text, "body": text.upper()} for i, text in enumerate(TEXTS)]
JOINED = END.join(TEXTS)
PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(paths, **settings):
    return "".join(TextSource(paths, separator=END, **settings).read())


def zstd(data):
    return pytest.importorskip("zstandard", reason="zstandard is not installed").compress(data)


def written(kind, records=RECORDS) -> bytes:
    if kind == "jsonl":
        return "\n".join(json.dumps(r) for r in records).encode() + b"\n"
    if kind == "jsonl, not escaped":
        return "\r\n".join(json.dumps(r, ensure_ascii=False) for r in records).encode()
    if kind == "json":
        return json.dumps(records, indent=1).encode()
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(records), file)
    return file.getvalue()


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.txt", "x"])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl, not escaped", "json", "parquet"])
def test_records_are_told_by_their_content(kind, name, tmp_path):
    (tmp_path / name).write_bytes(written(kind))
    assert read(name) == JOINED
    assert read(name, text_field="body") == JOINED.upper().replace(END.upper(), END)


@pytest.mark.parametrize("suffix", [*PACKERS, ".zst"])
@pytest.mark.parametrize("kind", ["text", "jsonl", "json"])
def test_packed_files(kind, suffix, tmp_path):
    """Whatever the name says."""
    content = TEXTS[0].encode() if kind == "text" else written(kind)
    packed = PACKERS.get(suffix, zstd)(content)
    for name in (f"x.{kind}{suffix}", "x.txt"):
        (tmp_path / name).write_bytes(packed)
        assert read(name) == (TEXTS[0] if kind == "text" else JOINED)
        source = TextSource(name, separator=END)
        list(source.read())
        assert source.bytes_read == source.total_bytes == len(packed)
        assert source.description() == TextSource(name, separator=END).describe()
    (tmp_path / "x.txt").write_bytes(packed[:-7])
    with pytest.raises(ValueError, match=r"'x.txt' cannot be decompressed .*; is the file"):
        read("x.txt")
    (tmp_path / "x.txt").write_bytes(packed + packed)  # as `cat` joins them
    if kind == "text":
        assert read("x.txt") == 2 * TEXTS[0]


def test_text_that_only_begins_like_json_is_text(tmp_path):
    for text in ('{"a": 1}\nis JSON, and this is not.\n', "{ and more", "[1] a list\n", '["x"'):
        (tmp_path / "x.txt").write_text(text, encoding="utf-8", newline="")
        assert read("x.txt") == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": "b"\n{"text": "c"}\n', "line 2 of 'x.jsonl' is no JSON"),
        (b'[{"text": "a"}, {"text": "b"', "record 2 of 'x.jsonl' is no JSON, or is cut short"),
        (
            b'{"title": "a", "n": 1}\n',
            "record 1 of 'x.jsonl' has no text in its field 'text'; it",
        ),
        (b'[{"text": "a"},\n{"text": "b"},\n', "the list in 'x.jsonl' is cut short after record 2"),
        (b"[1, 2]", "record 1 of 'x.jsonl' has no text in its field 'text'; it is a int"),
        (b'{"text": 5}\n', "it has text in no field; name the field with --text_field"),
        (b"", "'x.jsonl' is empty"),
        (b"PK\x03\x04rest", "'x.jsonl' is a zip archive; need text"),
        (b"%PDF-1.7", "'x.jsonl' is a PDF; need text"),
    ],
)
def test_bad_files_are_named(content, message, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(ValueError) as error:
        read("x.jsonl")
    assert message in str(error.value)


def test_a_column_that_is_missing_is_named(tmp_path):
    (tmp_path / "x.parquet").write_bytes(written("parquet"))
    with pytest.raises(ValueError, match="it has no column 'words', but id, text, body; name the"):
        read("x.parquet", text_field="words")


def test_long_records_and_many(tmp_path):
    """Across every border of what is read at once."""
    texts = ["x" * 3_000_000, *(f"é{i}" for i in range(30_000)), "y" * 1_500_000]
    for kind in ("jsonl", "json"):
        (tmp_path / "x").write_bytes(written(kind, [{"text": text} for text in texts]))
        assert read("x") == END.join(texts)


def test_folders_and_patterns_are_read_by_name(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.txt.gz", ".hidden.txt", ".git/x.txt", "picture.png"):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.name.encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read("folder") == f"a.md{END}b.txt{END}c.txt.gz"
    assert read("folder/*.txt") == "b.txt"
    assert read("folder/**/*.txt*") == f"b.txt{END}c.txt.gz"
    assert read(["folder/b.txt", "folder/a.md"]) == f"b.txt{END}a.md", "as they were given"
    for path, message in (
        ("none.txt", "is not a file, folder or pattern"),
        ("folder/*.rst", "no file fits the pattern"),
        ("folder/.git/sub", "is not a file, folder or pattern"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            TextSource(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="'empty' has no file that ends in .txt, .md"):
        TextSource("empty")


def test_what_we_make_is_no_corpus(tmp_path):
    """In the folder that one stands in: the text alone, also after a run."""
    (tmp_path / "a.txt").write_text("the cat sat. " * 60, encoding="utf-8")
    first = prepare(config(corpus_path="."))
    run = tmp_path / "runs" / "x"
    run.mkdir(parents=True)
    for name in ("metrics.jsonl", "notes.txt"):
        (run / name).write_text("{}", encoding="utf-8")
    assert TextSource(".").paths == ["a.txt"] or TextSource(".").paths == [Path("a.txt")]
    said = []
    with log_to(said.append):
        again = prepare(config(corpus_path="."))
    assert again.train.load_by_range(0, 9).tolist() == first.train.load_by_range(0, 9).tolist()
    assert "training" not in " ".join(said)


def test_an_empty_pipe_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(UserError, match="- is empty; need UTF-8 text"):
        with_pipes_kept(config(corpus_path="-"))
    assert not list(tmp_path.glob("data/*"))


def config(**data) -> RunConfig:
    return RunConfig(ModelConfig(vocab_size=260), DataConfig(**data), seq_length=2)


def test_order_and_separator_are_part_of_the_fingerprint(tmp_path):
    for name in ("1.txt", "2.txt"):
        (tmp_path / name).write_text(f"text {name} " * 9, encoding="utf-8")
    stores = set()
    for data in (
        {"corpus_path": ("1.txt", "2.txt")},
        {"corpus_path": ("2.txt", "1.txt")},
        {"corpus_path": ("1.txt", "2.txt"), "document_separator": "\n"},
    ):
        prepared = prepare(config(corpus_size="x", **data))
        whole = b"".join(
            prepared.tokenizer.decode_bytes(part.load_by_range(0, len(part)).tolist())
            for part in (prepared.train, prepared.valid)
        ).decode()
        first, second = (f"text {name} " * 9 for name in data["corpus_path"])
        assert whole == first + data.get("document_separator", END) + second
        stores |= {e.path.name for e in entries() if e.kind == "token store"}
    assert len(stores) == 3


@pytest.mark.slow
def test_ten_thousand_small_files(tmp_path):
    (tmp_path / "many").mkdir()
    for i in range(10_000):
        (tmp_path / "many" / f"{i:05d}.txt").write_bytes(b"document %d" % i)
    shown = []
    data = prepare(
        config(corpus_path="many", chunk_size=50_000),
        on_progress=lambda *about: shown.append(about),
    )
    ids = data.train.load_by_range(0, len(data.train))
    end = data.tokenizer.encode(END)
    assert (ids == end[0]).sum() > 8500
    phases = {phase for phase, *_ in shown}
    assert phases >= {"counting words, bytes read", "encoding, bytes read"}
    assert any("of 10,000, " in remark for *_, remark in shown), shown[:3]
    assert all(total == shown[0][2] for phase, _, total, _ in shown if "bytes" in phase)


def test_labels():
    for paths, label in (
        (("a/books.txt",), "books"),
        (("books.jsonl.gz",), "books"),
        (("a.b.txt",), "a.b"),
        (("texts/*.txt", "x"), "texts"),
        (("-",), "standard-input"),
        ((), "python-manual"),
    ):
        assert label_of(config(corpus_path=paths).data) == label


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_a_pipe_is_kept_for_later(monkeypatch, tmp_path):
    text = "the cat sat on the mat. " * 40
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    kept = with_pipes_kept(config(corpus_path="-"))
    (path,) = kept.data.corpus_path
    assert "standard-input_text-" in path and read(path) == text
    assert prepare(kept).train
    os.mkfifo("pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text(text, "utf-8"))
    writer.start()
    assert with_pipes_kept(config(corpus_path="pipe")) == kept, "the same text has the same name"
    writer.join()
    with pytest.raises(UserError, match="--dry_run: - is a pipe, and reading it would"):
        check_no_pipe(config(corpus_path="-"))
    found = [str(problem) for problem in DataConfig("-", "-").validate()]
    assert "--corpus_path, --valid_path: got - for both" in found[0]
    for name, value in launch_variables(0, 2, 29500).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--valid_path: is a pipe, which 2 processes cannot read"):
        kept_for_ranks(config(valid_path="-"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_commands_read_records(kind, tmp_path, capsys):
    records = [{"body": f"the cat sat {i} times. " * 5} for i in range(40)]
    (tmp_path / f"x.{kind}").write_bytes(written(kind, records))
    field = ["--text_field", "body"]
    assert command(["train-tokenizer", "--corpus_path", f"x.{kind}", "--vocab_size", "270"]) == 2
    assert "it has" in capsys.readouterr().err
    argv = ["train-tokenizer", "--corpus_path", f"x.{kind}", "--vocab_size", "270", *field]
    assert command(argv) == 0
    assert command(["encode", "--corpus_path", f"x.{kind}", "--store", "s", *field]) == 0
    assert "tokens from" in capsys.readouterr().out


def test_every_list_of_a_file_is_read(tmp_path):
    (tmp_path / "x.json").write_bytes(b'[{"text": "a"}]\n[{"text": "b"}, {"text": "c"}]')
    assert read("x.json") == f"a{END}b{END}c"


def test_half_a_surrogate_pair_in_json_becomes_a_sign(tmp_path):
    """As dumps of the web have them: cut in the middle of a character."""
    (tmp_path / "x.jsonl").write_bytes(rb'{"text": "bad \ud83d end"}' + b"\n")
    assert read("x.jsonl") == "bad \ufffd end"


@pytest.mark.parametrize("damage", ["cut", "changed"])
@pytest.mark.parametrize("suffix", [*PACKERS, ".zst"])
@pytest.mark.parametrize("size", [10, pytest.param(3_000_000, marks=pytest.mark.slow)])
def test_damage_to_packed_files_is_named(size, suffix, damage, tmp_path):
    if (size, suffix, damage) == (10, ".zst", "changed"):
        pytest.skip("so short a frame is not packed, and has no checksum")
    chosen = random.Random(0)
    packed = bytearray(PACKERS.get(suffix, zstd)(chosen.randbytes(size).hex().encode()))
    if damage == "cut":
        del packed[len(packed) // 2 :]
    else:
        packed[len(packed) // 2 : len(packed) // 2 + 9] = b"nine more"
    (tmp_path / "x.txt").write_bytes(packed)
    with pytest.raises(ValueError, match="'x.txt' (cannot be decompressed|is not UTF-8)"):
        read("x.txt")


@pytest.mark.parametrize(
    "text", [b"", gzip.compress(b"packed", mtime=0), b"plain"], ids=["nothing", "packed", "plain"]
)
def test_a_slow_pipe_is_told_by_its_content_too(text, monkeypatch):
    """What has come by the first look does not decide."""

    class Slow(io.RawIOBase):
        def __init__(self, data):
            self.left = [bytes([byte]) for byte in data]

        def readable(self):
            return True

        def readinto(self, buffer):
            if not self.left:
                return 0
            buffer[:1] = self.left.pop(0)
            return 1

    data = text or b'{"text": "hello"}\n{"text": "b"}\n'
    stream = io.TextIOWrapper(io.BufferedReader(Slow(data), 1))
    monkeypatch.setattr("sys.stdin", stream)
    expected = {b"": f"hello{END}b", b"plain": "plain"}.get(text, "packed")
    assert read("-") == expected


def test_files_that_are_read_in_other_ways_are_other_texts(tmp_path):
    for name in ("x.json", "x.txt"):
        (tmp_path / name).write_bytes(b'["hello","world"]')
    (tmp_path / "y.txt").write_bytes(b"more")
    one, other = (TextSource([name, "y.txt"], separator=END) for name in ("x.json", "x.txt"))
    assert "".join(one.read()) != "".join(other.read())
    assert one.description() == one.describe() != other.description()


def test_a_text_that_was_changed_behind_its_time_is_hashed_again(tmp_path):
    path = tmp_path / "large.txt"
    path.write_bytes(b"x" * (5 << 20))
    (tmp_path / "data").mkdir()
    os.utime(path, ns=(10**18, 10**18))
    time.sleep(2.1)  # so long a change may go without notice
    first = cache.sha256_remembered(path)
    assert path.name in (tmp_path / "data" / ".hashes.json").read_text(encoding="utf-8")
    assert cache.sha256_remembered(path) == first
    with open(path, "r+b") as file:
        file.write(b"another beginning")
    os.utime(path, ns=(10**18, 10**18))
    assert cache.sha256_remembered(path) != first


def test_what_users_put_into_data_is_not_ours(tmp_path):
    for name in ("my_text.txt", "x_text.txt"):
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_bytes(b"mine")
    for folder in ("german_tokenizer", "german_chunks", "b_tokenizer-0123456789"):
        (tmp_path / "data" / folder).mkdir()
        (tmp_path / "data" / folder / "model.bin").write_bytes(b"mine")
    assert list(cache.entries()) == []
    assert command(["cache", "--unused_days", "0"]) == 0
    assert len(list((tmp_path / "data").iterdir())) == 5


def test_a_text_from_a_pipe_is_removed_by_name_only(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the cat sat. " * 60)))
    kept = with_pipes_kept(config(corpus_path="-"))
    (path,) = map(Path, kept.data.corpus_path)
    os.utime(path, (0, 0))
    assert command(["cache", "--unused_days", "1"]) == 0 and path.exists()
    data = prepare(kept)
    assert command(["cache", "--remove", path.name]) == 2 and path.exists(), "it is in use"
    for lock in data.locks:
        lock.close()
    assert command(["cache", "--remove", path.name]) == 0 and not path.exists()
