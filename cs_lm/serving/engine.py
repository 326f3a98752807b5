"""Decodes the requests of all clients together: continuous batching on one key-value cache.

A thread of its own does all work with the model. A request joins the batch as soon as its prompt is
read, and leaves it with its last token; its neighbours never wait for it.
"""

import collections
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cs_lm.inference.decoder import CachedDecoder, TokenRows
from cs_lm.inference.decoding_config import DecodingConfig
from cs_lm.inference.sampling import (
    NOT_A_NUMBER,
    History,
    TokenLogprobs,
    sample_tokens,
    token_logprobs,
    uniform_draws,
)
from cs_lm.inference.text import TextStream, allowed_ids, stop_ids_of
from cs_lm.models.base import LanguageModel
from cs_lm.serving.chat import chat_template
from cs_lm.serving.row_cache import RowCache

_log = logging.getLogger("cs_lm")
# Requests that come together are read together: the first one waits for others this long [s].
_GATHER_S, _MOST_GATHER_S = 0.003, 0.015


class QueueFullError(Exception):
    """More requests wait than the server allows."""


class EngineStoppedError(Exception):
    """The server ends."""


class Event(NamedTuple):
    """What is new in one answer of a request.

    text           text that is certain by now
    token_id       the new token; None where only the end of the answer is new
    logprob        of the token [nats]; None unless asked for
    alternatives   the most likely ids with their log-probabilities; empty unless asked for
    finish_reason  "stop", "length", or "error" with the message as text; None: it goes on
    status         HTTP status of an error
    """

    answer: int
    text: str
    token_id: int | None = None
    logprob: float | None = None
    alternatives: Sequence[tuple[int, float]] = ()
    finish_reason: str | None = None
    status: int | None = None


@dataclass(eq=False)
class Job:
    """A request: prompts, with `config.num_samples` answers each, consecutive.

    emit       called in the engine's thread with lists of events
    timeout_s  time from now [s]; then the answers end with an error
    cancelled  set it, and the answers stop within a token
    """

    prompts: list[list[int]]
    config: DecodingConfig
    emit: Callable[[list[Event]], None]
    timeout_s: float = float("inf")
    cancelled: bool = False

    def __post_init__(self):
        self.deadline = time.monotonic() + self.timeout_s

    @property
    def num_rows(self) -> int:
        return len(self.prompts) * self.config.num_samples


@dataclass(eq=False)
class _Row:
    """One answer that is being decoded."""

    job: Job
    answer: int
    token_ids: list[int]  # of the prompt and the answer
    num_prompt: int
    uniform: Tensor
    stream: TextStream
    events: list[Event] = field(default_factory=list)
    done: bool = False

    @property
    def num_new(self) -> int:
        return len(self.token_ids) - self.num_prompt


class Engine:
    """Answers jobs with one model. `start` starts its thread, `stop` ends it.

    max_rows   answers that are decoded at the same time
    max_queue  jobs that may wait for their turn
    template   name of the template that the model was fine-tuned with; None: it was not, or its
               tokenizer tells
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Any,
        max_rows: int = 16,
        max_queue: int = 64,
        template: str | None = None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.template = chat_template(tokenizer, template)
        self.max_rows, self._max_queue = max_rows, max_queue
        self._cache = RowCache(model, max_rows)
        self._rows: list[_Row] = []
        self._waiting: collections.deque[Job] = collections.deque()
        self._num_joining = 0  # rows of jobs that left the queue, and are not among the rows yet
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        ends = frozenset() if self.template is None else frozenset([self.template.end_id])
        self._stop_ids = stop_ids_of(tokenizer, ()) | ends
        size = model.config.vocab_size
        self._device = model.output_embedding.device
        self._allowed = allowed_ids(tokenizer, size, None, self._stop_ids).to(self._device)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; jobs that are not done end with an error."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def submit(self, job: Job) -> None:
        """Raises: QueueFullError, EngineStoppedError."""
        with self._changed:
            if self._stopped:
                raise EngineStoppedError
            waiting = [*self._waiting, job]
            if len(waiting) - self._num_that_fit(waiting) > self._max_queue:
                raise QueueFullError
            self._waiting.append(job)
            self._changed.notify()

    def _num_that_fit(self, jobs: Sequence[Job]) -> int:
        """How many of the first jobs find free rows at once."""
        free = self.max_rows - len(self._rows) - self._num_joining
        sums = itertools.accumulate(job.num_rows for job in jobs)
        return sum(1 for _ in itertools.takewhile(lambda taken: taken <= free, sums))

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_active(self) -> int:
        return len(self._rows)

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            self._wait_for_work()
            if self._stopped:
                break
            jobs = self._next_jobs()
            try:
                self._admit(jobs)
                if self._rows:
                    self._decode()
            except Exception:  # a bug, or memory that ran out: these jobs fail, the server lives
                _log.exception("the engine failed; its requests end with an error")
                self._num_joining = 0
                self._fail([*{row.job for row in self._rows}, *jobs], "the server failed", 500)
                self._rows.clear()
                self._cache = RowCache(self.model, self.max_rows)
        waiting = [*{row.job for row in self._rows}, *self._waiting]
        if waiting := [job for job in waiting if not job.cancelled]:
            _log.warning("%d requests end with an error: the server stops", len(waiting))
        self._fail(waiting, "the server stops", 503)

    def _wait_for_work(self) -> None:
        with self._changed:
            while not (self._waiting or self._rows or self._stopped):
                self._changed.wait()
            if self._rows or self._stopped:
                return
            # idle until now: requests that come together are read together
            end = time.monotonic() + _MOST_GATHER_S
            while time.monotonic() < end and self._changed.wait(_GATHER_S):
                pass

    def _next_jobs(self) -> list[Job]:
        """The waiting jobs for which there is room, in their order."""
        with self._changed:
            self._fail_late({*self._waiting})
            self._waiting = collections.deque(job for job in self._waiting if not job.cancelled)
            jobs = [self._waiting.popleft() for _ in range(self._num_that_fit(self._waiting))]
            self._num_joining = sum(job.num_rows for job in jobs)
        return jobs

    def _admit(self, jobs: Sequence[Job]) -> None:
        """Reads the prompts of the jobs in one batch, and adds a row for each answer."""
        prompts = [(job, number) for job in jobs for number in range(len(job.prompts))]
        if not prompts:
            return
        ids = [job.prompts[number] for job, number in prompts]
        decoder = CachedDecoder(self.model, TokenRows(ids, 0, self._device), 0, 1)
        logits = decoder.logits()
        new_rows, sources = [], []
        for source, (job, number) in enumerate(prompts):
            config = job.config
            answers = range(number * config.num_samples, (number + 1) * config.num_samples)
            draws = uniform_draws(config.seed, answers, config.max_new_tokens)
            for answer, uniform in zip(answers, draws, strict=True):
                self._cache.add(decoder.cache, source, len(ids[source]))
                stream = TextStream(self.tokenizer.vocab, config.stop)
                row = _Row(job, answer, list(ids[source]), len(ids[source]), uniform, stream)
                new_rows.append(row)
                sources.append(source)
        with self._changed:
            self._rows += new_rows
            self._num_joining = 0
        self._sample(new_rows, logits[sources])

    def _decode(self) -> None:
        """One more token for each row."""
        self._fail_late({row.job for row in self._rows if not row.done})
        self._remove_rows()
        if self._rows:
            logits = self._cache.step([row.token_ids[-1] for row in self._rows])
            self._sample(self._rows, logits)
            self._remove_rows()

    def _remove_rows(self) -> None:
        for place in reversed(range(len(self._rows))):
            if self._rows[place].done or self._rows[place].job.cancelled:
                self._cache.remove(place)
                self._rows[place] = self._rows[-1]
                self._rows.pop()

    def _sample(self, rows: Sequence[_Row], logits: Tensor) -> None:
        """Draws a token for each row, and tells the jobs. Rows with the same settings go together.

        Shapes: logits (n, V), in the order of the rows
        """
        groups: dict[tuple[DecodingConfig, int], list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault(_group_of(row), []).append(place)
        for (config, _), places in groups.items():
            own = [rows[place] for place in places]
            self._sample_group(own, logits if len(groups) == 1 else logits[places], config)
        for job in {row.job for row in rows}:
            events = [event for row in rows if row.job is job for event in row.events]
            if events and not job.cancelled:
                job.emit(events)
        for row in rows:
            row.events.clear()

    def _sample_group(self, rows: list[_Row], logits: Tensor, config: DecodingConfig) -> None:
        uniform = torch.stack([row.uniform[row.num_new] for row in rows]).to(self._device)
        history = _history(rows, config, self._device)
        chosen = sample_tokens(logits, history, config, uniform, self._allowed)
        found = None
        if config.num_alternatives is not None:
            found = token_logprobs(logits, chosen.clamp(min=0), config.num_alternatives)
            found = TokenLogprobs(*(x.tolist() for x in found))
        for place, (row, token_id) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            if token_id == NOT_A_NUMBER:
                self._fail([row.job], "the model's logits are not numbers", 500)
            elif token_id < 0 or token_id in self._stop_ids:
                self._end(row, "stop")
            else:
                self._push(row, token_id, found, place)

    def _push(self, row: _Row, token_id: int, found: TokenLogprobs | None, place: int) -> None:
        row.token_ids.append(token_id)
        logprob, alternatives = None, ()
        if found is not None:
            logprob = found.chosen[place]
            alternatives = tuple(zip(found.top_ids[place], found.top[place]))
        text = row.stream.push(token_id)
        row.events.append(Event(row.answer, text, token_id, logprob, alternatives))
        if row.stream.stopped:
            self._end(row, "stop")
        elif row.num_new == row.job.config.max_new_tokens:
            self._end(row, "length")

    def _end(self, row: _Row, reason: str) -> None:
        row.done = True
        row.events.append(Event(row.answer, row.stream.close(), finish_reason=reason))

    def _fail_late(self, jobs: set[Job]) -> None:
        now = time.monotonic()
        for job in jobs:
            if not job.cancelled and now > job.deadline:
                message = f"the request took longer than {job.timeout_s:g} s, which is the limit"
                self._fail([job], message, 504)

    def _fail(self, jobs: Sequence[Job], message: str, status: int) -> None:
        """Ends the jobs with an error; their rows leave the batch before the next token."""
        for job in jobs:
            job.emit([Event(0, message, finish_reason="error", status=status)])
            job.cancelled = True


def _group_of(row: _Row) -> tuple[DecodingConfig, int]:
    """Rows of one group are sampled together: what the choice of a token depends on, but the draw.

    Where a filter looks at the answer so far, its length belongs to it.
    """
    config = replace(row.job.config, max_new_tokens=1, seed=0, stop=(), num_samples=1)
    return config, row.num_new if _looks_back(config) else 0


def _looks_back(config: DecodingConfig) -> bool:
    penalties = config.frequency_penalty or config.presence_penalty
    return bool(config.repetition_penalty != 1.0 or config.no_repeat_ngram is not None or penalties)


def _history(rows: Sequence[_Row], config: DecodingConfig, device: torch.device) -> History:
    """The tokens of rows with equally long answers, if one of the filters looks at them."""
    if not _looks_back(config):
        nothing = torch.zeros(len(rows), 0, dtype=torch.int64, device=device)
        return History(nothing, nothing, 0)
    longest = max(len(row.token_ids) for row in rows)
    padding = [longest - len(row.token_ids) for row in rows]
    ids = [[row.token_ids[0]] * n + row.token_ids for row, n in zip(rows, padding)]
    ids, padding = torch.tensor(ids, device=device), torch.tensor(padding, device=device)
    return History(ids, padding, longest - rows[0].num_new)
