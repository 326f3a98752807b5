import os
import shutil

import pytest

from cs_lm.config.data import DataConfig
from cs_lm.config.fields import replace as replaced
from cs_lm.config.model import ModelConfig
from cs_lm.config.run import RunConfig
from cs_lm.data.corpus import embedded_text, find_corpus, label_of
from cs_lm.data.pipeline import prepare
from cs_lm.data.token_store import MemmapManager
from cs_lm.tokenizer import BPETokenizer
from cs_lm.training.console import log_to

TEXT = "the cat sat on the mat, the dog sat on the log.\n" * 40


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats.txt").write_text(TEXT, encoding="utf-8")


def config(**changes) -> RunConfig:
    base = RunConfig(ModelConfig(vocab_size=270), DataConfig("cats.txt"), seq_length=8)
    return replaced(base, changes)


def prepared(**changes):
    said: list[str] = []
    with log_to(said.append):
        data = prepare(config(**changes))
    return data, " | ".join(said)


def whole_text(data) -> str:
    ids = [i for part in (data.train, data.valid) for i in part.load_by_range(0, len(part))]
    return data.tokenizer.decode(ids)


def test_makes_what_is_missing_and_uses_it_again():
    data, said = prepared()
    assert "training 270 tokens on cats.txt" in said and "encoding cats.txt" in said
    assert whole_text(data) == TEXT
    assert len(data.valid) == int(0.1 * (len(data.train) + len(data.valid)))
    again, said = prepared()
    assert "training" not in said and "encoding" not in said
    assert whole_text(again) == TEXT


@pytest.mark.parametrize(
    "changes, is_new",
    [
        ({"vocab_size": 280}, ("tokenizer", "chunks")),
        ({"special_tokens": ("<|x|>",)}, ("tokenizer", "chunks")),
        ({"chunk_size": 100}, ("chunks",)),
        ({"encoding_errors": "replace"}, ("tokenizer", "chunks")),
    ],
)
def test_other_settings_share_nothing_and_replace_nothing(changes, is_new, tmp_path):
    first, _ = prepared()
    before = contents(tmp_path / "data")
    data, _ = prepared(**changes)
    assert whole_text(data) == TEXT
    after = contents(tmp_path / "data")
    assert before.items() <= after.items(), "what was there is as it was"
    made = {path.parent.name.split("-")[0] for path in after.keys() - before.keys()}
    assert made == {f"cats_{kind}" for kind in is_new}
    assert whole_text(first) == TEXT


def contents(folder):
    files = [p for p in folder.rglob("*") if p.is_file() and ".locks" not in p.parts]
    return {path: path.read_bytes() for path in files}


def test_another_text_under_the_same_name_makes_it_anew(tmp_path):
    prepared()
    (tmp_path / "cats.txt").write_text(TEXT + "a new end", encoding="utf-8")
    data, said = prepared()
    assert "training 270 tokens" in said and whole_text(data) == TEXT + "a new end"


def test_validation_text_of_its_own(tmp_path):
    (tmp_path / "dogs.txt").write_text("the dog sat on the dog. " * 9, encoding="utf-8")
    data, _ = prepared(valid_path="dogs.txt")
    assert data.tokenizer.decode(data.train.load_by_range(0, len(data.train))) == TEXT
    assert len(data.valid) > 8


def test_tokenizer_files_of_the_user(tmp_path):
    data, said = prepared(vocab_path="t/v.json", merges_path="t/m.txt")
    assert "wrote t/v.json and t/m.txt" in said.replace(os.sep, "/")
    data, said = prepared(vocab_path="t/v.json", merges_path="t/m.txt")
    assert "training" not in said and whole_text(data) == TEXT
    with pytest.raises(ValueError, match=r"--vocab_size: got 260, need at least 270: the tokeniz"):
        prepared(vocab_path="t/v.json", merges_path="t/m.txt", vocab_size=260)
    _, said = prepared(vocab_path="t/v.json", merges_path="t/m.txt", vocab_size=300)
    assert "the model keeps 300 rows (--vocab_size 270 is enough)" in said


def test_label_names_an_existing_store(tmp_path):
    prepared()
    data, said = prepared(corpus_path=None, corpus_size="cats")
    assert whole_text(data) == TEXT and "training" not in said
    with pytest.raises(FileNotFoundError, match=r"--corpus_size: got 'dogs', but .* holds no tok"):
        prepared(corpus_path=None, corpus_size="dogs")


def test_a_store_of_another_tokenizer_is_refused(tmp_path):
    prepared()
    BPETokenizer({i: bytes([i]) for i in range(256)}, []).save("v.json", "m.txt")
    with pytest.raises(ValueError, match="was made with another tokenizer; give --corpus_path to"):
        prepared(corpus_path=None, corpus_size="cats", vocab_path="v.json", merges_path="m.txt")
    (store,) = (tmp_path / "data").glob("cats_chunks-*")
    assert len(MemmapManager(store)) > 0, "and kept"


def test_text_shorter_than_a_window(tmp_path):
    with pytest.raises(ValueError, match=r"validation text: got \d+ tokens, need at least 201 for"):
        prepared(seq_length=200)
    with pytest.raises(ValueError, match=r"training text: got \d+ tokens, need at least 5001 for"):
        prepared(seq_length=5000)


@pytest.mark.parametrize(
    "content, message",
    [(b"", "'new.txt' is empty"), (TEXT.encode() + b"\xff", "not UTF-8 at byte offset 1920 ")],
)
def test_bad_text_leaves_nothing_half_written(tmp_path, content, message):
    (tmp_path / "new.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepared(corpus_path="new.txt")
    left = [p for p in tmp_path.rglob("*") if "new" in p.name and p.parent.name != ".locks"]
    assert [p.name for p in left] == ["new.txt"]


def test_embedded_text(monkeypatch):
    text = embedded_text()
    assert len(text) > 300_000 and "statement" in text
    assert label_of(DataConfig()) == "python-manual"
    corpus = find_corpus(DataConfig())
    assert "".join(corpus.open().read()) == text
    assert corpus.open().describe() == corpus.description
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(FileNotFoundError, match="give a text of your own with --corpus_path"):
        embedded_text()


def test_settings_are_not_ignored_without_a_corpus():
    prepared()
    for changes, message in [
        ({"chunk_size": 7}, "has chunks of 500000 tokens; give --corpus_path"),
        ({"encoding_errors": "replace"}, "was made with --encoding_errors strict; give --corpus"),
    ]:
        with pytest.raises(ValueError, match=message):
            prepared(corpus_path=None, corpus_size="cats", **changes)


def test_a_damaged_tokenizer_is_made_again():
    first, _ = prepared()
    (merges,) = [*__import__("pathlib").Path("data").glob("cats_tokenizer-*/merges.txt")]
    merges.write_bytes(merges.read_bytes()[:-9])
    data, said = prepared()
    assert "is damaged; making it again" in said
    assert data.tokenizer.fingerprint == first.tokenizer.fingerprint


def test_what_an_earlier_version_made_is_used(tmp_path):
    """One folder for each label, with the same files in it."""
    text = whole_text(prepared(valid_path="cats.txt")[0])
    for path in (tmp_path / "data").glob("cats_*-*"):
        path.rename(path.with_name(path.name.rpartition("-")[0]))
    shutil.copytree(tmp_path / "data" / "cats_chunks", tmp_path / "data" / "cats_chunks_valid")
    again, said = prepared(valid_path="cats.txt")
    assert "training" not in said and "encoding" not in said
    assert whole_text(again) == text
    assert not list((tmp_path / "data").glob("cats_*-*"))


def test_a_label_of_several_texts_is_refused(tmp_path):
    prepared()
    (tmp_path / "cats.txt").write_text(TEXT + "more", encoding="utf-8")
    prepared()
    with pytest.raises(ValueError, match="label|several token stores: .*; give --corpus_path to"):
        prepared(corpus_path=None, corpus_size="cats")
