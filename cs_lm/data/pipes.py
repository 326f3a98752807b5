"""Saves text from a pipe as a file, because a run reads its text more than once."""

from cs_lm.config.fields import replace
from cs_lm.config.run import RunConfig
from cs_lm.data.cache import PIPE_LABEL, keep_stream
from cs_lm.errors import UserError
from cs_lm.tokenizer.corpus_files import is_pipe
from cs_lm.tokenizer.text_source import opened

_BLOCK_BYTES = 1 << 20


def with_pipes_kept(config: RunConfig) -> RunConfig:
    """The config with each pipe replaced by a file that holds its text."""
    changes = {}
    for name in ("corpus_path", "valid_path"):
        paths = getattr(config.data, name)
        if any(map(is_pipe, paths)):
            changes[name] = tuple(_kept(path) if is_pipe(path) else path for path in paths)
    return replace(config, changes)


def check_no_pipe(config: RunConfig) -> None:
    """Raises: UserError for a pipe: reading it without saving it would lose the text."""
    for path in (*config.data.corpus_path, *config.data.valid_path):
        if is_pipe(path):
            raise UserError(
                f"--dry_run: {path} is a pipe, and reading it would consume the text; save the "
                "text to a file, or run without --dry_run"
            )


def _kept(path: str) -> str:
    with opened(path) as file:
        blocks = iter(lambda: file.read(_BLOCK_BYTES), b"")
        kept = keep_stream(PIPE_LABEL, blocks)
    if kept is None:
        raise UserError(f"corpus: {path} is empty; need UTF-8 text")
    return str(kept)
