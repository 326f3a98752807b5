"""Rendered conversations as batches: padded or packed, in an order that follows from the seed."""

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cs_lm.alignment.conversations import Rendered, Template
from cs_lm.alignment.records import Demonstration
from cs_lm.errors import UserError
from cs_lm.models.base import LanguageModel, target_loss
from cs_lm.ops.reference import IGNORE_INDEX

_log = logging.getLogger("cs_lm")


class Example(NamedTuple):
    """A token sequence, and which of its tokens count in the loss."""

    inputs: list[int]
    targets: list[int]


class ExampleBatch(NamedTuple):
    """Examples in rows of T tokens, filled up at the right.

    inputs     (B, T) int64
    targets    (B, T) int64; `IGNORE_INDEX` where nothing is to be learnt
    positions  (B, T), with several examples in a row: they count from 0 in each
    mask       (B, T, T) boolean: with several examples in a row, a token sees its own only
    """

    inputs: Tensor
    targets: Tensor
    positions: Tensor | None = None
    mask: Tensor | None = None


def example_loss(model: LanguageModel, batch: ExampleBatch) -> tuple[Tensor, Tensor]:
    """The surprise of the targets: sum [nats] and count."""
    hidden = model.hidden_states(batch.inputs, batch.positions, batch.mask)
    return target_loss(model, hidden, batch.targets)


def render_all(
    demonstrations: Sequence[Demonstration],
    template: Template,
    max_tokens: int,
    learn_prompts: bool = False,
) -> list[Rendered]:
    """The demonstrations that fit, in their order; the others are counted in a warning.

    max_tokens     none is longer than this; nothing is cut
    learn_prompts  all tokens count, not those of the answers only
    Raises: UserError if none fits.
    """
    kept, too_long = [], []
    for demonstration in demonstrations:
        rendered = template.render(demonstration.conversation)
        if len(rendered.token_ids) > max_tokens:
            too_long.append((demonstration.where, len(rendered.token_ids)))
            continue
        if learn_prompts:
            rendered = Rendered(rendered.token_ids, [True] * len(rendered.token_ids))
        kept.append(rendered)
    if too_long:
        where, length = too_long[0]
        report_left_out(
            f"{len(too_long):,} of {len(demonstrations):,} conversations are longer than "
            f"{max_tokens} tokens, the first in {where} ({length})",
            some_are_left=bool(kept),
        )
    return kept


def report_left_out(found: str, some_are_left: bool, flag: str = "--data") -> None:
    """Warns of records that are too long. Raises: UserError if no others are left."""
    if not some_are_left:
        fix = "give shorter ones, or raise --seq_length where the model's context is longer"
        raise UserError(f"{flag}: {found}; {fix}")
    _log.warning("%s: %s; they are left out", flag.lstrip("-"), found)


def describe(rendered: Sequence[Rendered]) -> str:
    lengths = [len(one.token_ids) for one in rendered]
    answers = sum(sum(one.is_answer) for one in rendered)
    return (
        f"{len(lengths):,} conversations, {sum(lengths):,} tokens ({answers:,} in answers), "
        f"longest {max(lengths)}"
    )


def example_of(rendered: Rendered) -> Example:
    """The next token is the target where it belongs to an answer."""
    ids, is_answer = rendered
    targets = [i if counts else IGNORE_INDEX for i, counts in zip(ids[1:], is_answer[1:])]
    return Example(ids[:-1], targets)


def padded_batch(examples: Sequence[Example], device: torch.device | str = "cpu") -> ExampleBatch:
    """One example a row, filled up at the right; what stands there reaches no loss."""
    return _on(device, *_rows([[example] for example in examples])[:2])


def packed_batch(
    rows: Sequence[Sequence[Example]], seq_length: int, device: torch.device | str = "cpu"
) -> ExampleBatch:
    """Several examples a row. Each sees only itself, and its positions count from 0."""
    inputs, targets, positions, numbers = _rows(rows, seq_length)
    mask = numbers.unsqueeze(-1) == numbers.unsqueeze(-2)  # (B, T, T)
    return _on(device, inputs, targets, positions, mask)


def _on(device: torch.device | str, *tensors: Tensor) -> ExampleBatch:
    return ExampleBatch(*(tensor.to(device) for tensor in tensors))


def _rows(rows: Sequence[Sequence[Example]], width: int | None = None) -> tuple[Tensor, ...]:
    """inputs, targets, positions and the number of the example, each (B, T)."""
    if width is None:
        width = max(sum(len(one.inputs) for one in row) for row in rows)
    inputs = np.zeros((len(rows), width), np.int64)
    targets = np.full_like(inputs, IGNORE_INDEX)
    positions, numbers = np.zeros_like(inputs), np.full_like(inputs, -1)
    for place, row in enumerate(rows):
        start = 0
        for number, one in enumerate(row):
            own = slice(start, start + len(one.inputs))
            inputs[place, own], targets[place, own] = one.inputs, one.targets
            positions[place, own], numbers[place, own] = np.arange(len(one.inputs)), number
            start = own.stop
    return tuple(map(torch.from_numpy, (inputs, targets, positions, numbers)))


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Places for all lengths in few rows: the longest first, each where least room is left.

    Returns the numbers of the lengths in each row. No length is above the capacity.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    rows_with: dict[int, list[list[int]]] = {}  # room that is left -> rows
    rows = []
    for number in order:
        size = lengths[number]
        room = min((room for room in rows_with if room >= size), default=None)
        if room is None:
            row, room = [], capacity
            rows.append(row)
        else:
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rows_with[room]
        row.append(number)
        rows_with.setdefault(room - size, []).append(row)
    return rows


def token_rows(rendered: Sequence[Rendered], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids, filled up at the right, and which of them belong to an answer: both (B, T)."""
    ids = padded_rows([one.token_ids for one in rendered], pad_id)
    return ids, padded_rows([one.is_answer for one in rendered], False)


def padded_rows(rows: Sequence[Sequence[Any]], filling: Any = 0) -> Tensor:
    """Rows of unequal length as one tensor (B, T), filled up at the right."""
    found = torch.full((len(rows), max(map(len, rows))), filling)
    for number, row in enumerate(rows):
        found[number, : len(row)] = torch.tensor(row)
    return found


def wrapped(texts: Sequence[Sequence[int]], seq_length: int) -> tuple[Tensor, Tensor]:
    """All texts one after the other, cut into rows of `seq_length`, and the token after each.

    The last tokens, which fill no row, are dropped. Texts in one row see each other: this is
    the packing of other programs, for comparisons with them.
    Shapes: returns two of (N, T) int64
    """
    ids = torch.tensor([i for text in texts for i in text])
    count = max(0, len(ids) - 1) // seq_length
    inputs, targets = (ids[shift : shift + count * seq_length] for shift in (0, 1))
    return inputs.view(count, seq_length), targets.view(count, seq_length)


class EpochOrder:
    """Which of `count` things make up a batch: each comes once an epoch, in a new order each epoch.

    A batch may hold things of two epochs. The same seed gives the same order.
    """

    def __init__(self, count: int, batch_size: int, seed: int):
        self._count, self._batch_size, self._seed = count, batch_size, seed
        self._order = lru_cache(maxsize=2)(self._new_order)

    def _new_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, epoch)).permutation(self._count)

    def __call__(self, index: int) -> list[int]:
        """The numbers of the things in a batch."""
        places = index * self._batch_size + np.arange(self._batch_size)
        epochs, inside = np.divmod(places, self._count)
        return [int(self._order(int(e))[i]) for e, i in zip(epochs, inside)]


class ExampleBatches:
    """The batches of a run, in the order of `EpochOrder`.

    A row is an example, or a pack of examples that each see only themselves.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        pack_to: int | None = None,
    ):
        """pack_to  tokens of a row of packed examples; None: one example a row, padded"""
        self._examples, self._device, self._pack_to = examples, device, pack_to
        self._rows = [[number] for number in range(len(examples))]
        if pack_to is not None:
            self._rows = best_fit([len(one.inputs) for one in examples], pack_to)
        self._order = EpochOrder(len(self._rows), batch_size, seed)

    @property
    def num_rows(self) -> int:
        """Rows in an epoch."""
        return len(self._rows)

    def rows(self, index: int) -> list[list[int]]:
        """The numbers of the examples in each row of a batch."""
        return [self._rows[number] for number in self._order(index)]

    def __call__(self, index: int) -> ExampleBatch:
        rows = [[self._examples[number] for number in row] for row in self.rows(index)]
        if self._pack_to is None:
            return padded_batch([row[0] for row in rows], self._device)
        return packed_batch(rows, self._pack_to, self._device)
