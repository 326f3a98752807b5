"""Answers that a policy draws, with the log-probability of each of their tokens.

They are drawn at a temperature and in no other way: with top-k or a penalty, the log-probabilities
would be those of another policy than the one that learns.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cs_lm.alignment.examples import padded_rows
from cs_lm.alignment.kl import exact_kl, linear_exact_kl
from cs_lm.inference.decoder import CachedDecoder, TokenRows
from cs_lm.inference.sampling import NOT_NUMBERS, NotANumberError, draw_by_weight
from cs_lm.models.base import LanguageModel, evaluating, token_log_probs
from cs_lm.ops.reference import at_least_float32, log_softmax


class Rollouts(NamedTuple):
    """N answers.

    token_ids  (N, T + 1), a prompt and its answer, filled up at the right
    mask       (N, T), True where the next token belongs to the answer, its end token included
    log_probs  (N, T), of the next token under the policy that drew it [nats]; 0 outside the mask
    ended      (N), whether the end token came, and not the limit of length
    """

    token_ids: Tensor
    mask: Tensor
    log_probs: Tensor
    ended: Tensor

    @property
    def lengths(self) -> Tensor:
        """Tokens of each answer: (N)."""
        return self.mask.sum(-1)

    @property
    def last(self) -> Tensor:
        """The position of each answer's last token in `token_ids`: (N)."""
        return last_places(self.mask)

    def answers(self, end_id: int) -> list[list[int]]:
        """The token ids of each answer, without its end token."""
        found = []
        for row, mask in zip(self.token_ids[:, 1:].tolist(), self.mask.tolist()):
            ids = [token_id for token_id, is_answer in zip(row, mask) if is_answer]
            found.append(ids[:-1] if ids[-1] == end_id else ids)
        return found


def last_places(mask: Tensor) -> Tensor:
    """The position of each answer's last token in the token ids: (N, T) to (N)."""
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return torch.where(mask, places, 0).amax(-1)


def longest_row(num_read: int, judge_reads: int | None) -> int:
    """Most tokens of a prompt and its answer.

    num_read     tokens that the policy can read; it does not read the last one
    judge_reads  tokens that a reward model can read, the last one too; None: there is none
    """
    return num_read + 1 if judge_reads is None else min(num_read + 1, judge_reads)


def draw_answers(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    end_id: int,
    uniform: Tensor,
    temperature: float = 1.0,
) -> Rollouts:
    """One answer to each of N prompts, all in one batch on the key-value cache.

    What a row draws follows from its numbers alone. Prompt and answer must fit the context.
    uniform  (N, S) float64, those of `uniform_draws`: one for each of at most S tokens
    Raises: NotANumberError for logits that are no numbers.
    """
    found = _drawn(model, prompts, end_id, uniform, temperature)
    return _rollouts(prompts, *(x.clone() for x in found), end_id)  # tensors that gradients allow


@torch.inference_mode()
def _drawn(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    end_id: int,
    uniform: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Token ids and their log-probabilities, (N, S) both, until all rows have ended.

    When half of the rows in the batch have ended, they leave it; what stands behind an end has no
    meaning.
    """
    device, max_new_tokens = model.output_embedding.device, uniform.shape[1]
    rows = TokenRows(prompts, max_new_tokens, device)
    decoder = CachedDecoder(model, rows, max_new_tokens, 1)
    uniform = uniform.T.to(device)
    there = torch.arange(len(prompts), device=device)  # the numbers of the rows in the batch
    has_ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    drawn, log_probs = [], []
    for step in range(max_new_tokens):
        logits = decoder.logits()  # (N, V)
        logits = logits.sub_(logits.amax(-1, keepdim=True)).div_(temperature)
        weights = logits.exp()  # the probabilities but for their sum: no pass to divide by it
        chosen = draw_by_weight(weights, uniform[step, there]).clamp(max=logits.shape[-1] - 1)
        rows.append(chosen)
        of_chosen = logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        drawn.append(torch.full_like(uniform[step], end_id, dtype=torch.int64))
        log_probs.append(torch.zeros_like(uniform[step], dtype=logits.dtype))
        drawn[-1][there], log_probs[-1][there] = chosen, of_chosen - weights.sum(-1).log()
        has_ended |= chosen == end_id
        num_left = int((~has_ended).sum())
        if not num_left:
            break
        if num_left <= len(there) // 2:
            left = (~has_ended).nonzero().squeeze(-1)
            decoder.keep_rows(left)
            there, has_ended = there[left], has_ended[left]
    return torch.stack(drawn, 1), torch.stack(log_probs, 1)


def _rollouts(
    prompts: Sequence[Sequence[int]], drawn: Tensor, log_probs: Tensor, end_id: int
) -> Rollouts:
    """From all tokens that were drawn, also after an end token: drawn and log_probs (N, S)."""
    is_end = drawn == end_id
    is_answer = is_end.cumsum(-1) - is_end.long() == 0
    if not log_probs[is_answer].isfinite().all():
        raise NotANumberError(NOT_NUMBERS)
    lengths = is_answer.sum(-1).tolist()
    answers = [row[:length] for row, length in zip(drawn.tolist(), lengths)]
    ids = padded_rows([[*prompt, *answer] for prompt, answer in zip(prompts, answers)])
    ids = ids.to(drawn.device)
    first = torch.tensor([len(prompt) for prompt in prompts], device=ids.device).unsqueeze(-1)
    end = first + is_answer.sum(-1, keepdim=True)
    places = torch.arange(1, ids.shape[1], device=ids.device)
    mask = (places >= first) & (places < end)
    of_tokens = torch.zeros(mask.shape, dtype=log_probs.dtype, device=ids.device)
    of_tokens[mask] = log_probs[is_answer]  # both in the order of rows, then of tokens
    return Rollouts(ids, mask, of_tokens, is_end.any(-1))


def answer_log_probs(
    model: LanguageModel, hidden: Tensor, token_ids: Tensor, mask: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of the answers' tokens, and entropy before each: (N, T), 0 outside the mask.

    The head is applied to the answers' positions alone.
    Shapes: hidden (N, T, D), those of token_ids[:, :-1]; token_ids (N, T + 1), mask (N, T)
    """
    found = token_log_probs(model, hidden[mask], token_ids[:, 1:][mask], temperature)
    return tuple(x.new_zeros(mask.shape).masked_scatter(mask, x) for x in found)


class Distance(NamedTuple):
    """How policy and reference see answers, each (N, T), and 0 outside the mask [nats].

    kl  the exact divergence of the policy from the reference before each token
    """

    log_probs: Tensor
    entropies: Tensor
    ref_log_probs: Tensor
    kl: Tensor


@torch.no_grad()
def distance(
    policy: LanguageModel,
    reference: LanguageModel,
    rollouts: Rollouts,
    temperature: float = 1.0,
    batch_size: int = 16,
) -> Distance:
    """One forward pass of both models, in batches of rows."""
    parts = []
    with evaluating(policy), evaluating(reference):
        for start in range(0, len(rollouts.mask), batch_size):
            ids, mask = (x[start : start + batch_size] for x in rollouts[:2])
            own, other = (model.hidden_states(ids[:, :-1]) for model in (policy, reference))
            log_probs, entropies = answer_log_probs(policy, own, ids, mask, temperature)
            ref_log_probs, _ = answer_log_probs(reference, other, ids, mask, temperature)
            kl = _exact_kl(policy, own[mask], reference, other[mask], temperature)
            kl = kl.new_zeros(mask.shape).masked_scatter(mask, kl)
            parts.append((log_probs, entropies, ref_log_probs, kl))
    return Distance(*(torch.cat(tensors) for tensors in zip(*parts)))


def _exact_kl(
    policy: LanguageModel,
    hidden: Tensor,
    reference: LanguageModel,
    ref_hidden: Tensor,
    temperature: float,
) -> Tensor:
    """Shapes: hidden and ref_hidden (n, D), returns (n)"""
    if policy.has_plain_head and reference.has_plain_head:
        weight, ref_weight = policy.output_embedding, reference.output_embedding
        return linear_exact_kl(hidden, weight, ref_hidden, ref_weight, temperature)
    both = (policy.logits_of(hidden), reference.logits_of(ref_hidden))
    return exact_kl(*(log_softmax(at_least_float32(z) / temperature) for z in both))


def distinct_ngrams(answers: Sequence[Sequence[int]], size: int = 4) -> float | None:
    """The share of different n-grams of tokens among all; None if no answer is that long."""
    grams = [tuple(a[i : i + size]) for a in answers for i in range(len(a) - size + 1)]
    return len(set(grams)) / len(grams) if grams else None


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ids, without those that a model has and its tokenizer lacks."""
    return tokenizer.decode([token_id for token_id in ids if token_id in tokenizer.vocab])
