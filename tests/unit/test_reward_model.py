"""The reward model: scores at the end token, rankings as one element, and its report."""

import math

import pytest
import torch

from cs_lm.alignment.conversations import ChatTemplate, Message
from cs_lm.alignment.records import Prompt, Ranking
from cs_lm.alignment.reward_model import (
    ScalarModel,
    preference_report,
    ranked_rows,
    ranking_loss,
    render_answer,
    render_rankings,
    score_rows,
)
from cs_lm.alignment.reward_training import RewardConfig, RewardModeling
from cs_lm.alignment.rules import RULES, rule_of, score_by_rule
from cs_lm.config.model import GPT2Config, ModelConfig
from cs_lm.config.run import RunConfig
from cs_lm.device import World
from cs_lm.errors import UserError
from cs_lm.models.stats import num_scalar_parameters
from tests.unit.test_conversations import TOKENIZER

TEMPLATE = ChatTemplate(TOKENIZER)
CPU = torch.device("cpu")


@pytest.fixture(params=[ModelConfig, GPT2Config])
def model(request):
    config = request.param(16, 2, 24, 300, 2, 64)
    return ScalarModel(config, generator=torch.Generator().manual_seed(1))


def rankings():
    """One prompt with 4 answers, two of them tied, and one with 9."""
    texts = ["a", "bb", "ccc", "d<|end|>d", "e", "ff", "g", "hhhh", "i"]
    prompts = [(Message("user", name),) for name in ("first", "second")]
    return [
        Ranking(prompts[0], tuple(texts[:4]), (2, 1, 2, 3)),
        Ranking(prompts[1], tuple(texts), tuple(range(1, 10))),
    ]


def test_a_score_depends_on_its_answer_alone(model):
    """Alone, beside longer rows, with other pads, and in training mode with GPT-2's dropout."""
    rows = [
        render_answer(TEMPLATE, (Message("user", "<|end|> x"),), "answer"),
        render_answer(TEMPLATE, (Message("user", "q" * 30),), "a" * 10),
    ]
    together, alone = score_rows(model.train(), rows, CPU), score_rows(model, rows[:1], CPU)
    torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-6)
    assert model.training and torch.equal(score_rows(model, rows, CPU), together)
    last = torch.tensor([len(rows[0]) - 1])
    for pads in (0, 1, 20):
        ids = torch.tensor([[*rows[0], *[TEMPLATE.end_id] * pads]])
        found = model.eval().raw_scores(ids, last)
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model(ids)[0, last], alone, rtol=1e-5, atol=1e-6)


def test_training_and_scoring_render_alike():
    (one, _), _ = render_rankings(rankings(), TEMPLATE, 60)
    assert one.rows[0] == render_answer(TEMPLATE, (Message("user", "first"),), "a")
    assert all(row[-1] == TEMPLATE.end_id for row in one.rows)


def test_one_row_an_answer_and_one_weight_a_prompt(model):
    """K rows for K answers; the gradient is the mean over pairs, then over prompts."""
    model.eval()
    rendered, _ = render_rankings(rankings(), TEMPLATE, 60)
    batch = ranked_rows(rendered)
    assert len(batch.token_ids) == 4 + 9 and batch.mask.sum() == 13
    total, count = ranking_loss(model, batch)
    (total / count).backward()
    gradient = model.head.weight.grad.clone()
    model.zero_grad()
    wanted = 0.0
    for one in rendered:
        scores = torch.cat([
            model.raw_scores(torch.tensor([row]), torch.tensor([len(row) - 1])) for row in one.rows
        ])  # fmt: skip
        pairs = [(i, j) for i, a in enumerate(one.ranks) for j, b in enumerate(one.ranks) if a < b]
        losses = [torch.nn.functional.softplus(scores[j] - scores[i]) for i, j in pairs]
        wanted = wanted + torch.stack(losses).mean() / 2
    wanted.backward()
    torch.testing.assert_close(total / count, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, model.head.weight.grad, rtol=1e-4, atol=1e-6)


def test_equal_answers_are_one_row_and_all_their_pairs(model):
    """As if each of them had a row of its own; the best of their ranks counts."""
    one = rankings()[1]
    twice = one._replace(answers=(*one.answers, "bb"), ranks=(*one.ranks, 9))
    (rendered,), _ = render_rankings([twice], TEMPLATE, 60)
    assert len(rendered.rows) == 9 and rendered.places == (*range(9), 1)
    assert rendered.ranks == (*range(1, 10), 2)
    own_rows = rendered._replace(rows=[*rendered.rows, rendered.rows[1]], places=tuple(range(10)))
    losses, gradients, reports = [], [], []
    for each in (rendered, own_rows):
        model.eval().zero_grad()
        loss, count = ranking_loss(model, ranked_rows([each, each]))
        loss.backward()
        losses.append(loss / count)
        gradients.append(model.head.weight.grad.clone())
        reports.append(preference_report([score_rows(model, each.rows, CPU)], [each]))
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    assert reports[0]["num_pairs"] == reports[1]["num_pairs"] == 44
    assert reports[0]["length_correlation"] == pytest.approx(reports[1]["length_correlation"])


def test_pads_do_not_matter(model):
    model.eval()
    batch = ranked_rows(render_rankings(rankings(), TEMPLATE, 60)[0])
    after = torch.arange(batch.token_ids.shape[1]) > batch.last.unsqueeze(-1)
    dirty = batch._replace(token_ids=torch.where(after, 7, batch.token_ids))
    assert ranking_loss(model, dirty)[0] == ranking_loss(model, batch)[0]


def test_rankings_with_an_answer_that_is_too_long_are_left_out():
    kept, too_long = render_rankings(rankings(), TEMPLATE, 18)
    assert len(kept) + len(too_long) == 2 and len(too_long) == 1


def test_head_and_size(model):
    own = sum(parameter.numel() for parameter in model.parameters())
    assert own == num_scalar_parameters(model.trunk.config)
    many = ScalarModel(ModelConfig(256, 2, 8, 10, 1, 8), generator=torch.Generator().manual_seed(0))
    assert many.head.weight.std().item() == pytest.approx(1 / 16, rel=0.2)


def test_report():
    """Three pairs: margins 2 and 0.1 the right way, -1.5 the wrong way."""
    rendered, _ = render_rankings(rankings()[:1], TEMPLATE, 60)
    one = rendered[0]._replace(rows=rendered[0].rows[:3], places=(0, 1, 2), ranks=(1, 2, 3))
    found = preference_report([torch.tensor([0.0, -2.0, -0.5])], [one])
    assert found["num_pairs"] == 3 and found["accuracy"] == pytest.approx(2 / 3)
    bins = {b["from"]: b for b in found["calibration"]}
    assert bins[0.5]["pairs"] == 1 and bins[0.5]["right"] == 1.0  # 0 over -0.5
    assert bins[1.0]["pairs"] == 1 and bins[1.0]["right"] == 0.0  # -0.5 over -2: wrong way
    assert bins[2.0]["expected"] == pytest.approx(1 / (1 + math.exp(-2)))
    lengths = torch.tensor([float(len(row)) for row in one.rows])
    scores = torch.tensor([0.0, -2.0, -0.5])
    wanted = torch.corrcoef(torch.stack([scores, lengths]))[0, 1].item()
    assert found["length_correlation"] == pytest.approx(wanted, abs=1e-6)
    empty = preference_report([], [])
    assert empty["accuracy"] is None and empty["num_pairs"] == 0


# ---- rules ----

PROMPT = Prompt((Message("user", "2 + 40?"),), {"answer": "so 42"}, "a.jsonl, line 1")


@pytest.mark.parametrize("name, answer, score", [
    ("exact", " So 42. ", 1.0),
    ("exact", "42", 0.0),
    ("contains", "it is so 42!", 1.0),
    ("last_number", "2 + 40 = 42", 1.0),
    ("last_number", "42 or 43", 0.0),
    ("last_number", "none", 0.0),
    ("length", "four", -4.0),
])  # fmt: skip
def test_rules(name, answer, score):
    assert score_by_rule(rule_of(name), answer, PROMPT) == score


def test_own_rules_and_mistakes(tmp_path, monkeypatch):
    (tmp_path / "own_rules.py").write_text(
        "def vowels(answer, fields):\n    return sum(c in 'aeiou' for c in answer)\n"
        "def asked(answer, fields):\n    return fields['prompt'] == '2 + 40?'\n"
        "def broken(answer, fields):\n    return 1 / 0\n"
        "def no_number(answer, fields):\n    return float('nan')\nnot_one = 3\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert score_by_rule(rule_of("own_rules:vowels"), "aloe", PROMPT) == 3
    assert score_by_rule(rule_of("own_rules:asked"), "", PROMPT) == 1
    with pytest.raises(UserError, match="a.jsonl, line 1: the rule failed on the answer 'x' .Zero"):
        score_by_rule(rule_of("own_rules:broken"), "x", PROMPT)
    with pytest.raises(UserError, match="gives no finite number"):
        score_by_rule(rule_of("own_rules:no_number"), "x", PROMPT)
    with pytest.raises(UserError, match="the record has no 'answer'"):
        score_by_rule(RULES["exact"], "x", PROMPT._replace(fields={}))
    for name, message in [
        ("exat", "need one of exact, contains, last_number, length, or module:function"),
        ("no_such_module:f", "No module named"),
        ("own_rules:none", "own_rules has no 'none'"),
        ("own_rules:not_one", "which is not a function"),
    ]:
        with pytest.raises(UserError, match=message):
            rule_of(name)


def test_a_row_that_fills_the_context_is_scored_and_a_longer_one_named():
    model = ScalarModel(ModelConfig(16, 2, 24, 300, 2, 20)).eval()
    assert score_rows(model, [[5] * 20], CPU).isfinite().all()
    with pytest.raises(ValueError, match="reward model: got 21 tokens of prompt and answer"):
        score_rows(model, [[5] * 21], CPU)


@pytest.mark.parametrize("room", [0, 1])
def test_no_ranking_is_longer_than_the_reward_models_context(room):
    """It reads the end token, too; the longest of these fills the context, or is left out."""
    rendered = render_rankings(rankings(), TEMPLATE, 99)[0]
    longest = max(len(row) for one in rendered for row in one.rows)
    base = RunConfig(model=ModelConfig(16, 2, 24, 300, 2, longest - 1 + room))
    config = RewardConfig(source="x", data=("x",), out_dir="x", batch_size=2)
    task = RewardModeling(config, base, TOKENIZER, (rankings(), rankings()), World(CPU))
    assert len(task.train) == len(rankings()) - (not room)
    for batch in task.batches_of_step(0):
        task.loss(task.model, batch)[0].backward()
