"""Each formula of alignment/ against a loop over single numbers, in float64."""

import itertools
import math

import pytest
import torch

from cs_lm.alignment.advantages import (
    explained_variance,
    gae,
    group_advantages,
    token_rewards,
    whitened,
)
from cs_lm.alignment.kl import (
    AdaptiveKL,
    FixedKL,
    exact_kl,
    kl_k1,
    kl_k3,
    linear_exact_kl,
)
from cs_lm.alignment.losses import (
    dpo_rewards,
    grpo_losses,
    ipo_losses,
    policy_losses,
    preference_losses,
    ranking_losses,
    reduced,
    sft_loss,
    value_losses,
)
from cs_lm.alignment.masked import masked_mean, masked_sum, masked_variance

B, T = 5, 9
NAN = math.nan


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return normal


@pytest.fixture
def mask():
    """Answers that begin and end at different places; the first one has a single token."""
    firsts, lengths = [3, 0, 2, 5, 1], [1, 9, 4, 4, 7]
    at = torch.arange(T)
    rows = [(at >= first) & (at < first + n) for first, n in zip(firsts, lengths)]
    return torch.stack(rows)


def close(actual, wanted):
    wanted = torch.as_tensor(wanted, dtype=actual.dtype)
    torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


def positions(mask):
    return [(b, t) for b, t in itertools.product(range(B), range(T)) if mask[b, t]]


def log_sigmoid(d):
    return -math.log1p(math.exp(-d)) if d > 0 else d - math.log1p(math.exp(d))


def test_masked(draw, mask):
    x = draw(B, T)
    chosen = [x[place].item() for place in positions(mask)]
    mean = sum(chosen) / len(chosen)
    close(masked_sum(x, mask), sum(chosen))
    close(masked_mean(x, mask), mean)
    close(masked_variance(x, mask), sum((c - mean) ** 2 for c in chosen) / (len(chosen) - 1))
    rows = [sum(x[b, t].item() for t in range(T) if mask[b, t]) for b in range(B)]
    close(masked_sum(x, mask, -1), rows)
    close(masked_mean(x, mask, 1), [r / n for r, n in zip(rows, mask.sum(1).tolist())])
    assert masked_mean(x, torch.zeros_like(mask)).isnan()


def test_sft(draw, mask):
    log_probs = draw(B, T)
    total, count = sft_loss(log_probs, mask)
    close(total, -sum(log_probs[place].item() for place in positions(mask)))
    assert count == len(positions(mask))


# ---- preferences ----


def brute_ranking(scores, ranks):
    """Mean over all pairs, and their number."""
    losses = [
        -log_sigmoid(scores[i] - scores[j])
        for i, j in itertools.permutations(range(len(scores)), 2)
        if ranks[i] < ranks[j]
    ]
    return sum(losses) / max(1, len(losses)), len(losses)


def ranked(draw):
    """Scores, ranks and mask of prompts with 9, 4, 2, 3 (all tied) and 1 answers."""
    ranks = [[3, 1, 2, 2, 9, 4, 5, 6, 7], [2, 1, 3, 4], [1, 2], [1, 1, 1], [1]]
    mask = torch.tensor([[k < len(row) for k in range(9)] for row in ranks])
    padded = torch.tensor([row + [0] * (9 - len(row)) for row in ranks])
    return draw(5, 9), padded, mask, ranks


def test_ranking(draw):
    scores, ranks, mask, lists = ranked(draw)
    losses, num_pairs = ranking_losses(scores, ranks, mask)
    for p, row in enumerate(lists):
        wanted, count = brute_ranking(scores[p, : len(row)].tolist(), row)
        close(losses[p], wanted)
        assert num_pairs[p] == count
    assert losses[3] == losses[4] == 0 and num_pairs[0] == 35


def test_gradient_of_a_ranking_is_the_mean_over_its_pairs(draw):
    """A prompt with 9 answers weighs as much as one with 4, not 36 to 6."""
    scores, ranks, mask, lists = ranked(draw)
    scores.requires_grad_()
    ranking_losses(scores, ranks, mask)[0].sum().backward()
    for p, row in enumerate(lists):
        for i in range(9):
            up, down = scores.detach()[p].clone(), scores.detach()[p].clone()
            up[i] += 1e-6
            down[i] -= 1e-6
            numeric = 0.0
            if i < len(row):
                both = (brute_ranking(x.tolist()[: len(row)], row)[0] for x in (up, down))
                numeric = (next(both) - next(both)) / 2e-6
            assert scores.grad[p, i].item() == pytest.approx(numeric, abs=1e-6)


def test_pads_of_a_ranking_do_not_matter(draw):
    scores, ranks, mask, _ = ranked(draw)
    dirty = torch.where(mask, scores, NAN).requires_grad_()
    clean = scores.clone().requires_grad_()
    losses = []
    for x in (clean, dirty):
        loss = ranking_losses(x, ranks, mask)[0].sum()
        loss.backward()
        losses.append(loss)
    assert losses[0] == losses[1] and torch.equal(clean.grad, dirty.grad)


@pytest.mark.parametrize("difference, loss, gradient", [(-1e4, 1e4, -1), (1e4, 0, 0)])
def test_extreme_differences(difference, loss, gradient):
    d = torch.tensor(difference, requires_grad=True)
    found = preference_losses(d)
    found.backward()
    assert found == loss and d.grad == gradient


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
def test_dpo(draw, label_smoothing):
    policy, reference = draw(2, B), draw(2, B)
    beta = 0.3
    rewards = dpo_rewards(policy, reference, beta)
    losses = preference_losses(rewards[0] - rewards[1], label_smoothing)
    for b in range(B):
        d = beta * (policy[0, b] - reference[0, b] - policy[1, b] + reference[1, b]).item()
        wanted = -(1 - label_smoothing) * log_sigmoid(d) - label_smoothing * log_sigmoid(-d)
        close(losses[b], wanted)


def test_dpo_starts_at_log_2_with_a_gradient(draw):
    log_probs = draw(2, B).requires_grad_()
    rewards = dpo_rewards(log_probs, log_probs.detach(), 0.1)
    loss = preference_losses(rewards[0] - rewards[1]).mean()
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)
    close(log_probs.grad[0], [-0.05 / B] * B)


def test_a_doubled_answer_doubles_its_log_ratio():
    ratio = dpo_rewards(torch.tensor(-4.0), torch.tensor(-7.0), 0.5)
    assert dpo_rewards(torch.tensor(-8.0), torch.tensor(-14.0), 0.5) == 2 * ratio


def test_ipo(draw):
    h, beta = draw(B), 0.2
    close(ipo_losses(beta * h, beta), [(x - 1 / (2 * beta)) ** 2 for x in h.tolist()])


# ---- policies ----


@pytest.mark.parametrize("clip, above", [(0.2, None), (0.2, 0.272), (10.0, None)])
def test_policy(draw, mask, clip, above):
    new, old, advantages = draw(B, T), draw(B, T), draw(B, T)
    losses, clipped = policy_losses(new, old, advantages, mask, clip, above)
    for b, t in itertools.product(range(B), range(T)):
        if not mask[b, t]:
            assert losses[b, t] == 0 and not clipped[b, t]
            continue
        ratio, a = math.exp(new[b, t] - old[b, t]), advantages[b, t].item()
        limited = min(max(ratio, 1 - clip), 1 + (clip if above is None else above))
        close(losses[b, t], max(-a * ratio, -a * limited))
        assert clipped[b, t] == (-a * limited > -a * ratio)


def test_value(draw, mask):
    values, old, returns = draw(B, T), draw(B, T), draw(B, T)
    losses, clipped = value_losses(values, old, returns, mask, clip=0.5)
    for b, t in positions(mask):
        v, o, g = (x[b, t].item() for x in (values, old, returns))
        limited = min(max(v, o - 0.5), o + 0.5)
        close(losses[b, t], max((v - g) ** 2, (limited - g) ** 2) / 2)
        assert clipped[b, t] == ((limited - g) ** 2 > (v - g) ** 2)
    assert not losses[~mask].any() and not clipped[~mask].any()


def test_grpo(draw, mask):
    new, old, reference, advantages = draw(B, T), draw(B, T), draw(B, T), draw(B, 1)
    losses, _ = grpo_losses(new, old, advantages, mask, reference, beta=0.04)
    for b, t in positions(mask):
        ratio, a = math.exp(new[b, t] - old[b, t]), advantages[b, 0].item()
        r = (reference - new)[b, t].item()
        k3 = math.exp(r) - 1 - r
        close(losses[b, t], max(-a * ratio, -a * min(max(ratio, 0.8), 1.2)) + 0.04 * k3)


def test_extreme_log_ratios_stay_finite():
    new = torch.tensor([[1e4, -1e4]], requires_grad=True)
    losses, _ = grpo_losses(new, torch.zeros(1, 2), torch.ones(1, 2), None, torch.zeros(1, 2), 0.1)
    losses.sum().backward()
    assert losses.isfinite().all() and new.grad.isfinite().all()


def test_pads_of_a_policy_do_not_matter(draw, mask):
    """NaN beside the answers changes no loss and no gradient."""
    tensors = [draw(B, T) for _ in range(4)]
    found = []
    for dirty in (False, True):
        new, old, third, fourth = (torch.where(mask, x, NAN if dirty else x) for x in tensors)
        new.requires_grad_()
        losses = grpo_losses(new, old, third, mask, fourth, beta=0.1)[0]
        losses = losses + value_losses(new, old, third, mask)[0]
        total, count = reduced(losses, mask, "sequence")
        (total + sft_loss(new, mask)[0]).backward()
        advantages, returns = gae(token_rewards(draw(B) * 0 + 1, old, mask, 0.1), third, mask)
        white, explained = whitened(third, mask), explained_variance(third, fourth, mask)
        found.append((total.detach(), count, new.grad, advantages, returns, white, explained))
    for clean, dirty in zip(*found):
        assert torch.equal(clean, dirty)


def test_gradient_is_not_zero_where_old_is_new(draw, mask):
    """The first update of an iteration: the ratio is 1, and its gradient is the advantage."""
    new, advantages = draw(B, T).requires_grad_(), draw(B, 1)
    policy_losses(new, new.detach(), advantages, mask)[0].sum().backward()
    close(new.grad, torch.where(mask, -advantages, 0.0))


def test_reductions_weigh_tokens_as_their_names_say():
    """Answers of 1 and 9 tokens with a loss of 1 for each token."""
    mask = torch.tensor([[True] + [False] * 8, [True] * 9])
    weights = {}
    for reduction in ("sequence", "token", "constant"):
        losses = torch.ones(2, 9, dtype=torch.float64, requires_grad=True)
        total, count = reduced(losses, mask, reduction, max_length=20)
        (total / count).backward()
        assert not losses.grad[~mask].any()
        weights[reduction] = losses.grad[0, 0].item(), losses.grad[1, 0].item()
    assert weights["sequence"] == pytest.approx((1 / 2, 1 / 18))
    assert weights["token"] == pytest.approx((1 / 10, 1 / 10))
    assert weights["constant"] == pytest.approx((1 / 40, 1 / 40))
    with pytest.raises(ValueError, match="need one of sequence, token, constant"):
        reduced(torch.ones(2, 9), mask, "mean")


@pytest.mark.parametrize("reduction", ["sequence", "token", "constant"])
def test_the_split_into_micro_batches_does_not_matter(draw, mask, reduction):
    losses = draw(B, T)
    total, count = reduced(losses, mask, reduction, 12)
    parts = [reduced(losses[i : i + 2], mask[i : i + 2], reduction, 12) for i in range(0, B, 2)]
    close(sum(p for p, _ in parts), total.item())
    assert sum(n for _, n in parts) == count


@pytest.mark.parametrize("reduction", ["sequence", "constant", "token"])
def test_on_policy_loss_of_a_group_is_0(draw, mask, reduction):
    """Its gradient is that of -sum(A log p). By tokens, long answers weigh more: not 0."""
    new = draw(4, T).requires_grad_()
    advantages = group_advantages(draw(4), 4).unsqueeze(-1)
    rows = mask[1:]
    total, count = reduced(
        grpo_losses(new, new.detach(), advantages, rows)[0], rows, reduction, max_length=9
    )
    if reduction == "sequence":
        assert abs(total.item()) < 1e-12
    (total / count).backward()
    weight = {"sequence": 1 / rows.sum(-1, keepdim=True).double() / 4, "constant": 1 / 36}
    wanted = -advantages * weight.get(reduction, 1 / rows.sum().double())
    close(new.grad, torch.where(rows, wanted, 0.0))


# ---- advantages ----


def test_token_rewards_and_what_they_add_up_to(draw, mask):
    scores, kl = draw(B), draw(B, T)
    rewards = token_rewards(scores, kl, mask, 0.05)
    for b in range(B):
        inside = [t for t in range(T) if mask[b, t]]
        for t in range(T):
            wanted = -0.05 * kl[b, t].item() if t in inside else 0.0
            wanted += scores[b].item() if t == inside[-1] else 0.0
            close(rewards[b, t], wanted)
    penalty = 0.05 * masked_sum(kl, mask, -1)
    close(rewards.sum(-1) - scores, -penalty)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_gae(draw, mask, gamma, lam):
    rewards, values = draw(B, T), draw(B, T)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for b, t in positions(mask):
        last = max(u for u in range(T) if mask[b, u])
        total = 0.0
        for u in range(t, last + 1):
            following = values[b, u + 1].item() if u < last else 0.0
            delta = rewards[b, u].item() + gamma * following - values[b, u].item()
            total += (gamma * lam) ** (u - t) * delta
        close(advantages[b, t], total)
        close(returns[b, t], total + values[b, t].item())
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_without_values_the_advantage_is_what_is_still_to_come(draw, mask):
    scores, kl = draw(B), draw(B, T)
    rewards = token_rewards(scores, kl, mask, 0.05)
    advantages, _ = gae(rewards, torch.zeros(B, T, dtype=torch.float64), mask, 1.0, 1.0)
    for b, t in positions(mask):
        rest = sum(kl[b, u].item() for u in range(t, T) if mask[b, u])
        close(advantages[b, t], scores[b].item() - 0.05 * rest)


def test_whitened(draw, mask):
    x = draw(B, T) * 3 + 5
    chosen = [x[place].item() for place in positions(mask)]
    mean = sum(chosen) / len(chosen)
    std = math.sqrt(sum((c - mean) ** 2 for c in chosen) / (len(chosen) - 1) + 1e-8)
    white, kept = whitened(x, mask), whitened(x, mask, keep_mean=True)
    for place in positions(mask):
        close(white[place], (x[place].item() - mean) / std)
        close(kept[place], (x[place].item() - mean) / std + mean)
    assert not white[~mask].any() and not kept[~mask].any()
    one = torch.zeros(B, T, dtype=torch.bool)
    one[0, 0] = True
    assert not whitened(x, one).any()


@pytest.mark.parametrize("normalize_by_std", [True, False])
def test_group_advantages(draw, normalize_by_std):
    """The sample standard deviation of each group, and eps added to it."""
    rewards = draw(12)
    rewards[4:8] = 0.1
    found = group_advantages(rewards, 4, 1e-6, normalize_by_std)
    for group in (0, 8):
        own = rewards[group : group + 4].tolist()
        mean = sum(own) / 4
        std = math.sqrt(sum((r - mean) ** 2 for r in own) / 3) if normalize_by_std else 1 - 1e-6
        close(found[group : group + 4], [(r - mean) / (std + 1e-6) for r in own])
    assert not found[4:8].any()
    for size in (1, 5):
        with pytest.raises(ValueError, match=f"got 12 rewards in groups of {size}"):
            group_advantages(rewards, size)


def test_explained_variance(draw, mask):
    values, returns = draw(B, T), draw(B, T)
    g = torch.tensor([returns[place] for place in positions(mask)], dtype=torch.float64)
    v = torch.tensor([values[place] for place in positions(mask)], dtype=torch.float64)
    close(explained_variance(values, returns, mask), 1 - ((g - v).var() / g.var()).item())
    assert explained_variance(returns, returns, mask) == 1


# ---- divergence ----


def test_estimates_of_the_divergence_agree_with_the_exact_one():
    """Means over 200,000 samples lie within 4 standard errors."""
    generator = torch.Generator().manual_seed(1)
    p, q = (torch.randn(6, generator=generator).double().log_softmax(-1) for _ in range(2))
    exact = sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist()))
    close(exact_kl(p, q), exact)
    drawn = torch.multinomial(p.exp(), 200_000, replacement=True, generator=generator)
    for estimate in (kl_k1, kl_k3):
        found = estimate(p[drawn], q[drawn])
        error = found.std().item() / math.sqrt(len(drawn))
        assert abs(found.mean().item() - exact) < 4 * error
    assert (kl_k3(p, q) >= 0).all() and kl_k3(p, p).abs().max() == 0


def test_gradient_of_k3_points_to_the_reference_and_that_of_k1_nowhere():
    """The gradient of the exact divergence is that of k3's samples weighed by their ratio."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_()
    reference = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(-1)
    p = logits.log_softmax(-1)
    # expectations over all tokens in place of samples
    for estimate, is_zero in ((kl_k1, True), (kl_k3, False)):
        weighed = (p.detach().exp() * estimate(p, reference)).sum()
        (gradient,) = torch.autograd.grad(weighed, logits, retain_graph=True)
        assert (gradient.abs().max() < 1e-12) == is_zero
    direction = -gradient
    moved = (logits + 0.1 * direction).log_softmax(-1)
    assert exact_kl(moved, reference) < exact_kl(p, reference)


def test_impossible_tokens_add_nothing_to_the_divergence():
    p = torch.tensor([0.25, 0.75, 0.0]).log()
    q = torch.tensor([0.5, 0.5, 0.0]).log()
    assert exact_kl(p, q).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))


def test_divergence_of_two_heads(draw, monkeypatch):
    x, other = draw(7, 4), draw(7, 3)
    weight, other_weight = draw(11, 4), draw(11, 3)
    both = ((a @ w.T / 0.7).log_softmax(-1) for a, w in ((x, weight), (other, other_weight)))
    wanted = exact_kl(*both)
    monkeypatch.setattr("cs_lm.alignment.kl.BLOCK_LOGITS", 33)  # three rows a block
    close(linear_exact_kl(x, weight, other, other_weight, 0.7), wanted)
    assert linear_exact_kl(x[:0], weight, other[:0], other_weight).shape == (0,)


def test_controllers():
    fixed, adaptive = FixedKL(0.05), AdaptiveKL(0.2, target=6.0, horizon=10_000)
    fixed.update(100.0, 64)
    assert fixed.coefficient == 0.05
    adaptive.update(6.6, 64)  # 10 % too far
    assert adaptive.coefficient == pytest.approx(0.2 * (1 + 0.1 * 64 / 10_000))
    for kl, error in ((600.0, 0.2), (0.0, -0.2)):
        before = adaptive.coefficient
        adaptive.update(kl, 64)
        assert adaptive.coefficient == pytest.approx(before * (1 + error * 64 / 10_000))
