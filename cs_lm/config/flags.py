"""Generates command-line flags from the fields of a config, and reads them back into a config.

Values are converted after all flags are read, so that one error reports every wrong value.
"""

import argparse
import difflib
import re
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any

from cs_lm.config.fields import (
    choices_of,
    flag_of,
    has_setting,
    plain_type,
    replace,
    settings_of,
    validate_all,
    value_of,
)
from cs_lm.errors import Problem, UserError


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError and proposes the nearest flag."""

    def __init__(self, **kwargs):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
        )

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(Problem(self.prog, message, fix="see --help"))

    def parse_strictly(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The values of the given flags.

        Raises: UserError for each unknown flag, with the nearest known one, and for each flag that
        is given twice.
        """
        words = self._with_dashed_values(list(sys.argv[1:] if argv is None else argv))
        namespace, unknown = self.parse_known_args(words)
        problems = self._given_twice(words)
        if unknown:
            problems += self._unknown_flags(unknown)
        if problems:
            raise UserError(*problems)
        for name, value in vars(namespace).items():
            setattr(namespace, name, _with_two_dashes(value))
        return namespace

    def _with_dashed_values(self, words: list[str]) -> list[str]:
        """The words, with values that begin with a dash joined to their flag: `--flag=-value`.

        argparse would take such a value for a flag. A word that looks like a long flag stays
        separate if it is similar to a known flag or follows a list flag: it is reported as unknown.
        """
        joined: list[str] = []
        flag = None  # the flag that the next words may belong to
        for word in words:
            is_value = not word.startswith("-") or not self._may_be_flag(word, flag)
            follows_joined = joined and flag is not None and joined[-1].startswith(f"{flag}=")
            if flag is not None and is_value and (word.startswith("-") or follows_joined):
                if joined[-1] == flag:
                    joined.pop()
                joined.append(f"{flag}={_TWO_DASHES if word == '--' else word}")
            else:
                joined.append(word)
            action = self._option_string_actions.get(word)
            if action is not None:
                flag = word if action.nargs != 0 else None
            elif not is_value or (
                flag is not None and not _is_list(self._option_string_actions[flag])
            ):
                flag = None
        return joined

    def _may_be_flag(self, word: str, behind: str | None) -> bool:
        """Whether a word is meant as a flag.

        behind  the flag that the word may be a value of; a list accepts no word like a long flag
        """
        name = word.partition("=")[0]
        if name in self._option_string_actions:
            return True
        is_long = re.fullmatch(r"--[a-zA-Z][\w-]*", name) is not None
        if behind is not None and _is_list(self._option_string_actions[behind]):
            return is_long
        return is_long and bool(difflib.get_close_matches(name, self._option_string_actions, n=1))

    def _given_twice(self, words: list[str]) -> list[Problem]:
        given: dict[str, list[str]] = {}
        for word in words:
            name = word.partition("=")[0]
            action = self._option_string_actions.get(name)
            if action is not None and not _is_list(action) and action.dest != "help":
                given.setdefault(action.dest, []).append(name)
        return [
            Problem(
                names[0],
                f"is given {len(names)} times ({', '.join(names)})",
                fix="give it once",
            )
            for names in given.values()
            if len(names) > 1
        ]

    def _unknown_flags(self, unknown: list[str]) -> list[Problem]:
        flags = [word.split("=")[0] for word in unknown if word.startswith("-")]
        if not flags:
            what = f"got {' '.join(unknown)!r}, which belongs to no flag"
            return [Problem(self.prog, what, fix="see --help")]
        problems = []
        for flag in flags:
            nearest = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else "see --help"
            problems.append(Problem(flag, "unknown flag", fix=hint))
        return problems


# Replaces the value `--`, because argparse would drop it.
_TWO_DASHES = "\0--"


def _with_two_dashes(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_two_dashes(one) for one in value]
    return "--" if value == _TWO_DASHES else value


def _is_list(action: argparse.Action) -> bool:
    return action.nargs in ("*", "+")


def add_flags(parser: argparse.ArgumentParser, config_class: type) -> None:
    """Adds one flag per setting of the config. A flag that is not given sets no attribute."""
    groups = {}
    defaults = config_class()
    for name, (owner, each) in settings_of(config_class).items():
        if owner not in groups:
            title = (owner.__doc__ or "").strip().rstrip(".")
            if title.startswith(f"{owner.__name__}("):  # the automatic docstring of a dataclass
                title = "settings"
            groups[owner] = parser.add_argument_group(title)
        spellings = [s for s in (each.metadata["flag"], f"--{name}") if s]
        kind = plain_type(typing.get_type_hints(owner)[name])
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = _metavar(kind, choices_of(each))
            if typing.get_origin(kind) is tuple:
                options.update(action="extend", nargs="*" if each.default else "+")
        groups[owner].add_argument(
            *spellings, help=_help(each, value_of(defaults, name, each.default)), **options
        )


def read_flags(
    namespace: argparse.Namespace, config_class: type
) -> tuple[dict[str, Any], list[Problem]]:
    """The values of the given flags, and a problem for each value that cannot be converted."""
    values, problems = {}, []
    for name, (owner, each) in settings_of(config_class).items():
        if not hasattr(namespace, name):
            continue
        kind = plain_type(typing.get_type_hints(owner)[name])
        try:
            values[name] = _convert(getattr(namespace, name), kind)
        except ValueError as error:
            problems.append(Problem(flag_of(each), *error.args))
    return values, problems


def config_from_flags(
    base: Any,
    namespace: argparse.Namespace,
    more_problems: Callable[[Any], list[Problem]] | None = None,
) -> Any:
    """The base config, changed by the given flags.

    more_problems  finds problems that `validate` of the config cannot find
    Raises: UserError with every wrong value and every problem of the result, one per line.
    """
    values, problems = read_flags(namespace, type(base))
    config = replace(base, values)
    problems += [
        Problem(flag_of(each), f"has no effect with --model {base.model_name}", fix="leave it out")
        for name, (_, each) in settings_of(type(base)).items()
        if name in values and not has_setting(base, name)
    ]
    problems += validate_all(config)
    if more_problems is not None:
        known = {problem.where for problem in problems}
        problems += [problem for problem in more_problems(config) if problem.where not in known]
    if problems:
        raise UserError(*problems)
    return config


def parse_config(
    config_class: type, prog: str, description: str, argv: Sequence[str] | None
) -> Any:
    """A command's config from its arguments.

    Raises: UserError with all problems, one per line.
    """
    parser = FlagParser(prog=prog, description=description)
    add_flags(parser, config_class)
    return config_from_flags(config_class(), parser.parse_strictly(argv))


def _metavar(kind: Any, choices: tuple[str, ...] | None) -> str:
    if choices:
        return "{" + ",".join(choices) + "}"
    if typing.get_origin(kind) is tuple:
        return typing.get_args(kind)[0].__name__.upper()
    return kind.__name__.upper()


def _help(each, default: Any) -> str:
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    unit = f" [{each.metadata['unit']}]" if each.metadata["unit"] else ""
    shown = f"{each.metadata['help']}{unit}"
    if default not in (None, "") and not isinstance(default, bool):
        shown += f" (default: {default})"
    elif isinstance(default, bool):
        shown += f" (default: {'on' if default else 'off'})"
    return shown.replace("%", "%%")


def _convert(given: Any, kind: Any) -> Any:
    """The value as this type. Raises: ValueError(the given value, the needed kind of value)."""
    if typing.get_origin(kind) is tuple:
        return tuple(_convert(one, typing.get_args(kind)[0]) for one in given)
    if kind is bool or kind is str:
        return given
    try:
        value = kind(given)
    except ValueError:
        what = {int: "a whole number", float: "a number"}[kind]
        raise ValueError(f"got {given!r}", what) from None
    if value != value:
        raise ValueError(f"got {given!r}", "a number")
    return value
