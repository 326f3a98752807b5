"""The classes of the course's sixth lecture, under the lecture's names, built on this library.

The lecture's listings run unchanged with `from cs_lm.lecture import *`. Where the lecture's formula
differs from the usual one, the class follows the lecture, and its docstring says so.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cs_lm.config.data import DataConfig
from cs_lm.config.model import ModelConfig
from cs_lm.data.batches import load_windows
from cs_lm.data.corpus import find_corpus
from cs_lm.data.stores import find_or_encode_store, find_store
from cs_lm.data.token_store import MemmapManager
from cs_lm.errors import Problem, UserError
from cs_lm.models.transformer import TransformerLM
from cs_lm.ops import reference as ops
from cs_lm.optim.adamw import AdamW
from cs_lm.optim.clip import clip_gradients
from cs_lm.optim.schedule import cosine_schedule
from cs_lm.storage.lock import FileLock
from cs_lm.tokenizer import BPETokenizer
from cs_lm.training.checkpoint import load_checkpoint, save_checkpoint

__all__ = [
    "AdamW_Optimizer",
    "BPE_Tokenizer",
    "Batch_By_Memmap",
    "Checkpoint_Manager",
    "Cross_Entropy_Calculator",
    "Gradient_Clipper",
    "Learning_Rate_Scheduler",
    "Log_Softmax",
    "Memmap_Manager",
    "Transformer_LM",
]


class BPE_Tokenizer(BPETokenizer):
    """`BPETokenizer` under the lecture's name; all other methods are inherited."""

    @classmethod
    def from_files(
        cls,
        vocab_path: str | Path,
        merge_path: str | Path,
        special_tokens: Sequence[str] | None = None,
    ) -> "BPE_Tokenizer":
        return super().from_files(vocab_path, merge_path, special_tokens or ())


class Memmap_Manager:
    """A text as token ids on disk, in files of `chunk_size` ids.

    corpus_size  the label of the corpus: the store is in data/<label>_chunks-<fingerprint>/
    """

    def __init__(
        self,
        chunk_size: int,
        vocab_path: str,
        merge_path: str,
        special_tokens: Sequence[str],
        corpus_path: str,
        corpus_size: str,
    ):
        self._data = DataConfig(
            corpus_path=corpus_path,
            corpus_size=corpus_size,
            chunk_size=chunk_size,
            vocab_path=vocab_path,
            merges_path=merge_path,
            special_tokens=tuple(special_tokens),
        )
        self._tokenizer = BPE_Tokenizer.from_files(vocab_path, merge_path, special_tokens)
        self._opened: MemmapManager | None = None
        self._lock: FileLock | None = None  # nobody removes the store while it is held

    def save_as_memmap(self) -> None:
        """Encodes the corpus, unless its store exists already."""
        corpus = find_corpus(self._data)
        self._opened, self._lock = find_or_encode_store(corpus, self._tokenizer)

    def load_by_range(self, start_idx: int, end_idx: int) -> np.ndarray:
        """The ids [start_idx, end_idx). Raises: ValueError for a range outside the store."""
        return self._store.load_by_range(start_idx, end_idx)

    def __len__(self) -> int:
        """The number of ids: the lecture's dataset_length."""
        return len(self._store)

    @property
    def _store(self) -> MemmapManager:
        if self._opened is None:  # saved by an earlier process
            corpus = find_corpus(self._data)
            self._opened = find_store(corpus, self._tokenizer)
            if self._opened is None:
                what, fix = f"{corpus.shown} is not encoded yet", "call save_as_memmap() first"
                raise UserError(Problem("Memmap_Manager", what, fix=fix))
        return self._opened


class Batch_By_Memmap:
    """Random windows of a store."""

    def __init__(self, manager: Memmap_Manager):
        self._manager = manager

    def get_batch(
        self, bsz: int, seq_len: int, dataset_length: int, device: torch.device | str
    ) -> tuple[Tensor, Tensor]:
        """Random windows x, and y = x shifted by one token; both (bsz, seq_len) int64.

        torch's global generator draws the starts from 0 to dataset_length - seq_len - 2, both
        included. This omits the last window, as the lecture does; `data.batches.sample_windows`
        includes it.
        Raises: UserError for a dataset too short for one such window.
        """
        num_starts = dataset_length - seq_len - 1
        if num_starts < 1:
            what, need = f"got {dataset_length}", f"at least {seq_len + 2} for one window"
            raise UserError(Problem("dataset_length", what, need))
        starts = torch.randint(num_starts, (bsz,)).numpy()
        return load_windows(self._manager, starts, seq_len, torch.device(device))


class AdamW_Optimizer(AdamW):
    """AdamW in the lecture's order:

        p <- p - lr sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)
        p <- p - lr weight_decay p

    `AdamW` is the usual form. It adds eps after the bias correction, which reduces the effect of
    eps by the factor sqrt(1 - beta2^t), and it applies the weight decay before the update.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        super().__init__(parameters, lr, betas, eps, weight_decay)

    def _update(
        self, tensors: tuple[list[Tensor], ...], step: int, group: dict, should_apply: Tensor | None
    ) -> None:
        correction = (1 - group["betas"][1] ** step) ** 0.5
        # `AdamW` multiplies eps by the correction: divide by it first, so that the two cancel
        own = {**group, "eps": group["eps"] / correction, "weight_decay": 0.0}
        super()._update(tensors, step, own, should_apply)
        decay = 1 - group["lr"] * group["weight_decay"]
        if should_apply is not None:
            decay = torch.where(should_apply, decay, 1.0)
        torch._foreach_mul_(tensors[0], decay)


class Log_Softmax:
    """`ops.log_softmax` along one dimension."""

    def __init__(self, dim: int):
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return ops.log_softmax(x, self.dim)

    __call__ = forward


class Cross_Entropy_Calculator:
    """Mean cross-entropy of the targets [nats per token]."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """inputs (..., V) logits, targets (...) int64, returns () the mean."""
        loss_sum, count = ops.cross_entropy(inputs, targets)
        return loss_sum / count.clamp(min=1)

    __call__ = forward


class Gradient_Clipper:
    """Scales gradients down to a joint L2 norm of at most `max_norm`."""

    def __init__(self, max_norm: float):
        self.max_norm = max_norm

    def clip(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Clips in place; returns the norm before clipping."""
        return clip_gradients(parameters, self.max_norm)


class Learning_Rate_Scheduler:
    """Learning rate: linear warm-up, then a cosine decay, then constant."""

    def get_lr(self, step: int, lr_max: float, lr_min: float, Tw: int, Tc: int) -> float:
        """The learning rate at a step. Step 0 of the warm-up has rate 0, so it changes nothing.

        `optim.schedule.learning_rate` is one step ahead, so that no update is wasted.
        """
        return cosine_schedule(step, lr_max, lr_min, Tw, Tc)


class Checkpoint_Manager:
    """One file for model, optimizer and iteration; it is written completely or not at all."""

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        iteration: int,
        save_path: str | Path,
    ) -> None:
        save_checkpoint(model, optimizer, iteration, save_path)

    def load(
        self,
        src_path: str | Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> int:
        """Returns the iteration."""
        return load_checkpoint(src_path, model, optimizer)


class Transformer_LM(TransformerLM):
    """`TransformerLM` with the lecture's arguments."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int,
        vocab_size: int,
        num_layers: int,
        max_seq_length: int,
        theta: float,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        config = ModelConfig(
            d_model, num_heads, d_ff, vocab_size, num_layers, max_seq_length, theta
        )
        super().__init__(config, device=device)
        if dtype is not None:
            self.to(dtype)
