"""A hundred steps of a tiny model, loss by loss: nothing may change what training does unseen."""

import pytest
import torch

from cs_lm.config.model import ModelConfig
from cs_lm.config.optim import OptimConfig
from cs_lm.data.batches import Batch
from cs_lm.models.transformer import TransformerLM
from cs_lm.ops.fused import OPS
from cs_lm.optim.adamw import AdamW
from cs_lm.optim.param_groups import parameter_groups
from cs_lm.optim.schedule import learning_rate
from cs_lm.training.step import train_step
from tests.tolerances import PINNED

B, T, V, STEPS = 4, 11, 17, 100
# Losses [nats per token] before steps 0, 10, 20, ... of CLEAR, float32.
LOSSES = [3.13840, 2.31160, 1.56677, 1.05288, 0.72806, 0.49047, 0.38767, 0.33016, 0.30602, 0.51909]


def tokens() -> torch.Tensor:
    """A text with rules that a model can learn: each token follows from the two before it."""
    ids = [1, 2]
    while len(ids) < 2000:
        ids.append((ids[-1] * ids[-2] + 3 * ids[-1] + len(ids) % 5) % V)
    return torch.tensor(ids)


def losses(ops: str) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    model = TransformerLM(ModelConfig(12, 3, 20, V, 2, T), OPS[ops], generator=generator)
    optim = OptimConfig(1e-2, 1e-3, 0.1, 0.9, 0.1, (0.9, 0.95), 1e-8, 1.0)
    optimizer = AdamW(parameter_groups(model, optim.weight_decay), betas=optim.betas, eps=optim.eps)
    text = tokens()
    found = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, optim)
        starts = [(step * B + row) * T % (len(text) - T - 1) for row in range(B)]
        x = torch.stack([text[start : start + T] for start in starts])
        y = torch.stack([text[start + 1 : start + T + 1] for start in starts])
        loss, _ = train_step(model, optimizer, [Batch(x, y)], optim.max_norm)
        found.append(loss.item())
    return found[::10]


@pytest.mark.parametrize("ops", OPS)
def test_pinned_curve(ops):
    assert losses(ops) == pytest.approx(LOSSES, rel=PINNED)
