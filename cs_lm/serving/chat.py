"""Messages of a chat as a prompt."""

from collections.abc import Sequence
from typing import Any, NamedTuple

ROLES = ("system", "user", "assistant")


class ChatPrompt(NamedTuple):
    """Token ids, and the texts that end the answer."""

    token_ids: list[int]
    stop: tuple[str, ...]


def chat_prompt(tokenizer: Any, messages: Sequence[tuple[str, str]]) -> ChatPrompt:
    """The messages (role, content), then the beginning of the assistant's answer.

    With special tokens named after the roles, <|user|> and so on, each message is its token, the
    content and, where the tokenizer has it, <|end|>. Otherwise it is plain text, "User: ...", as a
    base model may know it from its corpus. Control tokens inside a content stay text.
    """
    special = set(tokenizer.special_tokens)
    if {f"<|{role}|>" for role in ("user", "assistant")} <= special:
        ids: list[int] = []
        for role, content in messages:
            token = f"<|{role}|>" if f"<|{role}|>" in special else "<|user|>"
            ids += tokenizer.encode(token)
            ids += tokenizer.encode(content, allowed_special=())
            ids += tokenizer.encode("<|end|>") if "<|end|>" in special else []
        return ChatPrompt(ids + tokenizer.encode("<|assistant|>"), ())
    lines = [f"{role.capitalize()}: {content.strip()}\n" for role, content in messages]
    text = "".join(lines) + "Assistant:"
    return ChatPrompt(tokenizer.encode(text, allowed_special=()), ("\nUser:",))
