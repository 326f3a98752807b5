"""Settings: fields of frozen dataclasses, each with its flag, unit, help text and choices.

`flags.py` generates the command-line flags from them. Checkpoints store them as JSON.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any

from cs_lm.errors import Problem, UserError

MAX_COUNT = 1_000_000_000_000  # above every sensible count; smaller counts are exact as a float


DISCRIMINATOR = "architecture"  # JSON key with the name of the config class


def setting(
    default: Any,
    help: str,
    unit: str | None = None,
    flag: str | None = None,
    choices: tuple[str, ...] | Callable[[], tuple[str, ...]] | None = None,
    minimum: int | None = None,
) -> Any:
    """A dataclass field that becomes a command-line flag; `flag` is a second spelling.

    choices  the allowed values, or a function that returns them, called only when they are needed
    minimum  the smallest allowed number; None: above 0
    """
    metadata = {"help": help, "unit": unit, "flag": flag, "choices": choices}
    return field(default=default, metadata={**metadata, "minimum": minimum})


def settings_of(config_class: type) -> dict[str, tuple[type, dataclasses.Field]]:
    """The settings of a config class and of its nested configs: name -> (owning class, field).

    A nested field may allow several config classes. The first class that has a setting owns it.
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
    """The config classes that a field of this type allows: itself, or all registered with it."""
    if isinstance(hint, type) and "registered" in vars(hint):
        return list(hint.registered.values())
    return [hint] if dataclasses.is_dataclass(hint) else []


def has_setting(config: Any, name: str) -> bool:
    """Whether this config, or a config that it contains now, has the setting."""
    names = {each.name for each in dataclasses.fields(config)}
    inner = [value for value in map(vars(config).get, names) if dataclasses.is_dataclass(value)]
    return name in names or any(has_setting(each, name) for each in inner)


def value_of(config: Any, name: str, otherwise: Any = None) -> Any:
    """The value of a setting of this config, or of a config that it contains now."""
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if each.name == name:
            return value
        if dataclasses.is_dataclass(value) and has_setting(value, name):
            return value_of(value, name)
    return otherwise


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
    """The settings by name; `architecture` names the config class where several are allowed."""
    stored = {DISCRIMINATOR: config.architecture} if hasattr(config, DISCRIMINATOR) else {}
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        stored[each.name] = to_json(value) if dataclasses.is_dataclass(value) else value
    return stored


def flat(stored: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of `to_json` without nesting: {"optim": {"lr": 1}} gives {"optim.lr": 1}."""
    values: dict[str, Any] = {}
    for key, value in stored.items():
        name = prefix + key
        values |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return values


def from_json(config_class: type, stored: dict[str, Any]) -> Any:
    """The config that `to_json` wrote.

    Raises: UserError for a setting that this version does not know, or a value of a wrong type.
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
        if typing.get_origin(hints[name]) is tuple:  # earlier versions stored one path or null
            value = (value,) if isinstance(value, str) else tuple(value or ())
        if not _is_of_type(value, hints[name]):
            raise UserError(f"config: got {value!r} for {name}, need {hints[name]}")
        values[name] = value
    return config_class(**values)


def _chosen(configs: list[type], stored: Any) -> tuple[type, Any]:
    """The config class of stored settings, and the settings without the class name.

    Versions before the registry did not store the class name. Then the first class that has all
    these settings is used.
    Raises: UserError for an architecture that is not registered.
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
    """False for text with lone surrogates: Python makes them from arguments that are not UTF-8."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def not_unicode(where: str, text: str) -> Problem:
    return Problem(where, f"got {text!r}", "text that UTF-8 can hold")


def plain_type(hint: Any) -> Any:
    """X for the type `X | None`; any other type unchanged."""
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not type(None))
    return hint


def flag_of(each: dataclasses.Field) -> str:
    """The spelling of the flag in messages: the course's spelling if it has one."""
    return each.metadata["flag"] or f"--{each.name}"


def choices_of(each: dataclasses.Field) -> tuple[str, ...] | None:
    choices = each.metadata.get("choices")
    return choices() if callable(choices) else choices


def not_positive(config: Any) -> list[Problem]:
    """Problems of numbers that are below their minimum (usually: not above zero) or too large."""
    found = []
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not each.metadata:
            continue
        minimum = each.metadata["minimum"]
        if minimum is None:
            minimum = 1 if isinstance(value, int) else math.ulp(0.0)
        if minimum <= value < MAX_COUNT:
            continue
        is_above = isinstance(value, float) and each.metadata["minimum"] is None
        need = "a number above 0" if is_above else f"{minimum} or more"
        if value >= MAX_COUNT:
            need = f"less than {MAX_COUNT:.0e}"
        found.append(Problem(flag_of(each), f"got {value}", need))
    return found


def validate_all(config: Any) -> list[Problem]:
    """All problems of a config: those of its `validate`, and values outside their choices."""
    return config.validate() + _not_among_choices(config)


def _not_among_choices(config: Any) -> list[Problem]:
    found = []
    for each in dataclasses.fields(config):
        choices, value = choices_of(each), getattr(config, each.name)
        if dataclasses.is_dataclass(value):
            found += _not_among_choices(value)
        elif choices and value is not None and value not in choices:
            found.append(Problem(flag_of(each), f"got {value!r}", f"one of {', '.join(choices)}"))
    return found
