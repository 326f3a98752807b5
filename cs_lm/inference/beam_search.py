"""Beam search: the likeliest texts that keeping the best k beginnings finds.

Axes: P prompts, k beams, V vocabulary, M the most new tokens. Rows are (P k).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cs_lm.inference.decoder import CachedDecoder, TokenRows, check_prompts
from cs_lm.inference.decoding_config import DecodingConfig
from cs_lm.inference.sampling import NOT_NUMBERS, NotANumberError, penalised
from cs_lm.models.base import LanguageModel
from cs_lm.ops.reference import log_softmax


class _Beams:
    """The running and the finished beams of all prompts.

    Their score is  sum of log-probabilities / length^length_penalty  [nats]; the length counts new
    tokens, with the stop id. Finished beams are sorted, best first; -inf: not there yet.
    """

    def __init__(self, num_prompts: int, config: DecodingConfig, stop_ids: Tensor):
        device, k = stop_ids.device, config.num_beams
        self._stop_ids, self._penalty = stop_ids, config.length_penalty
        self._most = config.max_new_tokens
        # only the first beam of a prompt counts at the start: all of them are the same
        self.sums = torch.full((num_prompts, k), -math.inf, device=device)
        self.sums[:, 0] = 0.0
        self.tokens = torch.full((num_prompts, k, self._most), -1, device=device)
        self.finished = torch.full((num_prompts, k), -math.inf, device=device)
        self.finished_tokens = self.tokens.clone()
        self.length = 0

    def extend(self, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Continues each prompt's beams with the best next tokens; log_probs (P k, V).

        Returns the beam that each new beam continues, and its new token, both (P, k).
        """
        num_prompts, k = self.sums.shape
        vocab_size = log_probs.shape[-1]
        totals = self.sums.unsqueeze(-1) + log_probs.view(num_prompts, k, -1)  # (P, k, V)
        # of each beam, all stop ids may be among the best, and k others are needed
        num_kept = min((1 + max(1, len(self._stop_ids))) * k, k * vocab_size)
        sums, places = totals.flatten(1).topk(num_kept)  # (P, n)
        parents, new_ids = places // vocab_size, places % vocab_size
        tokens = _taken(self.tokens, parents)
        tokens[:, :, self.length] = new_ids
        self.length += 1
        ends = torch.isin(new_ids, self._stop_ids)
        last = self.length == self._most
        self._finish(sums, tokens, ends | last)
        self.sums, best = sums.masked_fill(ends, -math.inf).topk(k)  # (P, k)
        self.tokens = _taken(tokens, best)
        return parents.gather(1, best), new_ids.gather(1, best)

    def _finish(self, sums: Tensor, tokens: Tensor, ends: Tensor) -> None:
        """Keeps the k best of the finished beams and those of the k best new ones that end."""
        k = self.sums.shape[1]
        new = (sums / self.length**self._penalty).masked_fill(~ends, -math.inf)[:, :k]
        self.finished, order = torch.cat((self.finished, new), 1).topk(k)
        tokens = torch.cat((self.finished_tokens, tokens[:, :k]), 1)
        self.finished_tokens = _taken(tokens, order)

    def may_improve(self) -> bool:
        """Whether a running beam may still become one of the k best of its prompt.

        Each further token lowers the sum. With a positive length penalty the best that it can
        become is its sum over the greatest length.
        """
        length = self._most if self._penalty > 0 else self.length + 1
        best_possible = self.sums.amax(-1) / length**self._penalty
        return bool((best_possible > self.finished.amin(-1)).any())

    def permute(self, order: Tensor) -> None:
        """Beam j becomes what `order[:, j]` was. Shapes: order (P, k), each row a permutation"""
        self.sums = self.sums.gather(1, order)
        self.tokens = _taken(self.tokens, order)


def _taken(tokens: Tensor, beams: Tensor) -> Tensor:
    """The tokens of these beams. Shapes: tokens (P, n, M), beams (P, m), returns (P, m, M)"""
    return tokens.gather(1, beams.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def slots_for(parents: Tensor) -> tuple[Tensor, Tensor]:
    """Where each new beam goes, so that as few cache rows as possible are copied.

    The first child of a beam stays in that beam's slot. Its further children take the slots of
    beams without a child.
    Shapes: parents (P, k), returns slots (P, k), each row a permutation, and is_copied (P, k),
    the children that need a copy of their parent's row
    """
    ordered, order = parents.sort(dim=-1, stable=True)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    is_copied = torch.zeros_like(is_first).scatter(1, order, ~is_first)
    is_free = torch.ones_like(is_first).scatter(1, parents, False)
    slots = parents.clone()
    # each prompt has as many copies as free slots, and both are listed prompt by prompt
    slots[is_copied] = is_free.nonzero()[:, 1]
    return slots, is_copied


@torch.inference_mode()
def beam_search(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    config: DecodingConfig,
    stop_ids: frozenset[int] = frozenset(),
    allowed: Tensor | None = None,
) -> list[tuple[list[int], bool]]:
    """The `config.num_samples` best texts of each prompt, best first, and whether each has ended.

    The texts are without the prompt and the stop id. One beam gives the greedy text. The penalties
    of the config are applied to the log-probabilities. The search ends when no running beam can
    become better than the finished ones.
    Raises: as `generate_tokens`.
    """
    check_prompts(model, prompts, config)
    device, k = model.output_embedding.device, config.num_beams
    max_new = config.max_new_tokens
    rows = TokenRows(prompts, max_new, device, k)
    decoder = CachedDecoder(model, rows, max_new, config.slide, k)
    beams = _Beams(len(prompts), config, torch.tensor(sorted(stop_ids), device=device).long())
    allowed = None if allowed is None else allowed.to(device)
    while beams.length < max_new and beams.may_improve():
        log_probs = log_softmax(decoder.logits())  # (P k, V)
        if log_probs.isnan().any():
            raise NotANumberError(NOT_NUMBERS)
        parents, new_ids = beams.extend(penalised(log_probs, rows.history, config, allowed))
        slots, is_copied = slots_for(parents)
        first = torch.arange(0, len(prompts) * k, k, device=device).unsqueeze(-1)  # (P, 1)
        decoder.copy_rows((parents + first)[is_copied], (slots + first)[is_copied])
        order = slots.argsort(-1)
        beams.permute(order)
        rows.append(new_ids.gather(1, order).flatten())
    return [
        (ids, ended)
        for prompt in range(len(prompts))
        for ids, ended in _texts(beams, prompt, config.num_samples, stop_ids)
    ]


def _texts(beams: _Beams, prompt: int, count: int, stop_ids: frozenset[int]):
    scores, tokens = beams.finished[prompt], beams.finished_tokens[prompt]
    for score, ids in zip(scores[:count].tolist(), tokens[:count].tolist()):
        ids = [i for i in ids if i >= 0] if score > -math.inf else []
        ended = bool(ids) and ids[-1] in stop_ids
        yield (ids[:-1] if ended else ids), ended or not ids
