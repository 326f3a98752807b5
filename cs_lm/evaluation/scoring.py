"""How surprised a model is by each token of a text."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from cs_lm.evaluation.perplexity import evaluation_windows, padded, rows_per_pass
from cs_lm.models.base import LanguageModel, evaluating
from cs_lm.ops.reference import log_softmax


class TokenScore(NamedTuple):
    """How a model saw one token coming.

    nats          -log of its probability; None for the first token, which nothing precedes
    rank          how many tokens were more likely
    alternatives  the most likely ids with their nats, best first
    """

    token_id: int
    nats: float | None
    rank: int | None
    alternatives: list[tuple[int, float]]


@torch.no_grad()
def score_tokens(
    model: LanguageModel, token_ids: Sequence[int], num_alternatives: int = 0
) -> list[TokenScore]:
    """The score of each token, given the tokens before it.

    A text longer than the context is read in windows that overlap by half, so that each token
    sees at least half a context.
    """
    scores = [TokenScore(token_ids[0], None, None, [])] if token_ids else []
    if len(token_ids) < 2:
        return scores
    ids = np.asarray(token_ids, np.int64)
    context = model.config.context_length
    seq_length = min(context, len(ids) - 1)
    windows = evaluation_windows(len(ids), seq_length, stride=max(1, seq_length // 2))
    per_batch = rows_per_pass(model, seq_length)
    with evaluating(model):
        for first in range(0, len(windows), per_batch):
            batch = windows[first : first + per_batch]
            inputs, targets = padded([ids[w.start : w.end] for w in batch], seq_length)
            inputs, targets = (x.to(model.output_embedding.device) for x in (inputs, targets))
            log_probs = log_softmax(model(inputs))  # (n, T, V)
            chosen = log_probs.gather(-1, targets.clamp(min=0).unsqueeze(-1))  # (n, T, 1)
            ranks = (log_probs > chosen).sum(-1)
            best = log_probs.topk(min(num_alternatives, log_probs.shape[-1]))
            for row, window in enumerate(batch):
                for t in range(window.num_old, window.end - window.start - 1):
                    found = zip(best.indices[row, t].tolist(), (-best.values[row, t]).tolist())
                    nats, rank = -float(chosen[row, t]), int(ranks[row, t])
                    scores.append(TokenScore(int(targets[row, t]), nats, rank, list(found)))
    return scores


class ScoreSummary(NamedTuple):
    """The scored tokens of a text together."""

    num_tokens: int
    num_bytes: int
    loss_nats: float

    @property
    def bits_per_byte(self) -> float:
        return self.loss_nats * self.num_tokens / math.log(2) / max(1, self.num_bytes)


def summary(scores: Sequence[TokenScore], vocab: dict[int, bytes]) -> ScoreSummary:
    """Without the first token, which has no score."""
    scored = [score for score in scores if score.nats is not None]
    total = sum(score.nats for score in scored)
    num_bytes = sum(len(vocab[score.token_id]) for score in scored)
    return ScoreSummary(len(scored), num_bytes, total / max(1, len(scored)))
