"""`train_bpe`: from a text to a vocabulary and merges."""

from collections.abc import Sequence

from cs_lm.errors import UserError
from cs_lm.tokenizer import fast_bpe
from cs_lm.tokenizer.bpe import Pair
from cs_lm.tokenizer.corpus_files import PathOrPaths
from cs_lm.tokenizer.text_source import Progress, TextSource, separator_for
from cs_lm.tokenizer.word_counts import count_words


def train_bpe(
    input_path: PathOrPaths | TextSource,
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    num_workers: int | None = None,
    encoding_errors: str = "strict",
    progress: Progress | None = None,
) -> tuple[dict[int, bytes], list[Pair]]:
    """The vocabulary and merges that byte-pair encoding learns from a text.

    Ids 0 to 255 are the bytes, then the merged tokens in the order they were learnt, then the
    special tokens. The result depends only on the text, `vocab_size` and `special_tokens`, not on
    the number of workers or PYTHONHASHSEED. A text with too few pairs gives a smaller vocabulary.

    input_path   one or more files, a folder, a pattern, or "-" for standard input: read as one
                 text, with the first special token between two documents; or a TextSource
    num_workers  processes that count words; None: 1, or all cores for a pipe or a text over 16 MiB
    progress     called with the phase, the amount done, the total and a remark
    Raises: UserError when vocab_size is below 256 + special tokens, or the file is empty or not
    UTF-8; MissingError when it does not exist.
    """
    special_tokens = list(dict.fromkeys(special_tokens))
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise UserError(
            f"--vocab_size: got {vocab_size}, need at least {least} "
            f"(256 bytes + {len(special_tokens)} special tokens); raise it"
        )
    source = input_path
    if not isinstance(source, TextSource):
        separator = separator_for(None, special_tokens)
        source = TextSource(source, encoding_errors, separator=separator)
    progress = progress or (lambda *_: None)
    counts = count_words(
        source.read(),
        special_tokens,
        source.num_workers(num_workers),
        lambda num_different: progress(
            "counting words, bytes read",
            source.bytes_read,
            source.total_bytes,
            f"{source.position}{num_different:,} different words",
        ),
    )
    merges = fast_bpe.train_merges(
        counts, vocab_size - least, lambda done, wanted: progress("merging", done, wanted, "")
    )
    tokens = [bytes([byte]) for byte in range(256)] + [a + b for a, b in merges]
    tokens += [token.encode("utf-8") for token in special_tokens]
    return dict(enumerate(dict.fromkeys(tokens))), merges
