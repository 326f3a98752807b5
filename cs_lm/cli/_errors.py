"""Prints errors that a user can cause as lines, with exit status 2; a traceback means a bug."""

import contextlib
import functools
import io
import os
import sys
import time
from collections.abc import Callable, Sequence

from cs_lm.distributed.launch import launched
from cs_lm.errors import UserError, is_out_of_memory
from cs_lm.training.console import log_to, print_line
from cs_lm.training.signals import StopRequested, raise_on_signal

Main = Callable[[Sequence[str] | None], int]


def readable_errors(main: Main) -> Main:
    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        _show_whatever_the_console_lacks()
        try:
            with raise_on_signal(), log_to(lambda text: print_line(text, sys.stderr)):
                return main(argv)
        except BrokenPipeError:  # the reader closed the pipe, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            first_line = str(error).partition("\n")[0]
            print(
                f"error: out of memory ({first_line}); lower --batch_size (and raise "
                "--grad_accum), --seq_length or the model's size",
                file=sys.stderr,
            )
            return 2
        except (UserError, OSError, UnicodeError) as error:  # text that UTF-8 cannot hold
            print_error(error)
            return 2
        except StopRequested as stop:
            print(f"stopped by {stop}", file=sys.stderr)
            return stop.exit_status

    return guarded


def _show_whatever_the_console_lacks() -> None:
    """Prints escape codes for characters that the console cannot show, instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def decoded(where: str, content: bytes) -> str:
    """The text of what a command was given. Raises: UserError if it is not UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: is not UTF-8 at byte offset {error.start}; give a UTF-8 text"
        ) from None


def not_empty(where: str, text: str) -> str:
    """The text. Raises: UserError for an empty one."""
    if not text:
        raise UserError(f"{where}: is empty, need at least one character")
    return text


# How long other ranks than 0 wait before they print an error [s]. If rank 0 has the same one, it
# has printed it, and torchrun has ended them.
_OTHERS_WAIT_S = 3.0


def print_error(error: Exception) -> None:
    """Prints it on the error stream. Of several processes, those besides rank 0 wait first."""
    place, whose = launched(), ""
    if place is not None and place.rank > 0:
        whose = f"rank {place.rank}: "
        time.sleep(_OTHERS_WAIT_S)
    for line in str(error).splitlines():
        with contextlib.suppress(OSError):  # a closed terminal must not change the exit status
            print(f"error: {whose}{line}", file=sys.stderr, flush=True)
