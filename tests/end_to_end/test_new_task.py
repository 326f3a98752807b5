"""A second kind of training is one small subclass: here, a reward model that ranks pairs."""

import dataclasses

import torch
from torch import nn

from cs_lm.config.run import RunConfig
from cs_lm.data.batches import step_seed
from cs_lm.models.layers import Factory, Linear
from cs_lm.optim.adamw import AdamW
from cs_lm.training.run_dir import RunFolder
from cs_lm.training.task import Task
from cs_lm.training.trainer import Trainer
from tests.faults.tiny_run import assert_same_run

NUM_FEATURES, NUM_PAIRS = 6, 16
CONFIG = RunConfig(
    seq_length=16, save_interval=4, eval_interval=8, log_interval=2, grad_accum=2, device="cpu"
)
CONFIG = dataclasses.replace(
    CONFIG, optim=dataclasses.replace(CONFIG.optim, lr=0.2, weight_decay=0.0)
)


class RankingTask(Task):
    """A linear score, trained so that the better one of each pair gets the higher one."""

    def __init__(self, num_steps):
        super().__init__()
        self.model = Linear(NUM_FEATURES, 1, factory=Factory(torch.Generator().manual_seed(0)))
        self.optimizer = AdamW(self.model.parameters())
        self.num_steps, self.tokens_per_step, self.flops_per_token = num_steps, NUM_PAIRS, 6
        self.measure = {"pairs": "held out"}
        self.taste = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, -1.0])

    def pairs(self, seed):
        generator = torch.Generator().manual_seed(seed)
        pairs = torch.randn(NUM_PAIRS, 2, NUM_FEATURES, generator=generator)
        is_swapped = (pairs @ self.taste).diff(dim=-1) > 0
        return torch.where(is_swapped.unsqueeze(-1), pairs.flip(1), pairs)  # the better one first

    def batches_of_step(self, step):
        first = step_seed(7, step) % (1 << 40)
        return [self.pairs(first), self.pairs(first + 1)]

    def loss(self, model: nn.Module, batch):
        margins = -model(batch).squeeze(-1).diff(dim=-1)  # (N, 1)
        losses = torch.log1p(torch.exp(-margins))
        return losses.sum(), torch.tensor(losses.numel())

    def evaluate(self, check_stop):
        check_stop()
        with torch.no_grad():
            loss_sum, count = self.loss(self.model, self.pairs(1))
            is_right = -self.model(self.pairs(1)).squeeze(-1).diff(dim=-1) > 0
        loss = (loss_sum / count).item()
        return {"loss_nats": loss, "accuracy": is_right.float().mean().item()}

    def save(self):
        return {"tokenizer_fingerprint": "none", "taste": self.taste}

    def load(self, extras):
        assert torch.equal(extras["taste"], self.taste)


def train(folder, num_steps, checkpoint=None):
    trainer = Trainer(CONFIG, RankingTask(num_steps), RunFolder(folder), checkpoint)
    assert trainer.fit() == 0
    return trainer


def test_a_reward_model_learns_keeps_its_best_and_resumes(tmp_path, capsys):
    trainer = train(tmp_path / "whole", 40)
    found = trainer.task.evaluate(lambda: None)
    assert found["accuracy"] > 0.8 and found["loss_nats"] < 0.4
    assert trainer.folder.checkpoints.best().measured_on == {"pairs": "held out"}
    shown = capsys.readouterr().out
    assert "step 40 | validation loss" in shown and "done: 40 steps, 640 tokens" in shown


def test_it_goes_on_bit_for_bit(tmp_path):
    train(tmp_path / "whole", 12)
    checkpoint = RunFolder(tmp_path / "whole").checkpoints.read(8)
    (tmp_path / "cut").mkdir()
    folder = RunFolder(tmp_path / "cut")
    folder.checkpoints.save(checkpoint)
    folder.metrics.write_bytes((tmp_path / "whole" / "metrics.jsonl").read_bytes())
    train(tmp_path / "cut", 12, checkpoint)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
