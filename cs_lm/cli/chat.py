"""`python -m cs_lm chat`: a conversation with a trained model on the terminal.

The template is the one that the model was fine-tuned with. A model that was never fine-tuned is
asked with control tokens if its tokenizer has them, else in plain lines, as "User: ...". With
--message, it answers once; without, you write in turns, and /new begins another conversation.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from cs_lm.cli._errors import decoded, not_empty, readable_errors
from cs_lm.cli._prompt import PromptSession, paint
from cs_lm.config.fields import is_unicode, not_unicode, setting
from cs_lm.config.flags import parse_config
from cs_lm.config.run import DTYPES
from cs_lm.config.shared import (
    checkpoint_setting,
    device_setting,
    validate_checkpoint,
    validate_run,
)
from cs_lm.device import resolve_device
from cs_lm.errors import Problem, UserError
from cs_lm.inference.decoding_config import DecodingConfig
from cs_lm.inference.generate import generate_samples
from cs_lm.inference.text import TextStream, allowed_ids, stop_ids_of
from cs_lm.serving.chat import chat_prompt, chat_template
from cs_lm.training.run_dir import RunFolder, TrainedModel, load_trained

_NEW = "/new             begins a new conversation"


@dataclass(frozen=True)
class ChatConfig:
    """A conversation."""

    out_dir: str = setting("", "folder of the run; required")
    checkpoint: str = checkpoint_setting()
    message: str | None = setting(None, "answer this, and end")
    system: str | None = setting(None, "first message, which says how to answer")
    device: str = device_setting()
    dtype: str = setting(
        "float32", "of the weights; bfloat16 is quicker and less exact", choices=DTYPES
    )
    decoding: DecodingConfig = field(default_factory=DecodingConfig)

    def validate(self) -> list[Problem]:
        found = validate_run(self.out_dir)
        for name in ("message", "system"):
            value = getattr(self, name)
            if value == "":
                found.append(Problem(f"--{name}", "is empty", "at least one character"))
            elif value is not None and not is_unicode(value):
                found.append(not_unicode(f"--{name}", value))
        for name in ("num_samples", "num_beams", "best_of", "num_alternatives"):
            if getattr(self.decoding, name) != getattr(DecodingConfig, name):
                what = "has no effect in a conversation"
                found.append(Problem(f"--{name}", what, fix="leave it out"))
        return found + validate_checkpoint(self.checkpoint) + self.decoding.validate()


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(ChatConfig, "python -m cs_lm chat", __doc__, argv)
    device = resolve_device(config.device)
    dtype = getattr(torch, config.dtype)
    trained = load_trained(RunFolder(config.out_dir), config.checkpoint, device, dtype)
    chat = Chat(trained, config.system)
    message = config.message
    if message is None and not sys.stdin.isatty():
        where = "standard input"
        message = not_empty(where, decoded(where, sys.stdin.buffer.read()).strip())
    if message is not None:
        chat.answer(message, config.decoding)
        return 0
    PromptSession(config.decoding, {"new": chat.begin}).converse(chat.answer, f"\n{_NEW}")
    return 0


class Chat:
    """The turns so far. An answer that was stopped counts up to where it came."""

    def __init__(self, trained: TrainedModel, system: str | None):
        self._trained, self._system = trained, system
        self._template = chat_template(trained.tokenizer, trained.template)
        self.begin()

    def begin(self) -> None:
        """A new conversation."""
        self._messages = [("system", self._system)] if self._system else []

    def answer(self, message: str, decoding: DecodingConfig) -> None:
        """Prints the answer while it comes.

        Raises: UserError for a message that leaves no room for an answer.
        """
        self._messages.append(("user", message))
        shown = ""
        try:
            ids, stop, room = self._fitting()
            decoding = replace(
                decoding,
                max_new_tokens=min(decoding.max_new_tokens, room),
                stop=(*decoding.stop, *stop),
            )
            tokenizer, model = self._trained.tokenizer, self._trained.model
            ends = stop_ids_of(tokenizer, decoding.stop_token)
            if self._template is not None:
                ends |= {self._template.end_id}
            size = model.config.vocab_size
            allowed = allowed_ids(tokenizer, size, decoding.allowed_characters, ends)
            stream = TextStream(tokenizer.vocab, decoding.stop)

            def show(_row: int, token_id: int) -> bool:
                nonlocal shown
                shown += _printed(stream.push(token_id))
                return stream.stopped

            (sample,) = generate_samples(model, [ids], decoding, ends, allowed, show)
            shown += _printed(stream.close())
            print(flush=True)
            if not sample.stopped:
                is_full = decoding.max_new_tokens == room
                why = "the context is full" if is_full else "more with --max_new_tokens"
                _note(f"(cut after {decoding.max_new_tokens} tokens; {why})")
        finally:
            if shown:
                self._messages.append(("assistant", shown.strip()))
            else:
                self._messages.pop()

    def _fitting(self) -> tuple[list[int], tuple[str, ...], int]:
        """The prompt, its stop texts, and the room for an answer. The oldest turns go first."""
        context = self._trained.config.model.context_length
        first = bool(self._system)
        alone = [*self._messages[:first], self._messages[-1]]
        ids, _ = chat_prompt(self._trained.tokenizer, alone, self._template)
        if len(ids) > context:  # no turn needs to be forgotten for it
            raise UserError(
                f"message: got {len(ids)} tokens with its template, need at most {context}, the "
                "model's context; shorten it"
            )
        while True:
            ids, stop = chat_prompt(self._trained.tokenizer, self._messages, self._template)
            if len(ids) <= context * 3 // 4 or len(self._messages) < first + 3:
                break
            del self._messages[first : first + 2]
            _note("(the oldest turn is forgotten)")
        return ids, stop, context + 1 - len(ids)


def _note(text: str) -> None:
    print(paint(text, "2", sys.stderr), file=sys.stderr)


def _printed(text: str) -> str:
    print(text, end="", flush=True)
    return text
