"""Answers in OpenAI's shape: whole, and piece by piece."""

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from cs_lm.serving.engine import Event
from cs_lm.serving.requests import Asked

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(status: int, message: str, field: str | None = None, code: str | None = None):
    """OpenAI's shape of an error."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def server_sent(record: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(record).encode("utf-8") + b"\n\n"


class Answers:
    """Collects the events of one request, and gives them the shape that its endpoint has."""

    def __init__(self, asked: Asked, vocab: dict[int, bytes]):
        self._asked, self._vocab = asked, vocab
        kind = "chatcmpl" if asked.is_chat else "cmpl"
        self._head = {"id": f"{kind}-{secrets.token_hex(12)}", "created": int(time.time()),
                      "model": asked.model}  # fmt: skip
        num_answers = len(asked.prompts) * asked.config.num_samples
        self._texts = [""] * num_answers
        self._reasons: list[str | None] = [None] * num_answers
        self._tokens: list[list[Event]] = [[] for _ in range(num_answers)]
        self._offsets: list[list[int]] = [[] for _ in range(num_answers)]
        self._num_tokens = 0

    @property
    def done(self) -> bool:
        return None not in self._reasons

    def usage(self) -> dict[str, int]:
        num_prompt = sum(map(len, self._asked.prompts))
        total = num_prompt + self._num_tokens
        return {"prompt_tokens": num_prompt, "completion_tokens": self._num_tokens,
                "total_tokens": total}  # fmt: skip

    def add(self, events: Sequence[Event]) -> None:
        for event in events:
            self._offsets[event.answer].append(len(self._texts[event.answer]))
            self._texts[event.answer] += event.text
            self._num_tokens += event.token_id is not None
            self._tokens[event.answer].append(event)
            if event.finish_reason is not None:
                self._reasons[event.answer] = event.finish_reason

    def whole(self) -> dict[str, Any]:
        choices = []
        for index, text in enumerate(self._texts):
            found = self._logprobs(self._tokens[index], self._offsets[index])
            choice = {"index": index, "logprobs": found, "finish_reason": self._reasons[index]}
            if self._asked.is_chat:
                message = {"role": "assistant", "content": text, "refusal": None}
                choices.append(choice | {"message": message})
            else:
                choices.append(choice | {"text": text})
        kind = "chat.completion" if self._asked.is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self.usage()}

    def first_chunks(self) -> bytes:
        """A chat's stream begins with the role of each answer."""
        if not self._asked.is_chat:
            return b""
        return b"".join(
            self._chunk(index, {"role": "assistant", "content": ""}, None, None)
            for index in range(len(self._texts))
        )

    def chunks(self, events: Sequence[Event]) -> bytes:
        """The new events as a part of the stream, one chunk each: at most one token."""
        return b"".join(map(self._chunk_of, events))

    def _chunk_of(self, event: Event) -> bytes:
        text, offset = event.text, len(self._texts[event.answer])
        self.add([event])
        found = self._logprobs([event], [offset])
        content = ({"content": text} if text else {}) if self._asked.is_chat else text
        return self._chunk(event.answer, content, found, event.finish_reason)

    def last_chunks(self) -> bytes:
        usage = b""
        if self._asked.include_usage:
            kind = "chat.completion.chunk" if self._asked.is_chat else "text_completion"
            record = {**self._head, "object": kind, "choices": [], "usage": self.usage()}
            usage = server_sent(record)
        return usage + b"data: [DONE]\n\n"

    def _chunk(self, index: int, content: Any, found: Any, reason: str | None) -> bytes:
        choice = {"index": index, "logprobs": found, "finish_reason": reason}
        if self._asked.is_chat:
            kind, choice = "chat.completion.chunk", choice | {"delta": content}
        else:
            kind, choice = "text_completion", choice | {"text": content}
        return server_sent({**self._head, "object": kind, "choices": [choice]})

    def _logprobs(self, events: Sequence[Event], offsets: Sequence[int]) -> Any:
        if self._asked.config.num_alternatives is None:
            return None
        pairs = [(e, o) for e, o in zip(events, offsets) if e.token_id is not None]
        if self._asked.is_chat:
            return {"content": [self._token(event) for event, _ in pairs], "refusal": None}
        return {
            "tokens": [self._name(event.token_id) for event, _ in pairs],
            "token_logprobs": [event.logprob for event, _ in pairs],
            "top_logprobs": [
                {self._name(i): logprob for i, logprob in reversed(event.alternatives)}
                for event, _ in pairs
            ],
            "text_offset": [offset for _, offset in pairs],
        }

    def _token(self, event: Event) -> dict[str, Any]:
        top = [self._named(i, logprob) for i, logprob in event.alternatives]
        return self._named(event.token_id, event.logprob) | {"top_logprobs": top}

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        content = self._vocab.get(token_id, b"")
        return {"token": self._name(token_id), "logprob": logprob, "bytes": list(content)}

    def _name(self, token_id: int) -> str:
        return self._vocab.get(token_id, b"").decode("utf-8", "replace")
