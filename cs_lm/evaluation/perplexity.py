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
from cs_lm.errors import UserError
from cs_lm.models.base import LanguageModel, evaluating, next_token_loss
from cs_lm.ops.reference import IGNORE_INDEX


@dataclass(frozen=True)
class Evaluation:
    """Sums over the evaluated tokens, and the means that follow from them."""

    loss_sum_nats: float
    num_tokens: int
    num_bytes: int

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


def evaluation_starts(num_tokens: int, seq_length: int, max_tokens: int | None) -> list[int]:
    """Start positions of the windows to evaluate: all, or a fixed choice of evenly spaced ones.

    Windows do not overlap; the last one may be shorter, so that every token but the first is
    predicted once.
    Raises: UserError for fewer than two tokens: nothing to predict.
    """
    if num_tokens < 2:
        raise UserError(f"validation: got {num_tokens} tokens, need at least 2; give a longer text")
    num_windows = math.ceil((num_tokens - 1) / seq_length)
    wanted = num_windows
    if max_tokens is not None:
        wanted = min(num_windows, max(1, max_tokens // seq_length))
    return [i * num_windows // wanted * seq_length for i in range(wanted)]


class EvalOptions(NamedTuple):
    """Options of `evaluate`.

    seq_length  length of a window [tokens]
    batch_size  windows in one forward pass; it changes the speed, not the result
    max_tokens  evaluate about this many, evenly spaced; None: all
    """

    seq_length: int
    batch_size: int
    max_tokens: int | None = None


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    tokens: Tokens,
    byte_lengths: np.ndarray,
    options: EvalOptions,
    loss: Callable[[Any, Any], tuple[Tensor, Tensor]] = next_token_loss,
    on_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """The model's loss on the tokens, window by window. Restores the model's mode.

    byte_lengths  of the tokens, as `token_byte_lengths` gives them
    loss          (model, batch) -> sum [nats] and count
    on_batch      called before each batch; if it raises an exception, the evaluation ends
    """
    device, seq_length = model.output_embedding.device, options.seq_length
    starts = evaluation_starts(len(tokens), seq_length, options.max_tokens)
    loss_sum, num_tokens, num_bytes = 0.0, 0, 0
    with evaluating(model):
        for first in range(0, len(starts), options.batch_size):
            on_batch()
            rows = [
                tokens.load_by_range(s, min(s + seq_length + 1, len(tokens)))
                for s in starts[first : first + options.batch_size]
            ]
            inputs, targets = (x.to(device) for x in _padded(rows, seq_length))
            batch_sum, batch_count = loss(model, Batch(inputs, targets))
            loss_sum += batch_sum.item()
            num_tokens += int(batch_count)
            num_bytes += sum(int(byte_lengths[row[1:]].sum()) for row in rows)
    return Evaluation(loss_sum, num_tokens, num_bytes)


def gzip_bits_per_byte(
    tokens: Tokens, vocab: Mapping[int, bytes], seq_length: int, max_tokens: int | None = None
) -> float:
    """Bits that `gzip -9` needs for a byte of the text that `evaluate` reads, to compare with."""
    compressor = zlib.compressobj(9, wbits=31)  # 31: gzip's header and the largest window
    num_bytes = num_compressed = 0
    for start in evaluation_starts(len(tokens), seq_length, max_tokens):
        row = tokens.load_by_range(start + 1, min(start + seq_length + 1, len(tokens)))
        text = b"".join([vocab[i] for i in row.tolist()])
        num_bytes += len(text)
        num_compressed += len(compressor.compress(text))
    num_compressed += len(compressor.flush())
    return 8 * num_compressed / num_bytes


def _padded(rows: list[np.ndarray], seq_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs x and targets y (B, T). Short rows are padded at the end.

    There y is IGNORE_INDEX, and the causal mask hides the padding from the other positions.
    """
    x = torch.zeros(len(rows), seq_length, dtype=torch.int64)
    y = torch.full((len(rows), seq_length), IGNORE_INDEX)
    for i, row in enumerate(rows):
        ids = torch.from_numpy(row.astype(np.int64))
        x[i, : len(ids) - 1], y[i, : len(ids) - 1] = ids[:-1], ids[1:]
    return x, y
