"""The losses of alignment/ against trl's, on the same numbers.

The loss methods of trl's trainers are called with a stand-in for the trainer.
"""

from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from cs_lm.alignment.losses import (
    dpo_rewards,
    grpo_losses,
    ipo_losses,
    preference_losses,
    ranking_losses,
    reduced,
)
from cs_lm.ops import token_log_probs

pytest.importorskip("trl", reason="trl is not installed")

B, T, V = 6, 8, 11


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(4)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def a_mask():
    return torch.arange(T) < torch.tensor([[1], [8], [3], [5], [2], [7]])


def stand_in(**settings):
    """What the loss methods read of a trainer; a metric may be anything."""
    trainer = MagicMock(spec=[])
    trainer.model = SimpleNamespace(training=True)
    trainer.accelerator = MagicMock(device=torch.device("cpu"), num_processes=1)
    trainer.accelerator.gather = trainer.accelerator.gather_for_metrics = lambda x: x
    trainer._metrics = {"train": defaultdict(list)}
    trainer._total_train_tokens = 0
    trainer._tp_size = 1
    trainer.current_gradient_accumulation_steps = 1
    for name, value in settings.items():
        setattr(trainer, name, value)
    return trainer


def close(actual, wanted):
    torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


def test_log_probs_and_entropy(draw):
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    logits, targets = draw(B, T, V), torch.randint(0, V, (B, T))
    log_probs, entropy = token_log_probs(logits, targets)
    close(log_probs, selective_log_softmax(logits, targets))
    close(entropy, entropy_from_logits(logits))


@pytest.mark.parametrize("reduction, loss_type", [
    ("sequence", "grpo"), ("token", "dapo"), ("token", "bnpo"), ("constant", "dr_grpo")
])  # fmt: skip
@pytest.mark.parametrize("beta, above", [(0.0, 0.2), (0.04, 0.272)])
def test_grpo(draw, reduction, loss_type, beta, above):
    from trl.trainer.grpo_trainer import GRPOTrainer

    new, old, reference, advantages = draw(B, T), draw(B, T), draw(B, T), draw(B)
    mask = a_mask()
    args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    leaf = new.clone().requires_grad_()
    trainer = stand_in(
        args=args, beta=beta, loss_type=loss_type, epsilon_low=0.2, epsilon_high=above,
        importance_sampling_level="token", top_entropy_quantile=1.0, aux_loss_enabled=False,
        off_policy_mask_threshold=None, use_vllm=False, max_completion_length=20,
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, torch.zeros(B, T), None),
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(B, 1), "prompt_mask": torch.ones(B, 1),
        "completion_ids": torch.zeros(B, T), "completion_mask": mask.long(),
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    wanted = GRPOTrainer._compute_loss(trainer, None, inputs)
    wanted.backward()
    new.requires_grad_()
    losses, _ = grpo_losses(new, old, advantages[:, None], mask, reference, beta, 0.2, above)
    total, count = reduced(losses, mask, reduction, max_length=20)
    (total / count).backward()
    close(total / count, wanted)
    close(new.grad, leaf.grad)


@pytest.mark.parametrize("loss_type, smoothing", [("sigmoid", 0.0), ("ipo", 0.0), ("aot", 0.1)])
def test_dpo(draw, loss_type, smoothing):
    """trl's "aot" loss of a single pair is DPO's with label smoothing."""
    from trl.trainer.dpo_trainer import DPOTrainer

    beta, n = 0.3, 1 if loss_type == "aot" else B // 2
    of_tokens, reference, mask = draw(2 * n, T), draw(2 * n), a_mask()[: 2 * n]
    leaf = torch.where(mask, of_tokens, 0.0).requires_grad_()
    with_prompt = torch.cat([torch.zeros(2 * n, 1, dtype=torch.bool), mask], 1)
    trainer = stand_in(
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, loss_types=[loss_type],
        f_divergence_type="reverse_kl", loss_weights=[1.0], beta=beta, label_smoothing=smoothing,
        use_weighting=False,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(2 * n, T + 1, dtype=torch.long),
        "completion_mask": with_prompt.long(),
        "ref_chosen_logps": reference[:n], "ref_rejected_logps": reference[n:],
        "attention_mask": torch.ones(2 * n, T + 1),
    }  # fmt: skip
    shown = torch.zeros(2 * n, T)  # what only its metrics read
    output = SimpleNamespace(log_probs=leaf, entropy=shown, mean_logits=shown, is_top1=shown > 0)
    wanted = DPOTrainer._compute_loss(trainer, lambda **_: output, inputs, False)
    wanted.backward()
    own = of_tokens.clone().requires_grad_()
    lengths = mask.sum(-1) if loss_type == "ipo" else 1
    sums = torch.where(mask, own, 0.0).sum(-1) / lengths
    rewards = dpo_rewards(sums, reference / lengths, beta)
    differences = rewards[:n] - rewards[n:]
    losses = (
        ipo_losses(differences, beta)
        if loss_type == "ipo"
        else preference_losses(differences, smoothing)
    )
    losses.mean().backward()
    close(losses.mean(), wanted)
    close(own.grad, torch.where(mask, leaf.grad, 0.0))


def test_ranking_of_two(draw):
    from trl.trainer.reward_trainer import RewardTrainer

    scores = draw(B, 2)
    trainer = stand_in(args=SimpleNamespace(center_rewards_coefficient=None))
    logits = scores.T.reshape(-1, 1).clone().requires_grad_()
    inputs = {"attention_mask": torch.ones(1)}
    wanted = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=logits), inputs)
    wanted.backward()
    scores.requires_grad_()
    ranks = torch.tensor([[1, 2]]).expand(B, 2)
    losses, _ = ranking_losses(scores, ranks, torch.ones(B, 2, dtype=torch.bool))
    losses.mean().backward()
    close(losses.mean(), wanted)
    close(scores.grad, logits.grad.view(2, B).T)
