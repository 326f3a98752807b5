"""How likely a model holds given continuations of given texts."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from cs_lm.errors import UserError
from cs_lm.evaluation.perplexity import padded, rows_per_pass
from cs_lm.inference.sampling import NOT_NUMBERS, NotANumberError
from cs_lm.models.base import LanguageModel, evaluating
from cs_lm.ops.reference import log_softmax


class Likelihood(NamedTuple):
    """Of one continuation: sum of log-probabilities [nats], tokens, and whether it is greedy.

    is_greedy  each of its tokens is the most likely one
    """

    logprob: float
    num_tokens: int
    is_greedy: bool


def token_pair(encode: Callable[[str], list[int]], context: str, continuation: str):
    """The ids of both, as the tokens of the joined text.

    Spaces at the end of the context belong to the continuation, because a token may begin with
    them.
    """
    stripped = context.rstrip(" ")
    continuation, context = context[len(stripped) :] + continuation, stripped
    of_context, whole = encode(context), encode(context + continuation)
    border = min(len(of_context), len(whole) - 1)  # a token may reach over the border
    if continuation and border < 1:  # one token is both: it cannot be told apart
        return of_context, encode(continuation)
    return whole[:border], whole[border:]


@torch.no_grad()
def likelihoods(
    model: LanguageModel,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[Likelihood]:
    """That of each pair of ids (context, continuation). Neither may be empty.

    A pair longer than the model's context loses tokens at its beginning.
    on_batch  called with the number of pairs that are done
    Raises: UserError for an empty context or continuation, or a continuation longer than the
    model's context; NotANumberError for logits that are no numbers.
    """
    longest = model.config.context_length
    for context, continuation in pairs:
        if not context or not 1 <= len(continuation) <= longest:
            raise UserError(
                f"answer: got {len(continuation)} tokens after a context of {len(context)}, need 1 "
                f"or more of context, and 1 to {longest} of answer"
            )
    found: list[Likelihood | None] = [None] * len(pairs)
    lengths = [len(context) + len(continuation) for context, continuation in pairs]
    order = sorted(range(len(pairs)), key=lambda i: -lengths[i])  # alike lengths: little padding
    device, first = model.output_embedding.device, 0
    with evaluating(model):
        while first < len(order):
            width = min(longest, lengths[order[first]] - 1)
            size = rows_per_pass(model, width)
            batch = order[first : first + size]
            rows = [np.array([*pairs[i][0], *pairs[i][1]])[-(longest + 1) :] for i in batch]
            inputs, targets = (x.to(device) for x in padded(rows, width))
            log_probs = log_softmax(model(inputs))  # (n, T, V)
            chosen = log_probs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            is_best = log_probs.argmax(-1) == targets
            for row, i in enumerate(batch):
                end = len(rows[row]) - 1
                start = end - len(pairs[i][1])
                total = float(chosen[row, start:end].double().sum())
                if math.isnan(total):
                    raise NotANumberError(NOT_NUMBERS)
                found[i] = Likelihood(total, end - start, bool(is_best[row, start:end].all()))
            first += size
            on_batch(min(first, len(order)))
    return found
