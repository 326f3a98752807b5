"""The tokenizer beside tiktoken, tokenizers and rustbpe: training, encoding, decoding.

    python -m benchmarks.tokenizer TEXT [--rounds 5] [--vocab_size 32000]
    python -m benchmarks.tokenizer --words FOLDER      # long words, GPT-2's vocabulary for example

TEXT is a file of some 100 MB; encoding takes its first 20 MB. Every contestant starts in a fresh
process with nothing remembered; reading files and loading vocabularies is not timed, but for the
whole commands. What a `tiktoken` is given: the same vocabulary, the same pattern.
"""

import argparse
import functools
import os
import random
import string
import tempfile
from pathlib import Path

from benchmarks.measure import in_turns

END = "<|endoftext|>"
SAMPLE_BYTES = 20_000_000


def train_ours(path: str, vocab_size: int):
    from cs_lm.tokenizer import train_bpe

    return lambda: train_bpe(path, vocab_size, [END])


def train_tokenizers(path: str, vocab_size: int):
    from tokenizers import ByteLevelBPETokenizer

    return lambda: ByteLevelBPETokenizer().train(
        [path], vocab_size=vocab_size, special_tokens=[END], show_progress=False
    )


def train_rustbpe(path: str, vocab_size: int):
    import rustbpe

    from cs_lm.tokenizer.pretokenizer import SPLIT_PATTERN

    def train():
        with open(path, encoding="utf-8") as file:
            documents = file.read().split(END)
        rustbpe.Tokenizer().train_from_iterator(
            iter(documents), vocab_size=vocab_size - 1, pattern=SPLIT_PATTERN
        )

    return train


def sample(path: str) -> str:
    with open(path, "rb") as file:
        return file.read(SAMPLE_BYTES).decode("utf-8", "ignore")


def ours(folder: str):
    from cs_lm.tokenizer import BPETokenizer
    from cs_lm.tokenizer.word_boundaries import character_classes

    character_classes()
    return BPETokenizer.from_files(f"{folder}/vocab.json", f"{folder}/merges.txt")


def tiktoken_encoding(folder: str):
    import tiktoken

    from cs_lm.tokenizer.pretokenizer import SPLIT_PATTERN

    ranks = {token: i for i, token in ours(folder).vocab.items() if token != END.encode()}
    return tiktoken.Encoding("x", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})


def encode_ours(path: str, folder: str):
    tokenizer, text = ours(folder), sample(path)
    return lambda: tokenizer.encode(text)


def encode_tiktoken(path: str, folder: str):
    encoding, text = tiktoken_encoding(folder), sample(path)
    return lambda: encoding.encode_ordinary(text)


def encode_tokenizers(path: str, folder: str):
    from tokenizers import ByteLevelBPETokenizer

    theirs = ByteLevelBPETokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt")
    lines = sample(path).splitlines(keepends=True)
    return lambda: theirs._tokenizer.encode_batch_fast(lines)


def stream_ours(path: str, folder: str):
    tokenizer, lines = ours(folder), sample(path).splitlines(keepends=True)
    return lambda: list(tokenizer.encode_iterable(lines))


def decode_ours(path: str, folder: str):
    tokenizer = ours(folder)
    ids = tokenizer.encode(sample(path))
    return lambda: tokenizer.decode(ids)


def decode_tiktoken(path: str, folder: str):
    encoding = tiktoken_encoding(folder)
    ids = encoding.encode_ordinary(sample(path))
    return lambda: encoding.decode(ids)


def command_ours(path: str, folder: str):
    from cs_lm.cli.encode import main

    store = tempfile.mkdtemp()
    argv = ["--corpus_path", path, "--store", f"{store}/s", "--num_workers", "2"]
    files = [f"--vocab_path={folder}/vocab.json", f"--merges_path={folder}/merges.txt"]
    return lambda: main([*argv, *files])


def batch_tiktoken(path: str, folder: str):
    """From text in memory to ids in memory: less than the command does."""
    encoding = tiktoken_encoding(folder)
    text = Path(path).read_text(encoding="utf-8")
    # pieces of about 1 MB, cut at lines
    cuts = [0]
    while len(text) - cuts[-1] > 1_000_000:
        cuts.append(text.find("\n", cuts[-1] + 1_000_000) + 1 or len(text))
    pieces = [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)])]
    return lambda: encoding.encode_ordinary_batch(pieces, num_threads=2)


LONG_WORDS = {
    "digits": "0123456789",
    "DNA": "ACGT",
    "hex": "abcdef",
    "ten letters": "etaoinshrd",
    "base64": string.ascii_letters,
    "CJK": "".join(map(chr, range(0x4E00, 0x9FFF))),
    "signs": "!#$%&()*+,-./:;<=>?@[]^_{|}~",
    "one letter": "a",
    "one sign": "=",
}
LONG_WORD_BYTES = 1_000_000


def long_word(letters: str, num_bytes: int = LONG_WORD_BYTES) -> str:
    """Drawn from the letters, without a place where the split pattern would cut it."""
    drawn = random.Random(0).choices(letters, k=num_bytes // len(letters[0].encode("utf-8")))
    return "".join(drawn)


def long_word_ours(folder: str, letters: str, num_bytes: int = LONG_WORD_BYTES):
    tokenizer, text = ours(folder), long_word(letters, num_bytes)
    tokenizer.encode(text[:5000])  # tables that are made once
    return lambda: tokenizer.encode(text)


def long_word_tiktoken(folder: str, letters: str):
    encoding, text = tiktoken_encoding(folder), long_word(letters)
    return lambda: encoding.encode_ordinary(text)


def one_word(folder: str, rounds: int) -> None:
    """One word of a million bytes of each kind; and of ten million digits beside a million."""
    for name, letters in LONG_WORDS.items():
        contestants = {
            "cs_lm": functools.partial(long_word_ours, folder, letters),
            "tiktoken": functools.partial(long_word_tiktoken, folder, letters),
        }
        in_turns(f"one word of 1 MB, {name}", contestants, rounds)
    longer = {
        f"cs_lm, {size:,} bytes": functools.partial(long_word_ours, folder, "0123456789", size)
        for size in (10 * LONG_WORD_BYTES, LONG_WORD_BYTES)
    }
    in_turns("one word ten times as long", longer, rounds)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument(
        "--words",
        metavar="FOLDER",
        help="only long words, with vocab.json and merges.txt in FOLDER",
    )
    chosen = parser.parse_args(argv)
    if chosen.words:
        one_word(chosen.words, chosen.rounds)
        return
    size = os.path.getsize(chosen.text)
    on_text = functools.partial(functools.partial, path=chosen.text)
    trained = {
        "cs_lm": on_text(train_ours, vocab_size=chosen.vocab_size),
        "tokenizers": on_text(train_tokenizers, vocab_size=chosen.vocab_size),
        "rustbpe": on_text(train_rustbpe, vocab_size=chosen.vocab_size),
    }
    in_turns("train", trained, chosen.rounds, text_bytes=size, vocab_size=chosen.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        four_times = Path(folder) / "four_times.txt"
        with open(four_times, "wb") as file:
            for _ in range(4):
                file.write(Path(chosen.text).read_bytes())
        longer = {
            "cs_lm, text four times": functools.partial(
                train_ours, str(four_times), chosen.vocab_size
            )
        }
        in_turns("train", longer, 1, text_bytes=4 * size, vocab_size=chosen.vocab_size)
        four_times.unlink()
        _save_vocabulary(chosen.text, chosen.vocab_size, folder)
        for question, contestants in {
            "encode, one process, 20 MB": {
                "cs_lm": encode_ours,
                "tiktoken": encode_tiktoken,
                "tokenizers": encode_tokenizers,
            },
            "stream of lines, 20 MB": {"cs_lm": stream_ours, "cs_lm encode": encode_ours},
            "decode, 20 MB": {"cs_lm": decode_ours, "tiktoken": decode_tiktoken},
            "file to store, 2 workers": {"cs_lm": command_ours, "tiktoken batch": batch_tiktoken},
        }.items():
            bound = {name: on_text(f, folder=folder) for name, f in contestants.items()}
            in_turns(question, bound, chosen.rounds)
        one_word(folder, chosen.rounds)


def _save_vocabulary(path: str, vocab_size: int, folder: str) -> None:
    from cs_lm.tokenizer import BPETokenizer, train_bpe

    tokenizer = BPETokenizer(*train_bpe(path, vocab_size, [END]), [END])
    tokenizer.save(f"{folder}/vocab.json", f"{folder}/merges.txt")


if __name__ == "__main__":
    main()
