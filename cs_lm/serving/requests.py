"""What a client may ask: the bodies of OpenAI's endpoints, checked field by field."""

import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from cs_lm.alignment.conversations import ROLES
from cs_lm.errors import UserError
from cs_lm.inference.decoding_config import FILTERS, DecodingConfig
from cs_lm.serving.chat import chat_prompt

MOST_STOPS, MOST_LOGPROBS, MOST_PROMPTS = 4, 20, 16
# Fields that have no effect here; a client library may send them.
_IGNORED = ("user", "metadata", "store", "service_tier", "parallel_tool_calls")
# Fields whose only allowed values are those that ask for nothing.
_OFF = {
    "echo": (False, None),
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
}
_ABOVE_0, _NO_LIMIT = math.ulp(0.0), 1 << 31
# what it must be, and the bounds; the names are those of DecodingConfig
_NUMBERS = {
    "temperature": (float, 0.0, 2.0),
    "top_p": (float, _ABOVE_0, 1.0),
    "frequency_penalty": (float, -2.0, 2.0),
    "presence_penalty": (float, -2.0, 2.0),
    "seed": (int, -(1 << 63), (1 << 63) - 1),
    # ours beyond theirs
    "top_k": (int, 1, _NO_LIMIT),
    "min_p": (float, 0.0, 1.0),
    "typical_p": (float, _ABOVE_0, 1.0),
    "repetition_penalty": (float, 0.01, 100.0),
    "no_repeat_ngram": (int, 1, _NO_LIMIT),
}


class RequestError(Exception):
    """A request that cannot be answered: HTTP status, message, and the field that is wrong."""

    def __init__(self, status: int, message: str, field: str | None = None, code=None):
        super().__init__(message)
        self.status, self.field, self.code = status, field, code


class Asked(NamedTuple):
    """A checked request. prompts: token ids"""

    is_chat: bool
    model: str
    prompts: list[list[int]]
    config: DecodingConfig
    stream: bool
    include_usage: bool


def parse_json(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise RequestError(400, "the body is not a JSON object")
    return content


def parse_request(
    content: Mapping[str, Any], models: Mapping[str, Any], is_chat: bool, max_rows: int
) -> Asked:
    """The request of a client, with defaults filled in.

    models  name -> object with `tokenizer` and `model`
    Raises: RequestError
    """
    name = content.get("model")
    if name is None:
        known = ", ".join(models)
        raise RequestError(400, f"model: is missing, need one of {known}", "model")
    if not isinstance(name, str) or name not in models:
        known = ", ".join(models)
        raise RequestError(
            404, f"model: got {name!r}, need one of {known}", "model", "model_not_found"
        )
    served = models[name]
    taken = {"model", "stream", "stream_options", "stop", "n", "logprobs", *_NUMBERS, *_OFF}
    of_chat, of_text = {"messages", "max_completion_tokens", "top_logprobs"}, {"prompt", "best_of"}
    taken |= {"max_tokens", *_IGNORED} | (of_chat if is_chat else of_text)
    unknown = sorted(set(content) - taken)
    if unknown:
        raise RequestError(400, f"{unknown[0]}: unknown field", unknown[0], "unknown_parameter")
    for field, allowed in _OFF.items():
        if field in content and content[field] not in allowed:
            raise RequestError(400, f"{field}: is not supported by this server", field)
    prompts, stop = _chat(content, served) if is_chat else (_prompts(content, served), ())
    settings = dict(_numbers(content))
    num_samples = _whole(content, "n", 1, 1, 128)
    best_of = None if is_chat else _whole(content, "best_of", None, 1, 128)
    if best_of not in (None, num_samples):
        raise RequestError(400, "best_of: is not supported, except equal to n", "best_of")
    if (num_rows := len(prompts) * num_samples) > max_rows:
        message = (
            f"n: {len(prompts)} prompts with {num_samples} answers each are {num_rows} answers, "
            f"need at most {max_rows} in one request"
        )
        raise RequestError(400, message, "n" if num_samples > 1 else "prompt")
    config = DecodingConfig(
        **{"temperature": 1.0, "seed": secrets.randbits(62), **settings},
        max_new_tokens=_max_tokens(content, prompts, served, is_chat),
        num_samples=num_samples,
        stop=(*_stop(content), *stop),
        num_alternatives=_num_alternatives(content, is_chat),
    )
    if config.temperature == 0:  # where the filters have no effect
        config = replace(config, **dict.fromkeys(FILTERS))
    options = content.get("stream_options") or {}
    if not isinstance(options, dict):
        raise RequestError(400, "stream_options: need an object", "stream_options")
    include_usage, stream = bool(options.get("include_usage", False)), _flag(content, "stream")
    if options and not stream:
        raise RequestError(400, "stream_options: needs stream: true", "stream_options")
    return Asked(is_chat, name, prompts, config, stream, include_usage)


def _prompts(content: Mapping[str, Any], served: Any) -> list[list[int]]:
    given = content.get("prompt")
    several = isinstance(given, list) and given and isinstance(given[0], (str, list))
    prompts = given if several else [given]
    if len(prompts) > MOST_PROMPTS:
        message = f"prompt: got {len(prompts)}, need at most {MOST_PROMPTS}"
        raise RequestError(400, message, "prompt")
    return [_ids(prompt, served) for prompt in prompts]


def _ids(prompt: Any, served: Any) -> list[int]:
    size = served.model.config.vocab_size
    if isinstance(prompt, str):
        ids = served.tokenizer.encode(_unicode(prompt, "prompt"))
    elif isinstance(prompt, list) and all(
        isinstance(i, int) and not isinstance(i, bool) and 0 <= i < size for i in prompt
    ):
        ids = prompt
    else:
        raise RequestError(400, f"prompt: need text, or token ids from 0 to {size - 1}", "prompt")
    if not ids:
        raise RequestError(400, "prompt: is empty, need at least one token", "prompt")
    return ids


def _chat(content: Mapping[str, Any], served: Any) -> tuple[list[list[int]], tuple[str, ...]]:
    messages = content.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError(400, "messages: need a list of at least one message", "messages")
    checked = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or message.get("role") not in (*ROLES, "developer"):
            raise RequestError(400, f"{where}: need a role, one of {', '.join(ROLES)}", "messages")
        role = "system" if message["role"] == "developer" else message["role"]
        checked.append((role, _unicode(_text(message.get("content"), where), "messages")))
    try:
        prompt = chat_prompt(served.tokenizer, checked, served.template)
    except UserError as error:
        raise RequestError(400, f"messages: {error}", "messages") from None
    return [prompt.token_ids], prompt.stop


def _text(content: Any, where: str) -> str:
    """A content: text, or a list of parts of type text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        return "".join(part["text"] for part in content)
    raise RequestError(400, f"{where}: need content that is text", "messages")


def _unicode(text: str, field: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(400, f"{field}: has half of a surrogate pair", field) from None
    return text


def _numbers(content: Mapping[str, Any]):
    for field, (kind, low, high) in _NUMBERS.items():
        value = content.get(field)
        if value is None:
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not _is_finite(value) or (kind is int and value != int(value)):
            what = "a whole number" if kind is int else "a number"
            raise RequestError(400, f"{field}: got {_shown(value)}, need {what}", field)
        if not low <= value <= high:
            raise RequestError(
                400, f"{field}: got {_shown(value)}, need {_range(low, high)}", field
            )
        if field == "seed":
            yield field, int(value) % (1 << 62)
        elif field == "min_p":
            yield field, float(value) or None
        elif field in ("top_p", "typical_p"):
            yield field, None if value == 1 else float(value)
        elif field == "temperature":
            yield field, 0.0 if value < 1e-6 else float(value)
        else:
            yield field, kind(value)


def _whole(content: Mapping[str, Any], field: str, default, low: int, high: int):
    value = content.get(field)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(400, f"{field}: got {_shown(value)}, need {_range(low, high)}", field)
    return value


def _range(low: float, high: float) -> str:
    if high == _NO_LIMIT:
        return f"{low} or more"
    return f"above 0, at most {high}" if low == _ABOVE_0 else f"{low} to {high}"


def _is_finite(value: int | float) -> bool:
    return isinstance(value, int) or math.isfinite(value)


def _shown(value: Any) -> str:
    """A value in a message, without the end of a long one; Python refuses to write long numbers."""
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "a number of more than 19 digits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _flag(content: Mapping[str, Any], field: str) -> bool:
    value = content.get(field)
    if value not in (None, True, False):
        raise RequestError(400, f"{field}: got {value!r}, need true or false", field)
    return bool(value)


def _stop(content: Mapping[str, Any]) -> tuple[str, ...]:
    stop = content.get("stop")
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(one, str) and one for one in stop):
        raise RequestError(400, "stop: need a text, or a list of texts", "stop")
    if len(stop) > MOST_STOPS:
        raise RequestError(400, f"stop: got {len(stop)} texts, need at most {MOST_STOPS}", "stop")
    return tuple(_unicode(one, "stop") for one in stop)


def _num_alternatives(content: Mapping[str, Any], is_chat: bool) -> int | None:
    if not is_chat:
        return _whole(content, "logprobs", None, 0, MOST_LOGPROBS)
    top = _whole(content, "top_logprobs", None, 0, MOST_LOGPROBS)
    if _flag(content, "logprobs"):
        return top or 0
    if top is not None:
        raise RequestError(400, "top_logprobs: needs logprobs: true", "top_logprobs")
    return None


def _max_tokens(content, prompts, served: Any, is_chat: bool) -> int:
    context = served.model.config.context_length
    room = context - max(map(len, prompts))
    field = "max_tokens"
    if is_chat and content.get("max_completion_tokens") is not None:
        field = "max_completion_tokens"
    # a chat answers as long as it likes, a completion 16 tokens, as OpenAI's
    asked = _whole(content, field, None, 1, _NO_LIMIT)
    wanted = asked if asked is not None else max(1, room) if is_chat else min(16, max(1, room))
    if wanted > room:
        is_long = room < 1
        raise RequestError(
            400,
            f"this model's context is {context} tokens; the prompt has {context - room}, and "
            f"{wanted} were asked for: "
            + ("shorten the prompt" if is_long else f"need {field} of at most {room}"),
            ("messages" if is_chat else "prompt") if is_long else field,
            "context_length_exceeded",
        )
    return wanted
