"""How well a model predicts a fixed text: loss, perplexity, bits per byte."""

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cs_lm.data.batches import Batch
from cs_lm.data.token_store import Tokens
from cs_lm.distributed.ranks import ALONE, Ranks, wide_dtype
from cs_lm.errors import UserError
from cs_lm.models.base import LanguageModel, evaluating, next_token_loss
from cs_lm.ops.reference import IGNORE_INDEX


@dataclass(frozen=True)
class Evaluation:
    """Sums over the evaluated tokens, and the means that follow from them."""

    loss_sum_nats: float
    num_tokens: int
    num_bytes: int

    def __add__(self, other: "Evaluation") -> "Evaluation":
        """Both texts together."""
        return Evaluation(
            self.loss_sum_nats + other.loss_sum_nats,
            self.num_tokens + other.num_tokens,
            self.num_bytes + other.num_bytes,
        )

    @property
    def loss_nats(self) -> float:
        """Mean surprise of a token [nats]."""
        return self.loss_sum_nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp(loss): the model is as unsure as between this many equally likely tokens."""
        return math.exp(min(self.loss_nats, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs for a byte of text; comparable between tokenizers."""
        return self.loss_sum_nats / math.log(2) / self.num_bytes

    def record(self) -> dict[str, Any]:
        """The values for the log of a run."""
        return {
            "loss_nats": self.loss_nats,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "num_scored_tokens": self.num_tokens,
        }


def format_evaluation(record: dict[str, Any], gzip: float) -> str:
    return (
        f"validation: loss {record['loss_nats']:.4f} nats/token, perplexity "
        f"{record['perplexity']:.2f}, {record['bits_per_byte']:.4f} bits/byte "
        f"(gzip -9 on the same text: {gzip:.4f})"
    )


def token_byte_lengths(vocab: Mapping[int, bytes]) -> np.ndarray:
    """How many bytes of text each id stands for."""
    lengths = np.zeros(max(vocab) + 1, np.int64)
    for token_id, token in vocab.items():
        lengths[token_id] = len(token)
    return lengths


class Window(NamedTuple):
    """The tokens from `start` to `end`: all but the last are inputs, all but the first targets.

    num_old  targets at the beginning that an earlier window has scored already
    """

    start: int
    end: int
    num_old: int


def evaluation_windows(
    num_tokens: int, seq_length: int, max_tokens: int | None = None, stride: int | None = None
) -> list[Window]:
    """Windows of `seq_length` inputs that predict every token but the first once.

    stride      tokens from one window to the next; below `seq_length`, each token but those of the
                first window sees at least seq_length - stride tokens before it. None: seq_length,
                windows that do not overlap
    max_tokens  take evenly spaced ones of these windows, which predict about this many tokens
    Raises: UserError for fewer than two tokens: nothing to predict.
    """
    if num_tokens < 2:
        raise UserError(f"validation: got {num_tokens} tokens, need at least 2; give a longer text")
    stride = stride or seq_length
    num_windows = 1 + math.ceil(max(0, num_tokens - 1 - seq_length) / stride)
    wanted = num_windows
    if max_tokens is not None:
        wanted = min(num_windows, max(1, max_tokens // stride))
    starts = [i * num_windows // wanted * stride for i in range(wanted)]
    return [
        Window(s, min(s + seq_length + 1, num_tokens), seq_length - stride if s else 0)
        for s in starts
    ]


class EvalOptions(NamedTuple):
    """Options of `evaluate`.

    seq_length  length of a window [tokens]
    batch_size  windows in one forward pass; it changes the speed, not the result
    max_tokens  evaluate about this many, evenly spaced; None: all
    stride      tokens from one window to the next; None: seq_length
    """

    seq_length: int
    batch_size: int
    max_tokens: int | None = None
    stride: int | None = None


_NOTHING = Window(0, 1, 0)  # one token: no target


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    tokens: Tokens,
    byte_lengths: np.ndarray,
    options: EvalOptions,
    loss: Callable[[Any, Any], tuple[Tensor, Tensor]] = next_token_loss,
    on_batch: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """The model's loss on the tokens, window by window. Restores the model's mode.

    byte_lengths  of the tokens, as `token_byte_lengths` gives them
    loss          (model, batch) -> sum [nats] and count
    on_batch      called before each batch; if it raises an exception, the evaluation ends
    ranks         share the windows; all of them do equally many forward passes
    """
    device, seq_length = model.output_embedding.device, options.seq_length
    windows = evaluation_windows(len(tokens), seq_length, options.max_tokens, options.stride)
    most = math.ceil(len(windows) / ranks.size)
    windows = windows[ranks.world(device).share_of(len(windows))]
    loss_sum, num_tokens, num_bytes = 0.0, 0, 0
    with evaluating(model):
        for first in range(0, most, options.batch_size):
            on_batch()
            batch = windows[first : first + options.batch_size] or [_NOTHING]
            rows = [tokens.load_by_range(window.start, window.end) for window in batch]
            inputs, targets = (x.to(device) for x in padded(rows, seq_length))
            for row, window in zip(targets, batch):
                row[: window.num_old] = IGNORE_INDEX
            batch_sum, batch_count = loss(model, Batch(inputs, targets))
            loss_sum += batch_sum.item()
            num_tokens += int(batch_count)
            new_targets = [row[1 + window.num_old :] for row, window in zip(rows, batch)]
            num_bytes += sum(int(byte_lengths[row].sum()) for row in new_targets)
    if ranks.size > 1:
        sums = [loss_sum, num_tokens, num_bytes]
        sums = torch.tensor(sums, dtype=wide_dtype(device), device=device)
        loss_sum, num_tokens, num_bytes = ranks.sum_(sums).tolist()
    return Evaluation(loss_sum, int(num_tokens), int(num_bytes))


def gzip_bits_per_byte(
    tokens: Tokens, vocab: Mapping[int, bytes], seq_length: int, max_tokens: int | None = None
) -> float:
    """Bits that `gzip -9` needs for a byte of the text that `evaluate` reads, to compare with."""
    compressor = zlib.compressobj(9, wbits=31)  # 31: gzip's header and the largest window
    num_bytes = num_compressed = 0
    for window in evaluation_windows(len(tokens), seq_length, max_tokens):
        row = tokens.load_by_range(window.start + 1, window.end)
        text = b"".join([vocab[i] for i in row.tolist()])
        num_bytes += len(text)
        num_compressed += len(compressor.compress(text))
    num_compressed += len(compressor.flush())
    return 8 * num_compressed / num_bytes


# Logits of one forward pass that keeps them all: 64 MB in float32.
_BATCH_LOGITS = 1 << 24


def rows_per_pass(model: LanguageModel, seq_length: int) -> int:
    """How many rows of this length one forward pass takes where all logits are kept."""
    return max(1, _BATCH_LOGITS // (seq_length * model.config.vocab_size))


def padded(rows: list[np.ndarray], seq_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs x and targets y (B, T). Short rows are padded at the end.

    There y is IGNORE_INDEX, and the causal mask hides the padding from the other positions.
    """
    x = torch.zeros(len(rows), seq_length, dtype=torch.int64)
    y = torch.full((len(rows), seq_length), IGNORE_INDEX)
    for i, row in enumerate(rows):
        ids = torch.from_numpy(row.astype(np.int64))
        x[i, : len(ids) - 1], y[i, : len(ids) - 1] = ids[:-1], ids[1:]
    return x, y
