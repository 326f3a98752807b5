"""Our models for EleutherAI's evaluation harness (`lm-eval`, an extra).

from lm_eval import simple_evaluate
from cs_lm.evaluation.lm_eval_model import HarnessModel
simple_evaluate(model=HarnessModel(model, tokenizer), tasks=[...])
"""

from typing import Any

from cs_lm.errors import UserError, missing_package
from cs_lm.evaluation.likelihood import likelihoods, token_pair
from cs_lm.evaluation.scoring import score_tokens
from cs_lm.inference.decoding_config import DecodingConfig
from cs_lm.inference.text import generate_text
from cs_lm.models.base import LanguageModel

try:
    from lm_eval.api.model import LM
except ImportError:
    raise UserError(missing_package("lm_eval_model", "lm-eval", "harness")) from None

_DEFAULT_LENGTH = 256


class HarnessModel(LM):
    """The three questions of the harness's model interface, answered by a model of ours."""

    def __init__(self, model: LanguageModel, tokenizer: Any):
        super().__init__()
        self._model, self._tokenizer = model, tokenizer
        ends = [t for t in tokenizer.end_tokens if t in tokenizer.special_tokens]
        self._first = tokenizer.encode(ends[0]) if ends else tokenizer.encode("\n")

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): its log-probability, and whether it is greedy."""
        pairs = []
        for request in requests:
            context, continuation = token_pair(self._tokenizer.encode, *request.args)
            pairs.append((context or self._first, continuation))
        return [(one.logprob, one.is_greedy) for one in likelihoods(self._model, pairs)]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, after the token that ends a text."""
        totals = []
        for request in requests:
            ids = [*self._first[:1], *self._tokenizer.encode(request.args[0])]
            totals.append(-sum(score.nats or 0.0 for score in score_tokens(self._model, ids)))
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Text after each context, up to one of its stop texts; greedy unless it asks to sample."""
        return [self._generated(*request.args) for request in requests]

    def _generated(self, context: str, settings: dict) -> str:
        until = settings.get("until") or ()
        sampled = settings.get("do_sample", False)
        config = DecodingConfig(
            max_new_tokens=settings.get("max_gen_toks", _DEFAULT_LENGTH),
            temperature=settings.get("temperature", 1.0) if sampled else 0.0,
            top_p=settings.get("top_p") if sampled else None,
            stop=(until,) if isinstance(until, str) else tuple(until),
        )
        return generate_text(self._model, self._tokenizer, [context], config)[0]
