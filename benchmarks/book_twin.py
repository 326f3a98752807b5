"""The book's GPT-2 from torch.nn layers, trained in the way that the book describes.

It exists to show what the books' experiment gives with torch's own parts, seed for seed.
Source of the settings: Raschka 2024, Build a large language model (from scratch), chapters 4 and 5.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Sizes(NamedTuple):
    """Of a model; the defaults are the book's."""

    vocab_size: int = 50_257
    context_length: int = 256
    d_model: int = 768
    num_heads: int = 12
    num_layers: int = 12
    drop_rate: float = 0.1


BOOK = Sizes()
BATCH_SIZE, LR, WEIGHT_DECAY = 2, 4e-4, 0.1
TRAIN_FRACTION = 0.9  # of the characters
NUM_EVALUATED_BATCHES = 5


class Attention(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        d_model, length = sizes.d_model, sizes.context_length
        self.num_heads = sizes.num_heads
        self.query, self.key, self.value = (
            nn.Linear(d_model, d_model, bias=False) for _ in range(3)
        )
        self.output = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(sizes.drop_rate)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        self.register_buffer("future", future, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        future = self.future[: x.shape[1], : x.shape[1]]
        scores = (q @ k.transpose(2, 3)).masked_fill(future, -torch.inf)
        weights = self.dropout(torch.softmax(scores / k.shape[-1] ** 0.5, dim=-1))
        return self.output((weights @ v).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        d_model = sizes.d_model
        self.attention = Attention(sizes)
        self.feed_forward = nn.Sequential(
            nn.Linear(d_model, 4 * d_model),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * d_model, d_model),
        )
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(sizes.drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class BookGPT(nn.Module):
    """The layers stand in the order in which the book draws their weights."""

    def __init__(self, sizes: Sizes = BOOK):
        super().__init__()
        self.token_embeddings = nn.Embedding(sizes.vocab_size, sizes.d_model)
        self.position_embeddings = nn.Embedding(sizes.context_length, sizes.d_model)
        self.dropout = nn.Dropout(sizes.drop_rate)
        self.blocks = nn.Sequential(*(Block(sizes) for _ in range(sizes.num_layers)))
        self.norm = nn.LayerNorm(sizes.d_model)
        self.head = nn.Linear(sizes.d_model, sizes.vocab_size, bias=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        positions = torch.arange(token_ids.shape[1])
        x = self.dropout(self.token_embeddings(token_ids) + self.position_embeddings(positions))
        return self.head(self.norm(self.blocks(x)))


def windows(token_ids: Sequence[int], length: int = BOOK.context_length) -> TensorDataset:
    """Windows that follow one another; the last token is only ever a target."""
    starts = range(0, len(token_ids) - length, length)
    rows = torch.tensor([token_ids[s : s + length + 1] for s in starts])
    return TensorDataset(rows[:, :-1], rows[:, 1:])


def loaders(
    encode: Callable[[str], list[int]], text: str, seed: int
) -> tuple[DataLoader, DataLoader]:
    """Of the training and the validation text; the order of the first follows from torch's seed."""
    torch.manual_seed(seed)
    border = int(TRAIN_FRACTION * len(text))
    train, valid = windows(encode(text[:border])), windows(encode(text[border:]))
    return (
        DataLoader(train, BATCH_SIZE, shuffle=True, drop_last=True),
        DataLoader(valid, BATCH_SIZE),
    )


def batch_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


@torch.no_grad()
def mean_loss(model: nn.Module, loader: DataLoader) -> float:
    losses = [batch_loss(model, x, y).item() for x, y in first_batches(loader)]
    return sum(losses) / len(losses)


def first_batches(loader: DataLoader) -> list[list[Tensor]]:
    """Its first batches, in the order of a new pass."""
    return [batch for _, batch in zip(range(NUM_EVALUATED_BATCHES), loader)]


def train(
    encode: Callable[[str], list[int]],
    text: str,
    seed: int,
    num_epochs: int,
    eval_interval: int,
    on_losses: Callable[[int, float, float], None],
) -> None:
    """Calls `on_losses(updates, train, validation)` [nats per token] after 1, 6, ... updates."""
    train_loader, valid_loader = loaders(encode, text, seed)
    torch.manual_seed(seed)
    model = BookGPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    num_updates = 0

    def evaluate() -> None:
        model.eval()
        on_losses(num_updates, mean_loss(model, train_loader), mean_loss(model, valid_loader))
        model.train()

    for _ in range(num_epochs):
        model.train()
        for x, y in train_loader:
            optimizer.zero_grad()
            batch_loss(model, x, y).backward()
            optimizer.step()
            num_updates += 1
            if num_updates % eval_interval == 1:
                evaluate()
    evaluate()
