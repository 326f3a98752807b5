"""A reward model: one number for an answer, learnt from rankings.

    loss of a prompt = the mean of -log sigmoid(r_better - r_worse) over all pairs of its answers

Each different answer is one row of one forward pass, whatever the number of pairs that it is in,
and each prompt weighs the same. Source: Ouyang et al. 2022, section 3.5.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cs_lm.alignment.conversations import Conversation, Message, Template
from cs_lm.alignment.examples import padded_rows
from cs_lm.alignment.losses import ranking_losses
from cs_lm.alignment.records import Ranking
from cs_lm.config.model import ArchitectureConfig
from cs_lm.errors import UserError
from cs_lm.models.base import evaluating
from cs_lm.models.layers import Linear
from cs_lm.models.registry import build_model
from cs_lm.ops.fused import FAST
from cs_lm.ops.reference import Ops


class ScalarModel(nn.Module):
    """A Transformer with one number at each position, in place of logits.

    `offset` is subtracted from scores, so that those of a reference have mean 0. A loss does not
    use it: differences of scores would round differently.

    generator  draws the initial weights; None: torch's global generator
    """

    def __init__(
        self,
        config: ArchitectureConfig,
        ops: Ops = FAST,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.config = config
        self.trunk = build_model(config, ops, generator=generator, device=device)
        self.trunk.lm_head = None  # no logits
        self.head = Linear(config.d_model, 1, bias=True, ops=ops)
        std = 1 / math.sqrt(config.d_model + 1)
        with torch.no_grad():
            self.head.weight.normal_(0, std, generator=generator)
        self.head.to(device)
        self.register_buffer("offset", torch.zeros((), device=device))

    def load_trunk(self, weights: dict[str, Tensor]) -> None:
        """Takes the weights of a language model, whose head is left out."""
        own = self.trunk.state_dict()
        self.trunk.load_state_dict({name: weights[name] for name in own})

    def seed_dropout(self, seed: int) -> None:
        self.trunk.seed_dropout(seed)

    def forward(self, token_ids: Tensor) -> Tensor:
        """The number at each position: (B, T) ids to (B, T), float32."""
        return self.head(self.trunk.hidden_states(token_ids)).squeeze(-1).float()

    def raw_scores(self, token_ids: Tensor, last: Tensor) -> Tensor:
        """The number at position `last` of each row: (B, T) ids and (B) to (B)."""
        hidden = self.trunk.hidden_states(token_ids)
        rows = torch.arange(len(last), device=last.device)
        return self.head(hidden[rows, last]).squeeze(-1).float()


class RankedRows(NamedTuple):
    """The answers to some prompts, equal ones in one row, and how they are ranked.

    token_ids  (N, T), filled up at the right
    last       (N), the position of each answer's end token
    places     (P, K), the row of each answer of each prompt
    ranks      (P, K), 1 is the best
    mask       (P, K), False where a prompt has fewer answers
    """

    token_ids: Tensor
    last: Tensor
    places: Tensor
    ranks: Tensor
    mask: Tensor


class RenderedRanking(NamedTuple):
    """K answers to one prompt, as token ids.

    rows        the prompt with each different answer and its end token
    places      (K), the row of each answer
    ranks       (K), of the answers; 1 is the best
    num_prompt  tokens before each answer
    """

    rows: list[list[int]]
    places: tuple[int, ...]
    ranks: tuple[int, ...]
    num_prompt: int


def render_answer(template: Template, prompt: Conversation, answer: str) -> list[int]:
    """Token ids of a finished answer. Training and scoring both come here."""
    return template.render((*prompt, Message("assistant", answer))).token_ids


def render_rankings(
    rankings: Sequence[Ranking], template: Template, max_tokens: int
) -> tuple[list[RenderedRanking], list[str]]:
    """Those of which all answers fit, and where the others come from.

    Equal answers are a tie: no pair of them can be told apart.
    """
    kept, too_long = [], []
    for one in rankings:
        rows: list[list[int]] = []
        places, best = [], []  # of each answer its row; of each row its best rank
        for answer, rank in zip(one.answers, one.ranks):
            row = render_answer(template, one.prompt, answer)
            if row not in rows:
                rows.append(row)
                best.append(rank)
            places.append(rows.index(row))
            best[places[-1]] = min(best[places[-1]], rank)
        if max(map(len, rows)) > max_tokens:
            too_long.append(one.where)
        else:
            num_prompt = len(template.render_for_completion(one.prompt))
            ranks = tuple(best[place] for place in places)
            kept.append(RenderedRanking(rows, tuple(places), ranks, num_prompt))
    return kept, too_long


def ranked_rows(
    rankings: Sequence[RenderedRanking], device: torch.device | str = "cpu"
) -> RankedRows:
    """All answers of the rankings as one batch."""
    rows = [row for one in rankings for row in one.rows]
    ids, last = padded(rows)
    most = max(len(one.ranks) for one in rankings)
    places, ranks = (torch.zeros(len(rankings), most, dtype=torch.int64) for _ in range(2))
    start = 0
    for number, one in enumerate(rankings):
        count = len(one.ranks)
        places[number, :count] = start + torch.tensor(one.places)
        ranks[number, :count] = torch.tensor(one.ranks)
        start += len(one.rows)
    # a rank is at least 1
    return RankedRows(*(x.to(device) for x in (ids, last, places, ranks, ranks > 0)))


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids (N, T), filled up at the right, and the position of each row's last token (N)."""
    return padded_rows(rows), torch.tensor([len(row) - 1 for row in rows])


def ranking_loss(model: ScalarModel, batch: RankedRows) -> tuple[Tensor, Tensor]:
    """Sum of the prompts' losses [nats], and the number of prompts with a pair."""
    scores = model.raw_scores(batch.token_ids, batch.last)[batch.places]  # (P, K)
    losses, num_pairs = ranking_losses(scores, batch.ranks, batch.mask)
    return losses.sum(), (num_pairs > 0).sum()


@torch.no_grad()
def answer_scores(
    model: ScalarModel, token_ids: Tensor, last: Tensor, batch_size: int = 64
) -> Tensor:
    """The score of each row at its position `last`, without dropout: (N, T) and (N) to (N)."""
    with evaluating(model):
        parts = zip(token_ids.split(batch_size), last.split(batch_size))
        return torch.cat([model.raw_scores(*part) for part in parts]) - model.offset


@torch.no_grad()
def score_rows(
    model: ScalarModel, rows: Sequence[Sequence[int]], device: torch.device, batch_size: int = 64
) -> Tensor:
    """The score of each row at its last token: (N) on the CPU, without dropout.

    Raises: UserError for a row that is longer than the model's context.
    """
    longest, context = max(map(len, rows), default=0), model.trunk.config.context_length
    if longest > context:
        raise UserError(
            f"reward model: got {longest} tokens of prompt and answer, need at most {context}, its "
            "context; shorten --max_new_tokens or the prompts"
        )
    found = [torch.zeros(0)]
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            ids, last = (x.to(device) for x in padded(rows[start : start + batch_size]))
            found.append(model.raw_scores(ids, last).cpu())
    return torch.cat(found) - model.offset.cpu()


MARGIN_BINS = (0.0, 0.25, 0.5, 1.0, 2.0, math.inf)


def preference_report(
    scores: Sequence[Tensor], rankings: Sequence[RenderedRanking]
) -> dict[str, Any]:
    """How well the scores of the rankings' rows order the answers, for a log.

    accuracy            share of the pairs whose better answer has the higher score
    calibration         for bins of the margin |r_i - r_j|: the number of pairs, the share that is
                        right, and the share that the model expects, the mean of sigmoid(margin)
    score_mean, score_std
    length_correlation  of scores and lengths in tokens, over all answers
    """
    margins: list[Tensor] = []
    scores = [own[list(one.places)] for own, one in zip(scores, rankings, strict=True)]
    for own, one in zip(scores, rankings):
        ranks = torch.tensor(one.ranks)
        is_pair = ranks.unsqueeze(-1) < ranks
        margins.append((own.unsqueeze(-1) - own)[is_pair])
    margin = torch.cat(margins) if margins else torch.zeros(0)
    bins = []
    for low, high in zip(MARGIN_BINS, MARGIN_BINS[1:]):
        inside = margin[(margin.abs() >= low) & (margin.abs() < high)]
        if len(inside):
            expected = torch.sigmoid(inside.abs()).mean().item()
            right = (inside > 0).double().mean().item()
            bins.append({"from": low, "pairs": len(inside), "right": right, "expected": expected})
    flat = torch.cat(scores) if scores else torch.zeros(0)
    lengths = [float(len(one.rows[place])) for one in rankings for place in one.places]
    return {
        "num_pairs": len(margin),
        "accuracy": (margin > 0).double().mean().item() if len(margin) else None,
        "calibration": bins,
        "score_mean": flat.mean().item() if len(flat) else None,
        "score_std": flat.std().item() if len(flat) > 1 else None,
        "length_correlation": _correlation(flat, torch.tensor(lengths)),
    }


def _correlation(x: Tensor, y: Tensor) -> float | None:
    """Pearson's; None if one of both is constant."""
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return None
    return torch.corrcoef(torch.stack([x.double(), y.double()]))[0, 1].item()
