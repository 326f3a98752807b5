"""Messages of a chat as a prompt."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from cs_lm.alignment.conversations import ChatTemplate, Message, Template, template_of


class ChatPrompt(NamedTuple):
    """Token ids, and the texts that end the answer."""

    token_ids: list[int]
    stop: tuple[str, ...]


def chat_template(tokenizer: Any, name: str | None = None) -> Template | None:
    """The template that a model was fine-tuned with, by its name.

    Without a name: that of the control tokens, where the tokenizer has all of them, else None.
    """
    has_control_tokens = set(ChatTemplate.needs) <= set(tokenizer.special_tokens)
    if name is None and not has_control_tokens:
        return None
    return template_of(tokenizer, name or ChatTemplate.name)


def chat_prompt(
    tokenizer: Any, messages: Sequence[tuple[str, str]], template: Template | None = None
) -> ChatPrompt:
    """The messages (role, content), then the beginning of the assistant's answer.

    Without a template it is plain text, "User: ...", as a base model may know it from its corpus.
    Control tokens inside a content stay text.
    Raises: UserError for messages that do not take turns, with a template.
    """
    if template is not None:
        conversation = tuple(Message(role, content) for role, content in messages)
        return ChatPrompt(template.render_for_completion(conversation), ())
    lines = [f"{role.capitalize()}: {content.strip()}\n" for role, content in messages]
    text = "".join(lines) + "Assistant:"
    return ChatPrompt(tokenizer.encode(text, allowed_special=()), ("\nUser:",))
