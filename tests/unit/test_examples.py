"""Batches of conversations: padding, packing, isolation."""

import pytest
import torch

from cs_lm.alignment.conversations import ChatTemplate, Message
from cs_lm.alignment.examples import (
    ExampleBatches,
    best_fit,
    describe,
    example_loss,
    example_of,
    packed_batch,
    padded_batch,
    render_all,
)
from cs_lm.alignment.records import Demonstration
from cs_lm.config.model import GPT2Config, ModelConfig
from cs_lm.errors import UserError
from cs_lm.models.registry import build_model
from cs_lm.ops.fused import OPS
from cs_lm.ops.reference import IGNORE_INDEX
from cs_lm.training.step import accumulate_gradients
from tests.unit.test_conversations import TOKENIZER

TEMPLATE = ChatTemplate(TOKENIZER)


def demonstrations(lengths):
    return [
        Demonstration((Message("user", "Q" * n), Message("assistant", "A" * n)), f"line {n}")
        for n in lengths
    ]


def examples(lengths=(1, 9, 4, 20, 2, 7, 3)):
    return [example_of(one) for one in render_all(demonstrations(lengths), TEMPLATE, 60)]


@pytest.fixture(params=[ModelConfig, GPT2Config])
def model(request):
    config = request.param(16, 2, 24, 300, 2, 64)
    return build_model(config, generator=torch.Generator().manual_seed(1))


def test_only_answers_count():
    (rendered,) = render_all(demonstrations([2]), TEMPLATE, 60)
    inputs, targets = example_of(rendered)
    counted = [target for target in targets if target != IGNORE_INDEX]
    assert TOKENIZER.decode(inputs) == "<|user|>QQ<|end|><|assistant|>AA"
    assert TOKENIZER.decode(counted) == "AA<|end|>"
    (all_of_it,) = render_all(demonstrations([2]), TEMPLATE, 60, learn_prompts=True)
    assert example_of(all_of_it).targets == rendered.token_ids[1:]


def test_too_long_ones_are_reported(caplog):
    kept = render_all(demonstrations([2, 30, 3, 40]), TEMPLATE, 40)
    assert [len(one.token_ids) for one in kept] == [8, 10]
    assert (
        "2 of 4 conversations are longer than 40 tokens, the first in line 30 (64)" in caplog.text
    )
    assert describe(kept) == "2 conversations, 18 tokens (7 in answers), longest 10"
    with pytest.raises(UserError, match="--data: 1 of 1 conversations are longer than 10"):
        render_all(demonstrations([9]), TEMPLATE, 10)


def test_padding_reaches_no_loss(model):
    model.eval()
    some = examples()
    batch = padded_batch(some)
    total, count = example_loss(model, batch)
    parts = [example_loss(model, padded_batch([one])) for one in some]
    torch.testing.assert_close(total, sum(loss for loss, _ in parts), rtol=1e-5, atol=1e-5)
    assert count == sum(n for _, n in parts) == sum(t != IGNORE_INDEX for e in some for t in e[1])
    longest = torch.arange(batch.inputs.shape[1])
    lengths = torch.tensor([len(one.inputs) for one in some]).unsqueeze(-1)
    dirty = torch.where(longest < lengths, batch.inputs, 7)
    assert example_loss(model, batch._replace(inputs=dirty))[0] == total


@pytest.mark.parametrize("ops_name", OPS)
@pytest.mark.parametrize("kind", [ModelConfig, GPT2Config])
def test_packed_conversations_are_as_if_alone(kind, ops_name):
    """Also in gradient, over several tiles of attention; with GPT-2's drop_rate of 0.1."""
    config = kind(16, 2, 24, 300, 2, 256)
    model = build_model(config, OPS[ops_name], generator=torch.Generator().manual_seed(1)).eval()
    some = examples((1, 9, 4, 20, 2, 7, 3, 18, 25, 11, 6, 13))
    rows = [[some[n] for n in row] for row in best_fit([len(one.inputs) for one in some], 256)]
    assert len(rows) < len(some) / 2
    found = []
    for batches in ([packed_batch(rows, 256)], [padded_batch([one]) for one in some]):
        model.zero_grad()
        losses = [example_loss(model, batch) for batch in batches]
        sum(loss for loss, _ in losses).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append((sum(loss.item() for loss, _ in losses), gradient))
        assert sum(n for _, n in losses) == sum(t != IGNORE_INDEX for e in some for t in e.targets)
    (packed, packed_gradient), (alone, gradient) = found
    assert packed == pytest.approx(alone, rel=1e-5)
    torch.testing.assert_close(packed_gradient, gradient, rtol=1e-4, atol=1e-4)


def test_a_neighbour_changes_not_a_bit(model):
    model.eval()
    first, second, other = examples((5, 7, 7))
    other = other._replace(inputs=[i ^ 1 for i in other.inputs])
    found = []
    for neighbour in (second, other):
        batch = packed_batch([[neighbour, first]], 40)
        logits = model(batch.inputs, batch.positions, batch.mask)
        start = len(neighbour.inputs)
        found.append(logits[:, start : start + len(first.inputs)])
    assert torch.equal(*found)


def test_best_fit():
    rows = best_fit([5, 3, 9, 1, 7, 2, 3], 10)
    assert sorted(n for row in rows for n in row) == list(range(7))
    assert all(sum([5, 3, 9, 1, 7, 2, 3][n] for n in row) <= 10 for row in rows) and len(rows) == 3
    assert best_fit([], 10) == []


@pytest.mark.parametrize("pack_to", [None, 60])
def test_every_row_comes_once_an_epoch(pack_to):
    some = examples()
    batches = ExampleBatches(some, 2, seed=3, pack_to=pack_to)
    num_rows = batches.num_rows
    rows = [row for index in range(num_rows) for row in batches.rows(index)]
    epochs = rows[:num_rows], rows[num_rows : 2 * num_rows]
    for epoch in epochs:
        assert sorted(n for row in epoch for n in row) == list(range(len(some)))
    if pack_to is None:
        assert num_rows == len(some) and epochs[0] != epochs[1]
    again = ExampleBatches(some, 2, seed=3, pack_to=pack_to)
    assert again.rows(5) == batches.rows(5)
    assert torch.equal(again(5).inputs, batches(5).inputs)


def test_gradients_do_not_depend_on_the_split(model):
    """One batch of 8, and four of 2, of unequal length."""
    model.eval()
    some = examples((1, 9, 4, 20, 2, 7, 3, 12))
    found = []
    for size in (8, 2):
        parts = [padded_batch(some[i : i + size]) for i in range(0, 8, size)]
        _, count = accumulate_gradients(model, parts, example_loss)
        found.append(torch.cat([p.grad.flatten() / count for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
