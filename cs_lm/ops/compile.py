"""torch.compile, with a fallback to the uncompiled function."""

import logging
from collections.abc import Callable
from typing import Any

import torch

_log = logging.getLogger("cs_lm")


class CompileWithFallback:
    """The function, compiled at its first call.

    If that call fails, most often because there is no compiler, `on_failure` (default: the
    log) gets one line, and the function runs uncompiled from then on. A later compilation, of a
    backward pass, may still fail.
    """

    def __init__(
        self, function: Callable[..., Any], on_failure: Callable[[str], None] | None = None
    ):
        self._plain, self._on_failure = function, on_failure or _log.warning
        self._chosen: Callable[..., Any] = self._first_call

    def __call__(self, *arguments: Any) -> Any:
        return self._chosen(*arguments)

    def _first_call(self, *arguments: Any) -> Any:
        try:
            compiled = torch.compile(self._plain)
            result = compiled(*arguments)
        except RuntimeError as error:  # an error of the function itself is raised again below
            result = self._plain(*arguments)
            self._on_failure(
                f"--compile: torch.compile failed ({_first_line(error)}); continuing "
                f"without compilation"
            )
            compiled = self._plain
        self._chosen = compiled
        return result


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
