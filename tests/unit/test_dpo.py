"""DPO on models: the start, the reference, pads, ties, and the loss by hand."""

import math

import pytest
import torch

from cs_lm.alignment.dpo import DPOConfig, PreferenceOptimization, compare
from cs_lm.alignment.records import Ranking
from cs_lm.config.model import GPT2Config, ModelConfig
from cs_lm.config.run import RunConfig
from cs_lm.device import World
from tests.unit.test_conversations import TOKENIZER
from tests.unit.test_reward_model import rankings

CPU = torch.device("cpu")


@pytest.fixture(params=[ModelConfig, GPT2Config])
def base(request):
    return RunConfig(model=request.param(16, 2, 24, 300, 2, 64))


def task_of(base, some=None, **changes):
    config = DPOConfig(source="x", data=("x",), out_dir="x", batch_size=2, **changes)
    task = PreferenceOptimization(
        config, base, TOKENIZER, (some or rankings(), rankings()), World(CPU)
    )
    task.keep_reference()
    return task


def log_prob(model, one, number):
    """Of the answer alone, one token after the other."""
    ids = one.rows[number]
    log_probs = model(torch.tensor([ids]))[0].log_softmax(-1)
    return sum(log_probs[t - 1, ids[t]] for t in range(one.num_prompt, len(ids)))


def test_it_starts_at_log_2_with_a_gradient(base):
    """Also for GPT-2, whose dropout is off."""
    task = task_of(base)
    (batch,) = task.batches_of_step(0)
    total, count = task.loss(task.model, batch)
    (total / count).backward()
    assert count == 2 and (total / count).item() == pytest.approx(math.log(2), abs=1e-6)
    assert task.model.output_embedding.grad.abs().max() > 1e-4


def test_it_starts_at_log_2_in_bfloat16_too(base):
    task = task_of(base, dtype="bfloat16")
    (batch,) = task.batches_of_step(0)
    total, count = task.loss(task.model, batch)
    assert (total / count).item() == pytest.approx(math.log(2), abs=1e-6)


def test_the_stored_reference_is_the_live_one(base):
    task = task_of(base)
    for number, stored in enumerate(task.reference):
        assert torch.equal(stored, task.live(number))
        one = task.rankings[number]
        wanted = torch.stack([log_prob(task.model, one, n) for n in range(len(one.rows))])
        torch.testing.assert_close(stored, wanted.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [
    {"beta": 0.5}, {"beta": 0.5, "label_smoothing": 0.2}, {"beta": 0.2, "loss": "ipo"},
    {"beta": 0.5, "nll_weight": 0.3},
])  # fmt: skip
def test_the_loss_by_hand(base, changes):
    """All pairs of a prompt as one, and the best answer's surprise."""
    task = task_of(base, **changes)
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter += 0.1 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(1)
            )
    (batch,) = task.batches_of_step(0)
    found = compare(task.model, batch, task.config)
    order = task.order(0)
    for place, number in enumerate(order):
        one, reference = task.rankings[number], task.reference[number]
        lengths = [len(row) - one.num_prompt for row in one.rows]
        live = [log_prob(task.model, one, n).item() for n in range(len(one.rows))]
        ratios = [a - b for a, b in zip(live, reference.tolist())]
        beta, smoothing = task.config.beta, task.config.label_smoothing
        losses = []
        for i, a in enumerate(one.ranks):
            for j, b in enumerate(one.ranks):
                if a < b and task.config.loss == "ipo":
                    h = ratios[i] / lengths[i] - ratios[j] / lengths[j]
                    losses.append((h - 1 / (2 * beta)) ** 2)
                elif a < b:
                    d = beta * (ratios[i] - ratios[j])
                    losses.append(
                        (1 - smoothing) * math.log1p(math.exp(-d))
                        + smoothing * math.log1p(math.exp(d))
                    )
        wanted = sum(losses) / len(losses)
        best = [n for n, rank in enumerate(one.ranks) if rank == min(one.ranks)]
        surprise = sum(-live[n] / lengths[n] for n in best) / len(best)
        wanted += task.config.nll_weight * surprise
        assert found.losses[place].item() == pytest.approx(wanted, rel=1e-3)
        assert found.num_pairs[place] == len(losses)


def test_pads_and_neighbours_do_not_matter(base):
    task = task_of(base)
    (batch,) = task.batches_of_step(0)
    rows = batch.rows
    after = torch.arange(rows.token_ids.shape[1]) > rows.last.unsqueeze(-1)
    dirty = batch._replace(rows=rows._replace(token_ids=torch.where(after, 7, rows.token_ids)))
    first, second = (compare(task.model, one, task.config) for one in (batch, dirty))
    assert torch.equal(first.losses, second.losses)
    alone = [task.batch([n]) for n in task.order(0)]
    losses = [compare(task.model, one, task.config).losses for one in alone]
    torch.testing.assert_close(torch.cat(losses), first.losses, rtol=1e-4, atol=1e-5)


def test_equal_answers_are_no_pair(base):
    """And the prompt is the same list of ids in all rows."""
    some = [Ranking(rankings()[0].prompt, ("same", "same", "other"), (1, 2, 3), "line 1")]
    task = task_of(base, some)
    (one,) = task.rankings[:1]
    assert one.ranks == (1, 1, 3)
    assert len({tuple(row[: one.num_prompt]) for row in one.rows}) == 1
    (batch,) = task.batches_of_step(0)
    assert compare(task.model, batch, task.config).num_pairs[0] == 2
