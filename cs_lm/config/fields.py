"""Settings: fields of frozen dataclasses that know their flag, unit, help and choices.

Command-line flags are generated from them (flags.py), checkpoints store them as JSON.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from dataclasses import field
from typing import Any

from cs_lm.errors import Problem, UserError

MAX_COUNT = (
    1_000_000_000_000  # more than any count here can mean; any count below it is exact as a float
)


DISCRIMINATOR = "architecture"  # the key that says which of several configs was stored


def setting(
    default: Any,
    help: str,
    unit: str | None = None,
    flag: str | None = None,
    choices: tuple[str, ...] | Callable[[], tuple[str, ...]] | None = None,
) -> Any:
    """A dataclass field that becomes a command-line flag; `flag` is a second spelling.

    choices  the values that are allowed, or a function that gives them when they are needed
    """
    metadata = {"help": help, "unit": unit, "flag": flag, "choices": choices}
    return field(default=default, metadata=metadata)


def settings_of(config_class: type) -> dict[str, tuple[type, dataclasses.Field]]:
    """The flags of a config and of the configs inside it: name -> (owning class, field).

    Where one of several configs may stand, a setting that they share is the first one's.
    """
    found: dict[str, tuple[type, dataclasses.Field]] = {}
    for each in dataclasses.fields(config_class):
        inner = configs_of(typing.get_type_hints(config_class)[each.name])
        for config in inner:
            for name, setting_ in settings_of(config).items():
                found.setdefault(name, setting_)
        if not inner and each.metadata:
            found[each.name] = (config_class, each)
    return found


def configs_of(hint: Any) -> list[type]:
    """The configs that may stand for a field of this type: itself, or those registered with it."""
    if hasattr(hint, "registered"):
        return list(hint.registered.values())
    return [hint] if dataclasses.is_dataclass(hint) else []


def has_setting(config: Any, name: str) -> bool:
    """Whether a config, or one inside it, has it: not only one that could stand there."""
    names = {each.name for each in dataclasses.fields(config)}
    inner = [value for value in map(vars(config).get, names) if dataclasses.is_dataclass(value)]
    return name in names or any(has_setting(each, name) for each in inner)


def replace(config: Any, values: dict[str, Any]) -> Any:
    """A copy of a config, and of the configs inside it, with the named settings changed."""
    changes = {}
    for each in dataclasses.fields(config):
        current = getattr(config, each.name)
        if dataclasses.is_dataclass(current):
            changes[each.name] = replace(current, values)
        elif each.name in values:
            changes[each.name] = values[each.name]
    return dataclasses.replace(config, **changes)


def to_json(config: Any) -> dict[str, Any]:
    """Settings by name; where several configs may stand, `architecture` says which one does."""
    stored = {DISCRIMINATOR: config.architecture} if hasattr(config, DISCRIMINATOR) else {}
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        stored[each.name] = to_json(value) if dataclasses.is_dataclass(value) else value
    return stored


def from_json(config_class: type, stored: dict[str, Any]) -> Any:
    """The config that `to_json` wrote.

    Raises: ValueError for a setting that this version does not know, or of another type.
    """
    hints = typing.get_type_hints(config_class)
    names = {each.name for each in dataclasses.fields(config_class)}
    if not isinstance(stored, dict):
        raise UserError(f"config: got {stored!r}, need settings by name")
    if hasattr(config_class, DISCRIMINATOR):
        _, stored = _chosen([config_class], stored)
    unknown = set(stored) - names
    if unknown:
        raise UserError(
            f"config: got unknown settings {sorted(map(str, unknown))}; written by a newer version?"
        )
    values = {}
    for name, value in stored.items():
        if configs := configs_of(hints[name]):
            values[name] = from_json(_chosen(configs, value)[0], value)
            continue
        if typing.get_origin(hints[name]) is tuple:  # earlier versions had one path, or none
            value = (value,) if isinstance(value, str) else tuple(value or ())
        if not _is_of_type(value, hints[name]):
            raise UserError(f"config: got {value!r} for {name}, need {hints[name]}")
        values[name] = value
    return config_class(**values)


def _chosen(configs: list[type], stored: Any) -> tuple[type, Any]:
    """The config that stored settings are of, and the settings.

    Versions before the registry did not write which it is: then it is the first config that knows
    all the settings.
    Raises: ValueError for an architecture that is not registered.
    """
    if isinstance(stored, dict) and DISCRIMINATOR in stored:
        found = {getattr(config, DISCRIMINATOR, None): config for config in configs}
        name = stored[DISCRIMINATOR]
        if not isinstance(name, str) or name not in found:
            raise UserError(
                f"config: got the architecture {name!r}, need one of {', '.join(map(str, found))}"
            )
        return found[name], {key: value for key, value in stored.items() if key != DISCRIMINATOR}
    for config in configs:
        names = {each.name for each in dataclasses.fields(config)}
        if isinstance(stored, dict) and stored.keys() <= names:
            return config, stored
    return configs[0], stored


def _is_of_type(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_is_of_type(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(_is_of_type(one, kind) for one in value)
    if hint is float:
        return type(value) in (int, float) and value == value
    return type(value) is hint


def is_unicode(text: str) -> bool:
    """False for the lone surrogates that a terminal makes of bytes that are not UTF-8."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def not_unicode(where: str, text: str) -> Problem:
    return Problem(where, f"got {text!r}", "text that UTF-8 can hold")


def plain_type(hint: Any) -> Any:
    """The type behind `X | None`."""
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not type(None))
    return hint


def flag_of(each: dataclasses.Field) -> str:
    """The spelling used in messages: the course's where it has one."""
    return each.metadata["flag"] or f"--{each.name}"


def choices_of(each: dataclasses.Field) -> tuple[str, ...] | None:
    choices = each.metadata.get("choices")
    return choices() if callable(choices) else choices


_MINIMUM = {"keep_last": 2}  # one alone may be damaged


def not_positive(config: Any, may_be_zero: tuple[str, ...] = ()) -> list[Problem]:
    """Problems of the integers and rates that must be above (or may be at) zero."""
    found = []
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not each.metadata:
            continue
        least = 0 if each.name in may_be_zero else 1 if isinstance(value, int) else math.ulp(0.0)
        least = _MINIMUM.get(each.name, least)
        if value >= least and value < MAX_COUNT:
            continue
        need = "a number above 0" if isinstance(value, float) else f"{least} or more"
        if value >= MAX_COUNT:
            need = f"less than {MAX_COUNT:.0e}"
        found.append(Problem(flag_of(each), f"got {value}", need))
    return found


def validate_all(config: Any) -> list[Problem]:
    """What a config finds wrong with itself, and values outside their choices."""
    return config.validate() + _not_among_choices(config)


def _not_among_choices(config: Any) -> list[Problem]:
    found = []
    for each in dataclasses.fields(config):
        choices, value = choices_of(each), getattr(config, each.name)
        if dataclasses.is_dataclass(value):
            found += _not_among_choices(value)
        elif choices and value not in choices:
            found.append(Problem(flag_of(each), f"got {value!r}", f"one of {', '.join(choices)}"))
    return found
