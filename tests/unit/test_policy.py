"""Rollouts, PPO and GRPO on small models: ratios, divergences, masks, rewards, iterations."""

import math

import pytest
import torch

from cs_lm.alignment.conversations import ChatTemplate, Message
from cs_lm.alignment.grpo import GroupRelativePolicyOptimization, GRPOConfig
from cs_lm.alignment.policy_task import PolicySources, Scorer
from cs_lm.alignment.ppo import PPOConfig, ProximalPolicyOptimization
from cs_lm.alignment.records import Prompt
from cs_lm.alignment.reward_model import ScalarModel
from cs_lm.alignment.reward_training import RewardModel
from cs_lm.alignment.rollouts import (
    Rollouts,
    answer_log_probs,
    distance,
    distinct_ngrams,
    draw_answers,
)
from cs_lm.config.model import GPT2Config, ModelConfig
from cs_lm.config.run import RunConfig
from cs_lm.data.pipeline import PreparedData
from cs_lm.data.token_store import ArrayTokens
from cs_lm.device import World
from cs_lm.inference.sampling import uniform_draws
from cs_lm.models.registry import build_model
from cs_lm.training.step import accumulate_gradients
from tests.unit.test_conversations import TOKENIZER

CPU = torch.device("cpu")
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12]] * 4
END = 259


def model_of(config, seed=3, spread=8.0):
    model = build_model(config, generator=torch.Generator().manual_seed(seed)).eval()
    with torch.no_grad():
        model.output_embedding.mul_(spread)
    return model


@pytest.fixture(params=[ModelConfig, GPT2Config])
def config(request):
    more = {"drop_rate": 0.1} if request.param is GPT2Config else {}
    return request.param(16, 2, 24, 300, 2, 64, **more)


@pytest.fixture
def base(config):
    return RunConfig(model=config)


def drawn_by(model, prompts, end_id, max_new_tokens, seed, temperature=1.0):
    uniform = uniform_draws(seed, range(len(prompts)), max_new_tokens)
    return draw_answers(model, prompts, end_id, uniform, temperature)


# ---- rollouts ----


def test_kept_log_probs_are_those_of_a_plain_pass(config):
    """Prompts of unequal length, a temperature, the key-value cache: ratio 1 before any update."""
    model = model_of(config)
    drawn = drawn_by(model, PROMPTS, END, 30, 5, temperature=0.7)
    hidden = model.hidden_states(drawn.token_ids[:, :-1])
    found, _ = answer_log_probs(model, hidden, drawn.token_ids, drawn.mask, 0.7)
    assert (torch.exp(found - drawn.log_probs)[drawn.mask] - 1).abs().max() < 2e-5
    for row, prompt in enumerate(PROMPTS):
        length = int(drawn.lengths[row])
        ids = drawn.token_ids[row, : len(prompt) + length]
        assert ids[: len(prompt)].tolist() == prompt
        assert drawn.last[row] == len(ids) - 1
        assert bool(drawn.ended[row]) == (int(ids[-1]) == END)
        assert END not in ids[len(prompt) : -1] and (drawn.ended[row] or length == 30)
        alone = model(ids[None, :-1])[0].float().div(0.7).log_softmax(-1)
        for t in range(len(prompt), len(ids)):
            wanted = alone[t - 1, ids[t]].item()
            assert drawn.log_probs[row, t - 1].item() == pytest.approx(wanted, abs=1e-4)
    assert drawn.mask.sum() == drawn.lengths.sum() and not drawn.log_probs[~drawn.mask].any()


def test_an_answer_follows_from_seed_and_row(config):
    """Whatever its neighbours are; another seed gives another one."""
    model = model_of(config)
    first = drawn_by(model, PROMPTS, END, 12, 1)
    others = [PROMPTS[0], [77], [7] * 20, PROMPTS[3]]
    second = drawn_by(model, others, END, 12, 1)
    for row in (0, 3):
        own, wanted = (x.answers(END)[row] for x in (second, first))
        assert own == wanted
    assert drawn_by(model, PROMPTS, END, 12, 2).answers(END) != first.answers(END)


def test_answers_end_at_their_end_token():
    """A model that gives the end token nearly always, and one that never does."""
    config = ModelConfig(16, 2, 24, 300, 2, 64)
    model = model_of(config, spread=1.0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[END] = 200 * model.ln_final(model.token_embeddings.weight[7])
    certain = drawn_by(model, [[7]] * 3, END, 20, 0)
    assert certain.lengths.tolist() == [1, 1, 1] and certain.ended.all()
    assert certain.answers(END) == [[], [], []]
    never = drawn_by(model, [[7], [7, 7]], 1000, 5, 0)
    assert never.lengths.tolist() == [5, 5] and not never.ended.any()


def test_logits_that_are_no_numbers_are_an_error(config):
    model = model_of(config)
    with torch.no_grad():
        model.output_embedding[5] = math.nan
    with pytest.raises(ValueError, match="the model's logits are not numbers"):
        drawn_by(model, PROMPTS, END, 4, 0)


def test_the_distance_is_exact_and_k1_estimates_it(config):
    policy, reference = model_of(config, 3), model_of(config, 4)
    drawn = drawn_by(policy, PROMPTS * 40, END, 12, 5, temperature=0.8)
    found = distance(policy, reference, drawn, 0.8, batch_size=7)
    row = 2
    p, q = (
        model(drawn.token_ids[row : row + 1, :-1])[0].float().div(0.8).log_softmax(-1)
        for model in (policy, reference)
    )
    kl = (p.exp() * (p - q)).sum(-1)
    mask = drawn.mask[row]
    torch.testing.assert_close(found.kl[row][mask], kl[mask], rtol=1e-4, atol=1e-5)
    entropy = -(p.exp() * p).sum(-1)
    torch.testing.assert_close(found.entropies[row][mask], entropy[mask], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.log_probs, drawn.log_probs, rtol=1e-4, atol=1e-4)
    assert all(not x[~drawn.mask].any() for x in found)
    k1 = (found.log_probs - found.ref_log_probs).sum(-1) - found.kl.sum(-1)  # mean 0
    assert found.kl.min() >= -1e-6
    assert abs(k1.mean()) < 4 * k1.std() / math.sqrt(len(k1))


def test_distinct_ngrams():
    assert distinct_ngrams([[1, 2, 3, 4, 5], [1, 2, 3, 4]]) == 2 / 3
    assert distinct_ngrams([[1, 2], []]) is None


# ---- tasks ----


def prompts(count=12):
    return [
        Prompt((Message("user", f"say {'x' * (n % 5)}{n}"),), {"answer": str(n)}, f"line {n}")
        for n in range(count)
    ]


def by_length(answer, fields):
    return -float(len(answer))


def sources(base, reward=False, text=False):
    scorer = Scorer("length", None, by_length)
    if reward:
        generator = torch.Generator().manual_seed(9)
        model = ScalarModel(ModelConfig(8, 2, 12, 300, 1, 64), generator=generator).eval()
        scorer = Scorer("a model", RewardModel(model, TOKENIZER, ChatTemplate(TOKENIZER)), None)
    tokens = ArrayTokens(torch.arange(600).numpy() % 250)
    mixed = PreparedData(TOKENIZER, tokens, tokens) if text else None
    weights = model_of(base.model).state_dict()
    return PolicySources(base, TOKENIZER, prompts(), scorer, by_length, mixed, lambda: weights)


def task_of(kind, base, reward=False, text=False, **changes):
    configs = {"ppo": (PPOConfig, ProximalPolicyOptimization),
               "grpo": (GRPOConfig, GroupRelativePolicyOptimization)}  # fmt: skip
    config_class, task_class = configs[kind]
    settings = {"rollout_size": 16, "batch_size": 8, "max_new_tokens": 9, "rule": "length"}
    if kind == "grpo":
        settings["group_size"] = 4
    given = settings | {"pretraining_mix": 0.25 if text else 0.0} | changes
    config = config_class(source="x", prompts=("x",), out_dir="x", **given)
    assert config.validate() == []
    task = task_class(config, sources(base, reward, text), World(CPU))
    task.begin_with(task._sources.reference())
    return task


def gradients(task, batches):
    total, count = accumulate_gradients(task.model, batches, task.loss)
    return [p.grad / count for p in task.model.parameters() if p.grad is not None], total / count


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_the_ratio_is_1_before_the_first_update(kind, base):
    task = task_of(kind, base, temperature=0.7)
    for batch in task.batches_of_step(0):
        task.loss(task.model, batch)
    assert all(float(one["ratio_gap"]) < 2e-5 for one in task._stats[0])
    assert all(float(one["clip_fraction"]) == 0 for one in task._stats[0])


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_pads_change_nothing(kind, base):
    """Not even NaN: what stands outside the mask is left out by selection."""
    task = task_of(kind, base)
    (batch,) = task.batches_of_step(0)
    grads, loss = gradients(task, [batch])
    assert len(task._stats[0]) == 1
    outside = ~batch.mask
    ids = batch.token_ids.clone()
    is_pad = torch.arange(ids.shape[1]) > Rollouts(*batch[:3], None).last.unsqueeze(-1)
    ids[is_pad] = 5
    values = {
        name: x.masked_fill(outside, math.nan) if x.dim() > 1 else x
        for name, x in batch.values.items()
    }
    more = batch._replace(
        token_ids=ids, values=values,
        old_log_probs=batch.old_log_probs.masked_fill(outside, math.nan),
        ref_log_probs=batch.ref_log_probs.masked_fill(outside, math.nan),
    )  # fmt: skip
    other_grads, other_loss = gradients(task, [more])
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(a, b) for a, b in zip(grads, other_grads, strict=True))
    for first, second in zip(*(one.values() for one in task._stats[0])):
        assert torch.equal(first, second)


@pytest.mark.parametrize("reduction", ["sequence", "token", "constant"])
def test_the_text_counts_as_much_with_every_reduction(base, reduction):
    task = task_of("grpo", base, text=True, pretraining_weight=2.0, reduction=reduction)
    *answers, text = task.batches_of_step(0)
    both, _ = gradients(task, [*answers, text])
    alone, _ = gradients(task, answers)
    accumulate_gradients(task.policy, [text], lambda _, b: _mean_loss(task, b))
    for whole, one, other in zip(both, alone, task.policy.parameters(), strict=True):
        torch.testing.assert_close(whole, one + 2.0 * other.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_the_split_into_batches_does_not_matter(kind, base):
    task = task_of(kind, base, batch_size=16)
    (batch,) = task.batches_of_step(0)
    whole, _ = gradients(task, [batch])
    parts, _ = gradients(task, [task._batch(range(i, i + 4)) for i in range(0, 16, 4)])
    for first, second in zip(whole, parts, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reward", [False, True])
def test_rewards_add_up_and_land_on_the_last_token(base, reward):
    """With gamma, lambda = 1, a return is the score less what the divergence costs from there."""
    task = task_of("ppo", base, reward, gamma=1.0, lam=1.0, kl_coef=0.3)
    with torch.no_grad():
        for parameter in task.policy.parameters():
            noise = torch.Generator().manual_seed(1)
            parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
    task.batches_of_step(0)
    known, facts = task._experience, task._facts
    penalty = task.config.no_end_penalty * (1 - facts["ended"])
    total = facts["score"] - penalty - facts["kl_penalty"]
    assert facts["reward_total"] == pytest.approx(total, abs=1e-5)
    k1 = known["old_log_probs"] - known["ref_log_probs"]
    assert abs(facts["kl_penalty"] - 0.3 * facts["kl_k1"]) < 1e-5
    for row in range(16):
        own = known["mask"][row].nonzero().flatten().tolist()
        for t in own:
            wanted = known["scores"][row] - 0.3 * k1[row, t : own[-1] + 1].sum()
            assert known["returns"][row, t].item() == pytest.approx(wanted.item(), abs=1e-4)
    assert not known["returns"][~known["mask"]].any()
    assert not known["advantages"][~known["mask"]].any()
    assert known["advantages"][known["mask"]].mean().abs() < 1e-5


def test_the_value_model_begins_as_the_reward_model(base):
    task = task_of("ppo", base, reward=True)
    drawn = drawn_by(task.policy, PROMPTS, END, 9, 0)
    own = task.value.raw_scores(drawn.token_ids, drawn.last)
    torch.testing.assert_close(own, task.scorer.model.model.raw_scores(*drawn[:1], drawn.last))
    assert task.value is not task.scorer.model.model
    before = {name: x.clone() for name, x in task.scorer.model.model.state_dict().items()}
    gradients(task, task.batches_of_step(0))
    task.optimizer.step()
    for name, tensor in task.scorer.model.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_text_counts_as_much_as_it_is_told(base):
    """gradient = that of the answers + weight * that of the text's mean surprise."""
    task = task_of("ppo", base, text=True, pretraining_weight=2.5)
    *batches, text = task.batches_of_step(0)
    both, _ = gradients(task, [*batches, text])
    ratio = task._facts["text_gradient_ratio"]
    answers, _ = gradients(task, batches)
    accumulate_gradients(task.policy, [text], lambda _, b: _mean_loss(task, b))
    of_text = [p.grad * 2.5 for p in task.policy.parameters()]
    own = answers[: len(of_text)]
    for whole, one, other in zip(both, own, of_text, strict=False):
        torch.testing.assert_close(whole, one + other, rtol=1e-4, atol=1e-6)
    norms = [torch.stack([x.norm() for x in grads]).norm() for grads in (of_text, own)]
    assert ratio == pytest.approx((norms[0] / norms[1]).item(), rel=1e-3)


def _mean_loss(task, text):
    logits = task.policy(text.inputs).float().log_softmax(-1)
    chosen = logits.gather(-1, text.targets.unsqueeze(-1))
    return -chosen.mean(), torch.ones(())


def test_iterations_follow_each_other_and_one_may_stop_early(base):
    task = task_of("ppo", base, rollout_epochs=2)
    seen = []
    for step in range(8):
        batches = task.batches_of_step(step)
        again = task.batches_of_step(step)
        assert all(torch.equal(a.token_ids, b.token_ids) for a, b in zip(batches, again))
        for batch in batches:
            task.loss(task.model, batch)
        seen.append(task._iteration)
        records = task.after_step(step + 1)
        assert bool(records) == (step % 4 == 3)
        assert not records or records[0][1]["updates"] == 4
    assert seen == [0] * 4 + [1] * 4
    task = task_of("ppo", base, kl_stop=1e-12)
    for step in range(3):
        for batch in task.batches_of_step(step):
            task.loss(task.model, batch._replace(old_log_probs=batch.old_log_probs - 0.1))
        ((_, record),) = task.after_step(step + 1)
        assert record["updates"] == 1 and record["iteration"] == step


def test_the_divergence_sets_the_coefficient(base):
    task = task_of("ppo", base, kl_target=1e-9, kl_horizon=16.0)
    with torch.no_grad():
        task.policy.output_embedding.mul_(0.5)
    for step in range(task.config.updates_per_iteration):
        for batch in task.batches_of_step(step):
            task.loss(task.model, batch)
        task.after_step(step + 1)
    assert task.kl.coefficient == 0.05
    task.batches_of_step(task.config.updates_per_iteration)
    assert task.kl.coefficient == pytest.approx(0.05 * 1.2)


@pytest.mark.parametrize("reduction", ["sequence", "token", "constant"])
def test_grpo_starts_at_0_with_a_gradient(base, reduction):
    task = task_of("grpo", base, beta=0.0, reduction=reduction, batch_size=16)
    grads, loss = gradients(task, task.batches_of_step(0))
    if reduction == "sequence":
        assert loss.abs() < 1e-6
    assert max(x.abs().max() for x in grads) > 1e-6
    scores, advantages = task._experience["scores"], task._experience["advantages"]
    for group in range(4):
        own = scores[4 * group : 4 * group + 4]
        torch.testing.assert_close(advantages[4 * group : 4 * group + 4], own - own.mean())
    rows = task._experience["token_ids"]
    for group in range(4):  # the answers of a group are to one prompt
        texts = rows[4 * group : 4 * group + 4]
        mask = task._experience["mask"][4 * group : 4 * group + 4]
        first = int(mask[0].nonzero()[0]) + 1
        assert (texts[:, :first] == texts[0, :first]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout_size": 20, "rule": "length"}, "--rollout_size: got 20, need a multiple of"),
        ({"rule": "length", "reward": "x"}, "--reward, --rule: got both"),
        ({}, "--reward, --rule: are missing"),
        ({"rule": "length", "clip": 1.5}, "--clip: got 1.5, need more than 0"),
        ({"rule": "length", "gamma": 1.5}, "--gamma: got 1.5, need 0 to 1"),
        ({"rule": "length", "kl_horizon": 9.0}, "--kl_horizon: has no effect without --kl_target"),
        ({"rule": "length", "kl_target": 1.0, "kl_horizon": 9.0}, "--kl_horizon: got 9, need more"),
        ({"rule": "length", "kl_target": 1.0, "kl_coef": 0.0}, "--kl_coef: got 0, need above 0"),
        ({"rule": "length", "pretraining_weight": 2.0}, "--ptx_coef: has no effect without --pr"),
        ({"rule": "length", "eval_tokens": 2}, "--eval_tokens: has no effect without --pretrai"),
        ({"rule": "length", "batch_size": 0}, "--batch_size: got 0, need 1 or more"),
    ],
)
def test_what_cannot_be(changes, message):
    found = PPOConfig(source="x", prompts=("x",), out_dir="x", **changes).validate()
    assert [str(one)[: len(message)] for one in found] == [message]


def test_prompts_without_room_are_left_out_and_told(base, caplog):
    task = task_of("ppo", base, max_new_tokens=54)
    assert "prompts leave no room for an answer of 54 tokens, the first in line" in caplog.text
    assert len(task.train) + len(task.valid) < 12
    with pytest.raises(ValueError, match="--max_new_tokens: got 65, need at most 64"):
        task_of("ppo", base, max_new_tokens=65)
