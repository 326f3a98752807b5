"""Errors that a user can cause and fix. A command prints them without a traceback."""

from collections.abc import Mapping
from typing import NamedTuple


class Problem(NamedTuple):
    """One problem that the user can fix.

    where  the flag as the user types it, or the part of the program that found the problem
    what   the given value, or the mistake: "got 5", "has no effect without --resume"
    need   the values that are allowed
    fix    the action that solves the problem
    """

    where: str
    what: str
    need: str = ""
    fix: str = ""

    def __str__(self) -> str:
        """The problem as one line: `where: what, need ...; fix`."""
        needed = f", need {self.need}" if self.need else ""
        fixed = f"; {self.fix}" if self.fix else ""
        return f"{self.where}: {self.what}{needed}{fixed}"


def no_effect_without(where: str, other: str) -> Problem:
    """A flag that does nothing unless another one is given, too."""
    return Problem(where, f"has no effect without {other}", fix="add it, or leave it out")


def missing(given: Mapping[str, object]) -> list[Problem]:
    """A problem for each required flag whose value is empty."""
    return [Problem(flag, "is missing", fix="name it") for flag, one in given.items() if not one]


class UserError(ValueError):
    """One or more problems that the user can fix. Its text has one line for each of them."""

    def __init__(self, *problems: Problem | str):
        super().__init__(*problems)

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


def missing_package(where: str, package: str, extra: str) -> Problem:
    """An optional package is not installed; `extra` is the extra of cs_lm that brings it."""
    fix = f"install the extra with: pip install 'cs_lm[{extra}]'"
    return Problem(where, f"needs the package {package}", fix=fix)


class MissingError(UserError, FileNotFoundError):
    """A file that the user named does not exist."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out. torch raises a RuntimeError, without a subclass on the CPU."""
    is_cpu = "alloc" in str(error) and "memory" in str(error)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or is_cpu
