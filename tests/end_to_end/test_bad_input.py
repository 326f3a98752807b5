"""What a user can get wrong: one readable line each, exit status 2, nothing left in the way."""

import pytest

from cs_lm.cli.commands import main as command
from cs_lm.cli.train import main as train
from cs_lm.tokenizer import BPETokenizer
from tests.end_to_end.conftest import TINY, laid_over, run_script, write_corpus


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1") * 99)
    (tmp_path / "short.txt").write_text("ab", encoding="utf-8")


TRAIN_CASES = [
    ("--corpus_path no.txt", "--corpus_path: got 'no.txt', which is not a file, folder or"),
    ("--corpus_path empty.txt", "--corpus_path: 'empty.txt' is empty; need a UTF-8 text file"),
    (
        "--corpus_path latin.txt",
        "not UTF-8 at byte offset 3 (0xe9); convert it to UTF-8, or pass --encoding_errors replace",
    ),
    ("--corpus_path short.txt", "training text: got 1 tokens, need at least 17"),
    ("--valid_path short.txt", "validation text: got 2 tokens, need at least 17"),
    ("--valid_path no.txt", "--valid_path: got 'no.txt', which is not a file"),
    ("--vocab_size 256", "--vocab_size: got 256, need at least 257 (256 bytes + 1 special tokens)"),
    ("--num_heads 3", "--num_heads: got 3, need a divisor of --d_model (16)"),
    ("--num_heads 16", "which makes the head size 1, need an even one"),
    ("--seq_length 33", "--seq_length: got 33, need at most --max_seq_length (32)"),
    ("--device tpu", "--device: got 'tpu', need one of auto, cuda, cpu, mps"),
    ("--device cuda", "finds no such device on this machine; use --device cpu or auto"),
    ("--num_layer 2", "--num_layer: unknown flag; did you mean --num_layers?"),
    ("--betas 0.9", "--betas: got 0.9, need two numbers"),
    ("--resume --out_dir none", "holds no checkpoint; check it, or start the run without --res"),
    ("--prompt=", "--prompt: got an empty text, need at least one character"),
    (
        "--vocab_path v.json --merges_path empty.txt",
        "--vocab_path: got 'v.json', which does not exist, but",
    ),
]


@pytest.mark.parametrize("argv, message", TRAIN_CASES, ids=[argv for argv, _ in TRAIN_CASES])
def test_training(argv, message, capsys, tmp_path):
    if argv == "--device cuda" and __import__("torch").cuda.is_available():
        pytest.skip("this machine has CUDA")
    given = argv.split()
    if not argv.startswith("--corpus_path"):
        given += ["--corpus_path", "animals.txt"]
    assert train(laid_over([*TINY, "--max_steps", "2", *given])) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], lines
    assert not (tmp_path / "runs").exists() and not list(tmp_path.rglob("*.writing"))


@pytest.mark.parametrize(
    "argv",
    [
        ["train-tokenizer", "--corpus_path", "animals.txt", "--special_tokens", "\udcff"],
        [
            "tokenizer-report",
            "--word",
            "a\udcff",
            "--vocab_path",
            "v.json",
            "--merges_path",
            "m.txt",
        ],
        ["train", "--corpus_path", "animals.txt", "--special_tokens", "\udcff"],
    ],
    ids=lambda argv: argv[0],
)
def test_bytes_that_are_no_text_are_one_line(argv, capsys, tmp_path):
    """What a terminal makes of bytes that are not UTF-8."""
    BPETokenizer({i: bytes([i]) for i in range(256)}, []).save("v.json", "m.txt")
    assert command(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines


def test_every_wrong_argument_at_once(capsys):
    argv = ["--corpus_path", "no.txt", "--num_heads", "3", "--device", "tpu", "--lr", "x"]
    for more in ([], ["--dry_run"]):
        assert train([*argv, *more]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert sorted(line.split(":")[1].strip() for line in lines) == [
            "--corpus_path",
            "--device",
            "--lr",
            "--num_heads",
        ]


def test_encoding_errors_is_the_way_out(capsys):
    argv = [*TINY, "--corpus_path", "latin.txt", "--encoding_errors", "replace", "--max_steps", "2"]
    assert train(laid_over([*argv, "--seq_length", "4"])) == 0
    assert "done: 2 steps" in capsys.readouterr().out


COMMAND_CASES = [
    ("trian", "got command 'trian'; did you mean train?"),
    ("encod", "got command 'encod'; did you mean encode?"),
    ("train-tokenizer", "--corpus_path: is missing; name a UTF-8 text file"),
    ("train-tokenizer --corpus_path animals.txt --vocab_size 9", "--vocab_size: got 9, need at"),
    ("train-tokenizer --corpus_path animals.txt --num_workers 0", "--num_workers: got 0, need 1"),
    ("train-tokenizer --corpus_path animals.txt --vocab_path short.txt", "exists; add --overwrite"),
    ("encode --corpus_path animals.txt --store s", "--vocab_path: got 'vocab.json', which is not"),
    ("encode --corpus_path animals.txt --store .", "'.' exists and is no token store"),
    ("encode --corpus_path animals.txt", "--store: is missing"),
    ("encode --corpus_path a --store s --num_workers 0", "--num_workers: got 0, need 1 or more"),
    ("tokenizer-report --vocab_path no.json", "--vocab_path: got 'no.json', which is not a file"),
    ("tokenizer-report --color blue", "--color: got 'blue', need one of auto, always, never"),
    (
        "evaluate --out_dir none --text_path animals.txt",
        "--out_dir: 'none' is not the folder of a run",
    ),
    ("evaluate --text_path animals.txt", "--out_dir: is missing"),
    ("generate --out_dir none --prompt=", "--prompt: got an empty text"),
    ("generate --out_dir none --prompt a --prompt_file b", "--prompt, --prompt_file: got both"),
    ("generate --out_dir none --prompt a --top_p 2", "--top_p: got 2.0, need above 0, at most 1"),
    (
        "generate --out_dir none --prompt a --checkpoint worst",
        "--checkpoint: got 'worst', need best, last, or",
    ),
    ("generate --out_dir none --prompt_file no.txt", "--prompt_file: got 'no.txt', which is not"),
    ("generate --out_dir none --promt a", "--promt: unknown flag; did you mean --prompt?"),
    ("plot --out_dir none", "--out_dir: 'none' is not the folder of a run; name the fold"),
    ("selfcheck --dtype int8", "--dtype: got 'int8', need one of float32, bfloat16"),
    ("selfcheck --seed -1", "--seed: got -1, need 0 or more"),
]


@pytest.mark.parametrize("argv, message", COMMAND_CASES, ids=[argv for argv, _ in COMMAND_CASES])
def test_commands(argv, message, capsys, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert command(argv.split()) == 2
    errors = capsys.readouterr().err
    assert message in errors and "Traceback" not in errors
    assert all(line.startswith("error: ") for line in errors.splitlines())
    assert sorted(tmp_path.rglob("*")) == before


def test_store_of_another_tokenizer(tmp_path, capsys):
    assert train([*TINY, "--corpus_path", "animals.txt", "--max_steps", "2"]) == 0
    BPETokenizer({i: bytes([i]) for i in range(256)}, []).save("v.json", "m.txt")
    capsys.readouterr()
    argv = ["--corpus_size", "animals", "--vocab_path", "v.json", "--merges_path", "m.txt"]
    assert train(laid_over([*TINY, *argv, "--out_dir", "other"])) == 2
    assert "was made with another tokenizer; give --corpus_path" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_script_prints_no_traceback(tmp_path):
    result = run_script(tmp_path, "--corpus_path", "no.txt")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == (
        "error: --corpus_path: got 'no.txt', which is not a file, folder or pattern; check the "
        "path\n"
    )
