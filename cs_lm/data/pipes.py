"""Text that comes through a pipe: kept as a file first, because a run reads its text twice."""

from cs_lm.config.fields import replace
from cs_lm.config.run import RunConfig
from cs_lm.data.cache import PIPE_LABEL, keep_stream
from cs_lm.errors import UserError
from cs_lm.tokenizer.corpus_files import is_pipe
from cs_lm.tokenizer.text_source import opened

_BLOCK_BYTES = 1 << 20


def with_pipes_kept(config: RunConfig) -> RunConfig:
    """The same with files in the place of pipes: a run reads its text more than once."""
    changes = {}
    for name in ("corpus_path", "valid_path"):
        paths = getattr(config.data, name)
        if any(map(is_pipe, paths)):
            changes[name] = tuple(_kept(path) if is_pipe(path) else path for path in paths)
    return replace(config, changes)


def check_no_pipe(config: RunConfig) -> None:
    """Raises: UserError: what looks at a pipe without keeping it takes its text away."""
    for path in (*config.data.corpus_path, *config.data.valid_path):
        if is_pipe(path):
            raise UserError(
                f"--dry_run: cannot look at {path}, a pipe, without using it up; save the text to "
                "a file, or leave --dry_run out"
            )


def _kept(path: str) -> str:
    with opened(path) as file:
        blocks = iter(lambda: file.read(_BLOCK_BYTES), b"")
        kept = keep_stream(PIPE_LABEL, blocks)
    if kept is None:
        raise UserError(f"corpus: got nothing from {path}; need text")
    return str(kept)
