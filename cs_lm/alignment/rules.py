"""Rules that score an answer, by name or from a user's own module.

    exact        1 if the answer is the record's "answer", without case and outer punctuation
    contains     1 if the record's "answer" stands in the answer
    last_number  1 if the last number is that of the record's "answer" (GSM8K)
    length       minus the number of characters: shorter is better
    module:name  a function (answer: str, fields: dict) -> float of a module that Python finds

`fields` are the keys of the prompt's record, "prompt": the last message of the user, and "ended":
whether the answer came to its end, and was not cut at its greatest length.
"""

import importlib
import math
import os
import sys
from collections.abc import Callable
from typing import Any

from cs_lm.alignment.records import Prompt
from cs_lm.errors import UserError
from cs_lm.evaluation.tasks import last_number, normalised

Rule = Callable[[str, dict[str, Any]], float]


def exact(answer: str, fields: dict[str, Any]) -> float:
    return float(normalised(answer) == normalised(_wanted(fields)))


def contains(answer: str, fields: dict[str, Any]) -> float:
    return float(normalised(_wanted(fields)) in normalised(answer))


def same_last_number(answer: str, fields: dict[str, Any]) -> float:
    found = last_number(answer)
    return float(found is not None and found == last_number(_wanted(fields)))


def shortness(answer: str, fields: dict[str, Any]) -> float:
    return -float(len(answer))


RULES: dict[str, Rule] = {
    "exact": exact,
    "contains": contains,
    "last_number": same_last_number,
    "length": shortness,
}


def rule_of(name: str, flag: str = "--rule") -> Rule:
    """The rule of that name. A module is looked for in the current folder, too.

    Raises: UserError for a name that is neither a rule nor a function of a module.
    """
    if name in RULES:
        return RULES[name]
    module_name, colon, function = name.partition(":")
    if not colon:
        raise UserError(
            f"{flag}: got {name!r}, need one of {', '.join(RULES)}, or module:function of your own"
        )
    if not all(part.isidentifier() for part in (*module_name.split("."), function)):
        raise UserError(
            f"{flag}: got {name!r}, need module:function, such as my_rules:score for the function "
            "score of my_rules.py"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module_name), function)
    except ImportError as error:
        raise UserError(f"{flag}: got {name!r}, but {error}") from None
    except (Exception, SystemExit) as error:  # the module is the user's: it may do anything
        if isinstance(error, AttributeError) and module_name in sys.modules:
            what = f"{module_name} has no {function!r}"
        else:
            what = f"importing {module_name} failed ({type(error).__name__}: {error})"
        raise UserError(f"{flag}: got {name!r}, but {what}") from None
    if not callable(found):
        raise UserError(f"{flag}: got {name!r}, which is not a function")
    return found


def score_by_rule(rule: Rule, answer: str, prompt: Prompt, ended: bool = True) -> float:
    """The score of an answer; ended  whether its end token came

    Raises: UserError, with the place of the record, for a rule that fails or gives no number.
    """
    fields = {**prompt.fields, "prompt": prompt.conversation[-1].content, "ended": ended}
    try:
        score = float(rule(answer, fields))
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{prompt.where}: the rule failed on the answer {answer[:40]!r} "
            f"({type(error).__name__}: {error})"
        ) from None
    if not math.isfinite(score):
        raise UserError(
            f"{prompt.where}: the rule gives no finite number for the answer {answer[:40]!r}"
        )
    return score


def _wanted(fields: dict[str, Any]) -> str:
    if "answer" not in fields:
        raise KeyError("the record has no 'answer'")
    return str(fields["answer"])
