"""Conversations, and the templates that turn them into token ids.

A template is used through two functions, which share all their code: `render` for training and
`render_for_completion` for generation. So what a model is asked at the end is exactly what it was
trained on.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from cs_lm.errors import UserError

ROLES = ("system", "user", "assistant")
USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
END_OF_TEXT = "<|endoftext|>"


class Message(NamedTuple):
    """One turn of a conversation.

    context  further material for the request, as Alpaca's "input"; empty: none
    """

    role: str
    content: str
    context: str = ""


Conversation = tuple[Message, ...]


class Rendered(NamedTuple):
    """Token ids, and for each whether it is part of an answer: its text or its end token."""

    token_ids: list[int]
    is_answer: list[bool]


class _Piece(NamedTuple):
    """Text, which is encoded without control tokens, or a single token id."""

    content: str | int
    is_answer: bool = False


class Template:
    """The base class of the templates. A subclass says what stands before and after a message.

    Raises: UserError if the tokenizer lacks a control token that the template needs.
    """

    name: str
    needs: tuple[str, ...]

    def __init__(self, tokenizer: Any):
        missing = [token for token in self.needs if token not in tokenizer.special_tokens]
        if missing:
            raise UserError(
                f"--template: {self.name} needs the special token {missing[0]}, which the "
                "tokenizer lacks; use another template, or a model that was trained with "
                f"--special_tokens {' '.join(self.needs)}"
            )
        self._tokenizer = tokenizer
        self.end_id = self._id_of(self.needs[-1])  # of an answer

    def before(self, message: Message, is_first: bool) -> list[str | int]:
        """Texts and token ids that open a message."""
        raise NotImplementedError

    def after(self, message: Message) -> list[str | int]:
        """Texts and token ids that close a message. An answer is closed by `end_id`."""
        raise NotImplementedError

    def content_of(self, message: Message) -> str:
        return f"{message.content}\n\n{message.context}" if message.context else message.content

    def render(self, conversation: Conversation) -> Rendered:
        """The whole conversation, for training."""
        check_conversation(conversation)
        return self._encoded(self._pieces(conversation))

    def render_for_completion(self, conversation: Conversation) -> list[int]:
        """The conversation up to the point where the assistant answers.

        It is a prefix of what `render` gives for the same conversation with any answer.
        Raises: UserError for a conversation that ends with an answer.
        """
        check_conversation(conversation)
        if conversation[-1].role == "assistant":
            raise UserError(
                "conversation: ends with the assistant's answer; need a last message of the user"
            )
        pieces = list(self._pieces(conversation))
        opening = self.before(Message("assistant", ""), is_first=False)
        return self._encoded([*pieces, *map(_Piece, opening)]).token_ids

    def _id_of(self, special_token: str) -> int:
        (token_id,) = self._tokenizer.encode(special_token)
        return token_id

    def _pieces(self, conversation: Conversation) -> Iterator[_Piece]:
        for place, message in enumerate(conversation):
            is_answer = message.role == "assistant"
            yield from map(_Piece, self.before(message, place == 0))
            yield _Piece(self.content_of(message), is_answer)
            for content in self.after(message):
                yield _Piece(content, is_answer)

    def _encoded(self, pieces: Sequence[_Piece] | Iterator[_Piece]) -> Rendered:
        """Neighbouring texts become one, unless an answer begins or ends between them."""
        token_ids: list[int] = []
        is_answer: list[bool] = []
        for content, answers in _joined(pieces):
            ids = [content]
            if isinstance(content, str):  # control tokens that a user typed stay text
                ids = self._tokenizer.encode(content, allowed_special=())
            token_ids += ids
            is_answer += [answers] * len(ids)
        return Rendered(token_ids, is_answer)


def _joined(pieces: Sequence[_Piece] | Iterator[_Piece]) -> Iterator[_Piece]:
    text, is_answer = "", False
    for piece in pieces:
        if isinstance(piece.content, str) and piece.is_answer == is_answer:
            text += piece.content
            continue
        if text:
            yield _Piece(text, is_answer)
        text, is_answer = "", piece.is_answer
        if isinstance(piece.content, str):
            text = piece.content
        else:
            yield piece
    if text:
        yield _Piece(text, is_answer)


class ChatTemplate(Template):
    """Each message between two control tokens: <|user|> content <|end|>.

    A system message opens with <|system|> where the tokenizer has it, and else with <|user|>.
    """

    name = "chat"
    needs = (USER, ASSISTANT, END)

    def before(self, message: Message, is_first: bool) -> list[str | int]:
        token = f"<|{message.role}|>"
        return [self._id_of(token if token in self._tokenizer.special_tokens else USER)]

    def after(self, message: Message) -> list[str | int]:
        return [self.end_id]


class AlpacaTemplate(Template):
    """Alpaca's headings as plain text; an answer ends with <|endoftext|>.

    It needs no further control token, so it works with every pretrained GPT-2.
    Source: Taori et al. 2023, Stanford Alpaca.
    """

    name = "alpaca"
    needs = (END_OF_TEXT,)

    def before(self, message: Message, is_first: bool) -> list[str | int]:
        if message.role == "assistant":
            return [_RESPONSE]
        if message.role == "system":
            return []
        opening = "" if is_first else "\n\n"
        return [opening + _alpaca_task(bool(message.context)) + _INSTRUCTION]

    def content_of(self, message: Message) -> str:
        if not message.context:
            return message.content
        return f"{message.content}\n\n### Input:\n{message.context}"

    def after(self, message: Message) -> list[str | int]:
        return [self.end_id] if message.role == "assistant" else []


_INSTRUCTION, _RESPONSE = "\n\n### Instruction:\n", "\n\n### Response:\n"


def alpaca_text(instruction: str, response: str) -> str:
    """What `AlpacaTemplate` makes of one instruction and its answer, as a text without its end."""
    return f"{_alpaca_task(False)}{_INSTRUCTION}{instruction}{_RESPONSE}{response}"


def _alpaca_task(has_input: bool) -> str:
    paired = ", paired with an input that provides further context" if has_input else ""
    return (
        f"Below is an instruction that describes a task{paired}. Write a response that "
        "appropriately completes the request."
    )


TEMPLATES = {template.name: template for template in (ChatTemplate, AlpacaTemplate)}


def template_of(tokenizer: Any, name: str = "auto") -> Template:
    """The template of that name; "auto": chat if the tokenizer has its tokens, else alpaca.

    Raises: UserError if the tokenizer lacks a control token that the template needs.
    """
    if name == "auto":
        has_all = set(ChatTemplate.needs) <= set(tokenizer.special_tokens)
        name = ChatTemplate.name if has_all else AlpacaTemplate.name
    return TEMPLATES[name](tokenizer)


def check_conversation(conversation: Conversation) -> None:
    """Raises: UserError unless user and assistant take turns, perhaps after a system message."""
    turns = conversation
    if turns and turns[0].role == "system":
        turns = turns[1:]
    if not turns:
        raise UserError("conversation: has no message of the user")
    for place, message in enumerate(turns):
        wanted = ("user", "assistant")[place % 2]
        if message.role != wanted:
            raise UserError(
                f"conversation: message {len(conversation) - len(turns) + place + 1} is of "
                f"{message.role!r}, need {wanted!r}: user and assistant take turns, after at most "
                "one system message"
            )
