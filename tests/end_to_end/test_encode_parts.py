"""`encode --shard` and `--join`, and compiled engines: the same bytes as one process."""

import gzip
import itertools
import json
import random
import shutil

import pytest

from cs_lm.cli.commands import main as command
from cs_lm.data.token_store import MemmapManager
from cs_lm.tokenizer import BPETokenizer, train_bpe
from cs_lm.tokenizer.pretokenizer import SpecialTokenSplitter, split_words
from cs_lm.tokenizer.text_source import TextPart, TextSource

END = "<|endoftext|>"
PIECES = ["the cat", " sat's ", "\n\n", "déjà vu ", "  \t", "日本語テキスト", "🙂🙂", "x" * 40,
          "1234", "'ll", "don't", END, "<|endof", "!?", " ", "\u3000", "a"]  # fmt: skip


def text_of(seed, count=3000):
    rng = random.Random(seed)
    return "".join(rng.choice(PIECES) for _ in range(count))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Texts of several kinds, and a tokenizer."""
    folder = tmp_path_factory.mktemp("parts")
    for number in range(3):
        (folder / f"{number}.txt").write_text(text_of(number), encoding="utf-8")
    (folder / "empty.txt").write_text("", encoding="utf-8")
    with gzip.open(folder / "packed.txt.gz", "wt", encoding="utf-8") as file:
        file.write(text_of(7))
    with open(folder / "records.jsonl", "w", encoding="utf-8") as file:
        for number in range(40):
            file.write(json.dumps({"text": text_of(100 + number, 60)}) + "\n")
    vocab, merges = train_bpe(str(folder / "0.txt"), 400, [END])
    BPETokenizer(vocab, merges, [END]).save(folder / "vocab.json", folder / "merges.txt")
    return folder


def encode(files, store, *more, names=("0.txt",), chunk_size="777"):
    return command([
        "encode", "--corpus_path", *(str(files / name) for name in names), "--store", str(store),
        "--vocab_path", str(files / "vocab.json"), "--merges_path", str(files / "merges.txt"),
        "--special_tokens", END, "--chunk_size", chunk_size, *more,
    ])  # fmt: skip


def contents(folder):
    skipped = ("verified.json",)  # times of files
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in skipped}


@pytest.mark.parametrize(
    "names",
    [["0.txt"], ["0.txt", "empty.txt", "1.txt", "2.txt"],
     ["0.txt", "packed.txt.gz", "1.txt", "records.jsonl"]],
    ids=("one", "several", "kinds"),
)  # fmt: skip
@pytest.mark.parametrize("count", (1, 3, 7))
@pytest.mark.parametrize("separator", ("", END))
def test_parts_are_joined_to_the_same_bytes(files, tmp_path, names, count, separator):
    more = ["--document_separator", separator]
    assert encode(files, tmp_path / "whole", *more, names=names) == 0
    for part in range(count):
        status = encode(
            files, tmp_path / "joined", *more, "--shard", f"{part + 1}/{count}", names=names
        )
        assert status == 0
    assert encode(files, tmp_path / "joined", *more, "--join", str(count), names=names) == 0
    assert contents(tmp_path / "joined") == contents(tmp_path / "whole")


@pytest.mark.parametrize("specials", ([], [END], ["aa", "aab", "x" * 5]))
@pytest.mark.parametrize("block_bytes", (7, 1 << 16))
def test_each_part_begins_where_words_and_special_tokens_do(tmp_path, specials, block_bytes):
    """Parts of any number; also tokens that overlap themselves."""
    path, splitter = tmp_path / "text.txt", SpecialTokenSplitter(specials)
    for seed in range(6):
        text = text_of(seed, 120) + "aaaab aaa " * (seed % 3)
        path.write_text(text, encoding="utf-8", newline="")
        whole = TextSource(path, block_bytes=block_bytes)
        for count in (2, 5, 31):
            parts = [
                "".join(TextPart(whole, index, count, splitter.first_border).read())
                for index in range(count)
            ]
            assert "".join(parts) == text
            words = [list(_words(splitter, part)) for part in parts]
            assert list(itertools.chain(*words)) == list(_words(splitter, text))


def _words(splitter, text):
    for number, part in enumerate(splitter.split(text)):
        yield from [part] if number % 2 else split_words(part)


def test_a_part_reads_little_more_than_itself(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("some words and more. " * 100_000, encoding="utf-8")
    part = TextPart(TextSource(path), 3, 8, SpecialTokenSplitter([END]).first_border)
    size = sum(map(len, part.read()))
    assert abs(size - 2_100_000 // 8) < 50
    assert part.bytes_read <= size + 3 * (1 << 20)


@pytest.mark.parametrize("engine", ("tokenizers", "gigatoken"))
def test_a_compiled_engine_writes_the_same_store(files, tmp_path, engine):
    pytest.importorskip(engine, reason=f"{engine} is not installed")
    names = ["0.txt", "packed.txt.gz"]
    assert encode(files, tmp_path / "ours", names=names) == 0
    assert encode(files, tmp_path / "theirs", "--engine", engine, names=names) == 0
    assert contents(tmp_path / "theirs") == contents(tmp_path / "ours")


def test_an_engine_with_other_ids_is_refused(files, tmp_path, capsys, monkeypatch):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    from cs_lm.data import engines

    def wrong(path):
        encode = engines._tokenizers(path)

        def with_a_fault(texts):
            found = encode(texts)
            found[0][5] += 1
            return found

        return with_a_fault

    monkeypatch.setitem(engines.ENGINES, "tokenizers", wrong)
    assert encode(files, tmp_path / "x", "--engine", "tokenizers") == 2
    assert "tokenizers gives other ids than our tokenizer from" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_text_that_changed_after_a_part_was_encoded_is_found(files, tmp_path, capsys):
    """Also if its length is the same, in the first or the last byte of a part."""
    names = ["0.txt", "packed.txt.gz", "1.txt"]
    copies = shutil.copytree(files, tmp_path / "files")
    for part in ("1/3", "2/3", "3/3"):
        assert encode(copies, tmp_path / "x", "--shard", part, names=names) == 0
    for name, at in (("0.txt", 0), ("1.txt", -1), ("packed.txt.gz", 9)):
        content = (copies / name).read_bytes()
        changed = bytearray(content)
        changed[at] ^= 1
        (copies / name).write_bytes(changed)
        assert encode(copies, tmp_path / "x", "--join", "3", names=names) == 2
        assert "is of another text" in capsys.readouterr().err
        (copies / name).write_bytes(content)
    assert encode(copies, tmp_path / "x", "--join", "3", names=names) == 0


def test_mistakes_are_named(files, tmp_path, capsys):
    store = tmp_path / "x"
    assert encode(files, store, "--shard", "1/2") == 0
    cases = [
        (["--shard", "3/2"], "--shard: got '3/2', need K/N"),
        (["--shard", "x"], "--shard: got 'x', need K/N"),
        (["--join", "2", "--shard", "1/2"], "--shard: has no effect with --join"),
        (["--shard", "1/2"], "part-00001-of-00002' exists"),
        (["--join", "2"], "part-00002-of-00002' is missing; encode it with --shard 2/2"),
        (["--join", "2", "--num_workers", "2"], "--num_workers: has no effect with --join"),
        (["--engine", "tokenizers", "--num_workers", "2"], "--num_workers: has no effect"),
    ]
    capsys.readouterr()
    for more, message in cases:
        assert encode(files, store, *more) == 2
        shown = capsys.readouterr().err
        assert message in shown and "Traceback" not in shown, more
    assert encode(files, store, "--shard", "2/2") == 0
    assert encode(files, store, "--join", "2", names=("1.txt",)) == 2
    assert "is of another text" in capsys.readouterr().err
    assert encode(files, store, "--join", "2", chunk_size="778") == 2
    assert "another tokenizer or --chunk_size" in capsys.readouterr().err
    first = MemmapManager(tmp_path / "x.part-00001-of-00002")
    path = first.folder / first.files[0].name
    path.write_bytes(path.read_bytes()[:-2] + b"\x01\x00")
    assert encode(files, store, "--join", "2") == 2
    assert path.name in capsys.readouterr().err and not store.exists()
