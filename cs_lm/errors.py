"""What a user can cause and mend: a command prints it as lines, without a traceback."""

from typing import NamedTuple


class Problem(NamedTuple):
    """One thing that a user has to mend.

    where  the flag as the user types it, or the part of the program that found it
    what   what was given, or what is wrong: "got 5", "has no effect without --resume"
    need   what would be right
    fix    what to do
    """

    where: str
    what: str
    need: str = ""
    fix: str = ""

    def __str__(self) -> str:
        """where: what, need what; what to do."""
        needed = f", need {self.need}" if self.need else ""
        fixed = f"; {self.fix}" if self.fix else ""
        return f"{self.where}: {self.what}{needed}{fixed}"


class UserError(ValueError):
    """Problems that a user can mend; one line each."""

    def __init__(self, *problems: Problem | str):
        super().__init__(*problems)

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class MissingError(UserError, FileNotFoundError):
    """Files that a user has named and that are not there."""
