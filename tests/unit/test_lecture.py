"""The lecture's names: its whole training loop, and each place where its formula is its own."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cs_lm import train_bpe
from cs_lm.data.batches import sample_windows
from cs_lm.data.token_store import ArrayTokens
from cs_lm.errors import UserError
from cs_lm.lecture import (
    AdamW_Optimizer,
    Batch_By_Memmap,
    BPE_Tokenizer,
    Checkpoint_Manager,
    Cross_Entropy_Calculator,
    Gradient_Clipper,
    Learning_Rate_Scheduler,
    Log_Softmax,
    Memmap_Manager,
    Transformer_LM,
)
from cs_lm.optim.adamw import AdamW
from tests.end_to_end.conftest import write_corpus
from tests.tolerances import close

END = "<|endoftext|>"
SIZES = {
    "d_model": 24,
    "num_heads": 3,
    "d_ff": 40,
    "vocab_size": 280,
    "num_layers": 2,
    "max_seq_length": 16,
    "theta": 10_000.0,
}


@pytest.fixture
def manager(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = write_corpus(tmp_path)
    vocab, merges = train_bpe(text, 280, [END])
    BPE_Tokenizer(vocab, merges, [END]).save("vocab.json", "merges.txt")
    return Memmap_Manager(
        chunk_size=1000,
        vocab_path="vocab.json",
        merge_path="merges.txt",
        special_tokens=[END],
        corpus_path="animals.txt",
        corpus_size="animals",
    )


def train(manager, num_steps, model, optimizer, first=0):
    """The loop as the lecture describes it."""
    batches, scheduler = Batch_By_Memmap(manager), Learning_Rate_Scheduler()
    loss_of, clipper = Cross_Entropy_Calculator(), Gradient_Clipper(max_norm=1.0)
    losses = []
    for step in range(first, num_steps):
        torch.manual_seed(step)
        lr = scheduler.get_lr(step, lr_max=1e-2, lr_min=1e-3, Tw=5, Tc=50)
        for group in optimizer.param_groups:
            group["lr"] = lr
        inputs, targets = batches.get_batch(8, 16, len(manager), "cpu")
        loss = loss_of.forward(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        clipper.clip(model.parameters())
        optimizer.step()
        losses.append(loss.item())
    return losses


def new_model_and_optimizer():
    torch.manual_seed(0)
    model = Transformer_LM(**SIZES, dtype=torch.float32, device="cpu")
    betas, eps = (0.9, 0.95), 1e-8
    return model, AdamW_Optimizer(model.parameters(), 1e-2, 0.1, betas, eps)


def test_the_whole_loop_learns_and_resumes(manager):
    manager.save_as_memmap()
    model, optimizer = new_model_and_optimizer()
    losses = train(manager, 40, model, optimizer)
    assert losses[-1] < losses[0] - 1.5
    first, first_optimizer = new_model_and_optimizer()
    train(manager, 20, first, first_optimizer)
    Checkpoint_Manager().save(first, first_optimizer, 20, "a.pt")
    resumed, resumed_optimizer = new_model_and_optimizer()
    iteration = Checkpoint_Manager().load("a.pt", resumed, resumed_optimizer)
    assert iteration == 20
    assert train(manager, 40, resumed, resumed_optimizer, iteration) == losses[20:]


def test_the_store_is_found_again_and_holds_the_text(manager):
    manager.save_as_memmap()
    tokenizer = BPE_Tokenizer.from_files("vocab.json", "merges.txt", [END])
    text = Path("animals.txt").read_text(encoding="utf-8")
    expected = list(tokenizer.encode_iterable(iter(text.splitlines(keepends=True))))
    later = Memmap_Manager(1000, "vocab.json", "merges.txt", [END], "animals.txt", "animals")
    assert later.load_by_range(0, len(later)).tolist() == expected
    assert tokenizer.decode(later.load_by_range(995, 1010).tolist()) in text
    with pytest.raises(ValueError, match="need a range inside"):
        later.load_by_range(0, len(later) + 1)


def test_a_text_that_has_changed_is_not_the_saved_one(manager):
    manager.save_as_memmap()
    with open("animals.txt", "a", encoding="utf-8") as file:
        file.write("One more line.\n")
    later = Memmap_Manager(1000, "vocab.json", "merges.txt", [END], "animals.txt", "animals")
    with pytest.raises(UserError, match="animals.txt is not encoded yet; call save_as_memmap"):
        len(later)
    later.save_as_memmap()
    assert len(later) > len(manager)
    again = Memmap_Manager(1000, "vocab.json", "merges.txt", [END], "animals.txt", "animals")
    assert len(again) == len(later)


def test_the_last_window_is_left_out(manager, monkeypatch):
    """Ours takes it: the two differ by one start."""
    manager.save_as_memmap()
    starts = set()
    monkeypatch.setattr(
        "cs_lm.lecture.load_windows", lambda _manager, drawn, *_: starts.update(drawn.tolist())
    )
    for _ in range(50):
        Batch_By_Memmap(manager).get_batch(8, 5, dataset_length=12, device="cpu")
    assert starts == set(range(12 - 5 - 1))
    ours = np.concatenate(
        [sample_windows(ArrayTokens(np.arange(12)), 8, 5, 0)(i) for i in range(50)]
    )
    assert set(ours.tolist()) == starts | {12 - 5 - 1}
    with pytest.raises(UserError, match="dataset_length: got 6, need at least 7"):
        Batch_By_Memmap(manager).get_batch(1, 5, 6, "cpu")


def by_hand(parameter, gradients, lr, weight_decay, betas, eps, is_lecture):
    """Float64, one formula after the other."""
    p, m, v = (torch.tensor(x, dtype=torch.float64) for x in (parameter, 0.0, 0.0))
    for t, g in enumerate(gradients, start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        if is_lecture:
            step_size = lr * (1 - betas[1] ** t) ** 0.5 / (1 - betas[0] ** t)
            p = p - step_size * m / (v.sqrt() + eps)
            p = p - lr * weight_decay * p
        else:
            p = p - lr * weight_decay * p
            p = p - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return p


@pytest.mark.parametrize("optimizer_class", [AdamW_Optimizer, AdamW])
def test_adamw_of_the_lecture_and_of_the_field(optimizer_class):
    """With an eps that weighs, so that the two orders give different numbers."""
    settings = {"lr": 0.1, "weight_decay": 0.2, "betas": (0.9, 0.99), "eps": 0.05}
    gradients = [0.3, -0.2, 0.05, 0.4]
    parameter = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = optimizer_class([parameter], **settings)
    for gradient in gradients:
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
    same, other = (
        by_hand(2.0, gradients, is_lecture=is_lecture, **settings)
        for is_lecture in (optimizer_class is AdamW_Optimizer, optimizer_class is AdamW)
    )
    close(parameter.detach()[0], same)
    assert abs(parameter.item() - other.item()) > 1e-3


def test_the_schedule_starts_at_zero():
    get_lr = Learning_Rate_Scheduler().get_lr
    assert [get_lr(step, 1.0, 0.1, 4, 10) for step in (0, 2, 4, 10, 99)] == [0, 0.5, 1, 0.1, 0.1]
    assert get_lr(7, 1.0, 0.1, 4, 10) == pytest.approx(0.55)


def test_log_softmax_loss_and_clipper(generator):
    x = torch.randn(3, 4, 5, generator=generator)
    close(Log_Softmax(dim=1).forward(x), torch.log_softmax(x, 1))
    targets = torch.randint(5, (3, 4), generator=generator)
    expected = torch.nn.functional.cross_entropy(x.flatten(0, 1), targets.flatten())
    close(Cross_Entropy_Calculator().forward(x, targets), expected)
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.tensor([3.0, 0.0, 4.0, 0.0])
    norm = Gradient_Clipper(max_norm=1.0).clip([weight])
    assert norm.item() == 5.0 and weight.grad.norm().item() == pytest.approx(1, abs=1e-5)


def test_a_model_of_another_dtype():
    model = Transformer_LM(**SIZES, dtype=torch.float64)
    assert model(torch.zeros(2, 3, dtype=torch.int64)).dtype == torch.float64
