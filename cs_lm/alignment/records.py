"""Reads conversations, preferences, rankings and prompts from JSON and JSONL files.

    conversation  {"messages": [{"role": "user", "content": "..."}, ...]}
    instruction   {"instruction": "...", "input": "...", "output": "..."}; "input" may be missing
    pair          {"prompt": "...", "response": "..."}, or "completion" in place of "response"
    preference    {"prompt": ..., "chosen": ..., "rejected": ...}: texts, or lists of messages
    ranking       {"prompt": ..., "responses": [best, ..., worst]}, or in any order with
                  "ranks": [1, 2, 2, ...] or "scores": [0.7, 0.1, 0.1, ...]; equal ones are a tie
    prompt        {"prompt": ...}, "instruction", "question" or "messages"; a rule that scores
                  answers gets the other keys

A file is one JSON list of such objects, or one object a line. A "prompt" may be a list of messages,
too. A "question" with an "answer" is a pair. Where a record has several of these keys, its messages
are the conversation, but the prompt of answers to compare is in the first that it has of
"instruction", "prompt", "question" and "messages".
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from cs_lm.alignment.conversations import ROLES, Conversation, Message, check_conversation
from cs_lm.config.fields import is_unicode
from cs_lm.errors import UserError
from cs_lm.evaluation.tasks import files_named, text_of_file

T = TypeVar("T")
_PROMPT_KEYS = ("instruction", "prompt", "question", "messages")  # the first one counts


class Demonstration(NamedTuple):
    """A conversation that ends with an answer to learn.

    where  the file and the line or number of its record
    """

    conversation: Conversation
    where: str = ""


class Ranking(NamedTuple):
    """Answers to one prompt. ranks: 1 is the best; equal ranks are a tie."""

    prompt: Conversation
    answers: tuple[str, ...]
    ranks: tuple[int, ...]
    where: str = ""


class Prompt(NamedTuple):
    """A conversation to answer, and the other keys of its record for a rule that scores answers."""

    conversation: Conversation
    fields: dict[str, Any]
    where: str = ""


def read_demonstrations(paths: Sequence[str], flag: str = "--data") -> list[Demonstration]:
    """Raises: UserError for a missing file, or a record without an answer."""
    return _read(paths, flag, _demonstration)


def read_rankings(paths: Sequence[str], flag: str = "--data") -> list[Ranking]:
    """Preferences become rankings of two. Raises: UserError, as `read_demonstrations`."""
    return _read(paths, flag, _ranking)


def read_prompts(paths: Sequence[str], flag: str = "--prompts") -> list[Prompt]:
    """Raises: UserError for a missing file, or a record without a prompt."""
    return _read(paths, flag, _prompt)


def record_of(prompt: Prompt) -> dict[str, Any]:
    """The conversation as a JSON object, which `read_prompts` reads."""
    first = prompt.conversation[0]
    if len(prompt.conversation) > 1:
        messages = [{"role": one.role, "content": one.content} for one in prompt.conversation]
        return {"messages": messages}
    if first.context:
        return {"instruction": first.content, "input": first.context}
    return {"prompt": first.content}


def ranks_of(scores: Sequence[float]) -> list[int]:
    """The rank of each score; 1 is the highest, and equal ones are a tie."""
    rank = {value: n for n, value in enumerate(sorted(set(scores), reverse=True), start=1)}
    return [rank[value] for value in scores]


# ---- files ----


def _read(
    paths: Sequence[str], flag: str, understood: Callable[[dict[str, Any], str], T]
) -> list[T]:
    found = [
        understood(record, where)
        for path in files_named(paths, flag)
        for record, where in _records(path)
    ]
    if not found:
        raise UserError(f"{flag}: {', '.join(paths)}: holds no record, need one or more")
    return found


def _records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    text = text_of_file(path)
    if text.lstrip().startswith("["):
        for number, record in enumerate(_parsed(text, str(path)), start=1):
            yield _object(record, f"{path}, record {number}"), f"{path}, record {number}"
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() == "{" and _is_json(text):
            raise UserError(
                f"{path}: is one JSON object on many lines, need a list of records, or a record a "
                "line"
            )
        if line.strip():
            where = f"{path}, line {number}"
            yield _object(_parsed(line, where), where), where


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON ({error})") from None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{where}: got {str(record)[:40]!r}, need a JSON object")
    return record


# ---- records ----


def _demonstration(record: dict[str, Any], where: str) -> Demonstration:
    if "messages" in record:
        conversation = _messages(record["messages"], where)
        if conversation[-1].role != "assistant":
            raise UserError(f"{where}: the last message is not the assistant's; there is no answer")
        return Demonstration(conversation, where)
    prompt = _prompt_of(record, where)
    for key in ("output", "response", "completion", "answer"):
        if key in record:
            answer = _answer(record[key], f"{where}: {key}")
            return Demonstration((*prompt, Message("assistant", answer)), where)
    raise UserError(
        f"{where}: has no answer; need messages that end with the assistant's, or one of output, "
        "response, completion, answer"
    )


def _ranking(record: dict[str, Any], where: str) -> Ranking:
    if "chosen" in record or "rejected" in record:
        return _preference(record, where)
    prompt = _prompt_of(record, where)
    answers = record.get("responses")
    if not isinstance(answers, list) or len(answers) < 2:
        raise UserError(
            f"{where}: got responses {str(answers)[:40]!r}, need a list of two or more answers, or "
            "chosen and rejected"
        )
    texts = tuple(_answer(answer, f"{where}: responses") for answer in answers)
    ranks = record.get("ranks", list(range(1, len(texts) + 1)))
    if "ranks" not in record and "scores" in record:
        ranks = _ranks_from(record["scores"], len(texts), where)
    is_list = isinstance(ranks, list) and len(ranks) == len(texts)
    if not is_list or not all(type(rank) is int and rank > 0 for rank in ranks):
        raise UserError(
            f"{where}: got ranks {str(ranks)[:40]!r}, need a whole number from 1 for each of the "
            f"{len(texts)} responses"
        )
    return Ranking(prompt, texts, tuple(ranks), where)


def _ranks_from(scores: Any, count: int, where: str) -> list[int]:
    is_list = isinstance(scores, list) and len(scores) == count
    if not is_list or not all(isinstance(one, (int, float)) for one in scores):
        raise UserError(
            f"{where}: got scores {str(scores)[:40]!r}, need a number for each of the {count} "
            "responses, or ranks"
        )
    return ranks_of(scores)


def _preference(record: dict[str, Any], where: str) -> Ranking:
    for key in ("chosen", "rejected"):
        if key not in record:
            raise UserError(f"{where}: has no {key!r}, need both chosen and rejected")
    both = [record["chosen"], record["rejected"]]
    if any(key in record for key in _PROMPT_KEYS):
        prompt = _prompt_of(record, where)
        answers = tuple(_answer(each, f"{where}: chosen, rejected", prompt) for each in both)
        return Ranking(prompt, answers, (1, 2), where)
    if not all(isinstance(each, list) for each in both):
        raise UserError(f"{where}: has no prompt, and chosen and rejected are no lists of messages")
    chosen, rejected = (_messages(each, where) for each in both)
    prompt = chosen[:-1]
    if rejected[:-1] != prompt or chosen[-1].role != "assistant":
        raise UserError(f"{where}: chosen and rejected differ before their last message")
    _check(prompt, where)
    return Ranking(prompt, (chosen[-1].content, rejected[-1].content), (1, 2), where)


def _prompt(record: dict[str, Any], where: str) -> Prompt:
    fields = {key: value for key, value in record.items() if key not in _PROMPT_KEYS}
    return Prompt(_prompt_of(record, where), fields, where)


def _prompt_of(record: dict[str, Any], where: str) -> Conversation:
    """The conversation up to the answer."""
    key = next((key for key in _PROMPT_KEYS if key in record), None)
    if key is None:
        raise UserError(f"{where}: has none of {', '.join(_PROMPT_KEYS)}")
    given = record[key]
    if key == "messages" or isinstance(given, list):
        conversation = _messages(given, where)
    else:
        context = record.get("input") if key == "instruction" else None
        context = _text(context or "", f"{where}: input")
        conversation = (Message("user", _text(given, f"{where}: {key}"), context),)
    if conversation[-1].role != "user":
        raise UserError(f"{where}: the prompt does not end with a message of the user")
    _check(conversation, where)
    return conversation


def _messages(given: Any, where: str) -> Conversation:
    messages = _read_messages(given, where)
    _check(messages, where)
    return messages


def _read_messages(given: Any, where: str) -> Conversation:
    if not isinstance(given, list) or not given:
        raise UserError(f"{where}: got messages {str(given)[:40]!r}, need a list of them")
    messages = []
    for number, message in enumerate(given, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise UserError(
                f"{where}: message {number} has the role {role!r}, need one of {', '.join(ROLES)}"
            )
        content = _text(message.get("content"), f"{where}: the content of message {number}")
        messages.append(Message(role, content))
    return tuple(messages)


def _check(conversation: Conversation, where: str) -> None:
    try:
        check_conversation(conversation)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _answer(given: Any, what: str, prompt: Conversation = ()) -> str:
    """A text, or a list of messages: the assistant's, maybe after those of the prompt."""
    if not isinstance(given, list):
        return _text(given, what)
    *before, last = _read_messages(given, what)
    if last.role != "assistant":
        raise UserError(f"{what}: the last message is the {last.role}'s, need the assistant's")
    if before and tuple(before) != tuple(prompt):
        raise UserError(f"{what}: the messages before the last one are not those of the prompt")
    return last.content


def _text(given: Any, what: str) -> str:
    if not isinstance(given, str):
        raise UserError(f"{what} is {json.dumps(given)[:40]}, need a text")
    if not is_unicode(given):
        raise UserError(f"{what} holds half of a surrogate pair, which no UTF-8 text can")
    return given
