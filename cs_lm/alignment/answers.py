"""A model's answers to conversations."""

from dataclasses import replace
from typing import Any, NamedTuple

from cs_lm.alignment.conversations import Conversation, Template
from cs_lm.errors import UserError
from cs_lm.inference.decoding_config import DecodingConfig
from cs_lm.inference.generate import generate_samples
from cs_lm.inference.text import allowed_ids
from cs_lm.models.base import LanguageModel


class Answer(NamedTuple):
    """An answer of a model.

    ended      by its end token, and not at `max_new_tokens` or the end of the context
    token_ids  without the end token
    """

    text: str
    ended: bool
    token_ids: tuple[int, ...] = ()


def row_of(template: Template, conversation: Conversation, answer: Answer) -> list[int]:
    """The token ids of a conversation and its answer, as the model wrote them.

    A reward model scores the last one: the end token, if there is one.
    """
    end = [template.end_id] if answer.ended else []
    return [*template.render_for_completion(conversation), *answer.token_ids, *end]


class ContextFullError(UserError):
    """A conversation leaves no room for an answer."""


class Answerer:
    """Answers conversations with one model, by the template that it learnt."""

    def __init__(self, model: LanguageModel, tokenizer: Any, template: Template):
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._ends = frozenset([template.end_id])
        self._allowed = allowed_ids(tokenizer, model.config.vocab_size, None, self._ends)

    def __call__(self, conversation: Conversation, config: DecodingConfig) -> list[Answer]:
        """`config.num_samples` answers.

        Raises: ContextFullError; NotANumberError for logits that are no numbers.
        """
        ids = self._template.render_for_completion(conversation)
        room = self._model.config.context_length - len(ids)
        if room < 1:
            raise ContextFullError(f"got {len(ids)} tokens, which fill the context")
        config = replace(config, max_new_tokens=min(config.max_new_tokens, room))
        drawn = generate_samples(self._model, [ids], config, self._ends, self._allowed)
        return [
            Answer(self._tokenizer.decode(one.token_ids), one.stopped, tuple(one.token_ids))
            for one in drawn
        ]
