"""How large a model and how many tokens a given compute should buy, by several published laws.

Compute is C = 6 N D FLOPs: N parameters, D tokens. Every law gives a compute-optimal pair, and some
of them a loss. Sources, with the names in the code:

KAPLAN         Kaplan et al. 2020, Scaling laws for neural language models, table 6
APPROACH_1..3  Hoffmann et al. 2022, Training compute-optimal large language models ("Chinchilla"),
               tables 3 and A3. The paper prints the pairs; the two constants of each power law here
               are fitted to them, and meet all rows within rounding but those of 67 B parameters,
               and one number of tokens at 280 B that does not fit its own FLOPs
PARAMETRIC     its equation 10: constants as the text rounds them, and as in its TeX source
CORRECTED      Besiroglu et al. 2024, Chinchilla scaling: a replication attempt: the same equation
               fitted again to the data in the paper's figures
TWENTY         20 tokens for each parameter, the rule that Chinchilla is remembered by
"""

import math
from collections.abc import Callable
from typing import NamedTuple

PF_DAY = 8.64e19  # FLOPs of 10^15 FLOP/s during a day


class Optimum(NamedTuple):
    """Parameters and tokens for some compute, and the expected loss [nats per token] if known."""

    parameters: float
    tokens: float
    loss: float | None = None

    @property
    def flops(self) -> float:
        return training_flops(self.parameters, self.tokens)


def training_flops(parameters: float, tokens: float) -> float:
    """6 N D: a multiplication and an addition for each weight forward, twice as much backward."""
    return 6 * parameters * tokens


class Parametric(NamedTuple):
    """L(N, D) = E + A / N^alpha + B / D^beta [nats per token]."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        return self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta

    def optimum(self, flops: float) -> Optimum:
        """The minimum of the loss on 6 N D = C.

        N = G (C / 6)^a, D = (C / 6)^b / G with a = beta / (alpha + beta), b = 1 - a and
        G = (alpha A / (beta B))^(1 / (alpha + beta)). Source: Hoffmann et al. 2022, equation 4.
        """
        total = self.alpha + self.beta
        g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / total)
        parameters = g * (flops / 6) ** self.exponent
        tokens = flops / 6 / parameters
        return Optimum(parameters, tokens, self.loss(parameters, tokens))

    @property
    def exponent(self) -> float:
        """a of N ~ C^a."""
        return self.beta / (self.alpha + self.beta)

    def tokens_for(self, loss: float, parameters: float) -> float:
        """Tokens with which a model reaches the loss; infinite if it never does."""
        left = loss - self.E - self.A * parameters**-self.alpha
        return math.inf if left <= 0 else (self.B / left) ** (1 / self.beta)


PUBLISHED = Parametric(1.69, 406.4, 410.7, 0.34, 0.28)
IN_TEX = Parametric(
    math.exp(0.5267228), math.exp(6.0073404), math.exp(6.0179186), 0.33917084, 0.2849083
)
CORRECTED = Parametric(1.8172, 482.01, 2085.43, 0.3478, 0.3658)


class PowerLaw(NamedTuple):
    """D = tokens_at_1b (N / 10^9)^power: the tokens that a model is best trained with."""

    tokens_at_1b: float
    power: float

    def tokens(self, parameters: float) -> float:
        return self.tokens_at_1b * (parameters / 1e9) ** self.power

    def optimum(self, flops: float) -> Optimum:
        at_1b = training_flops(1e9, self.tokens_at_1b)
        parameters = 1e9 * (flops / at_1b) ** (1 / (1 + self.power))
        return Optimum(parameters, flops / 6 / parameters)


APPROACH_1 = PowerLaw(20.17e9, 1.0075)
APPROACH_2 = PowerLaw(20.0e9, 1.041)
APPROACH_3 = PowerLaw(27.1e9, 1.1803)
TWENTY = PowerLaw(20e9, 1.0)


def kaplan(flops: float) -> Optimum:
    """N = 1.3e9 C^0.73 parameters without embeddings, C in PF-days; here with all of C = 6 N D.

    The paper's loss is (3.1e8 / C)^0.050 for its own tokenizer and text.
    """
    in_pf_days = flops / PF_DAY
    parameters = 1.3e9 * in_pf_days**0.73
    return Optimum(parameters, flops / 6 / parameters, (3.1e8 / in_pf_days) ** 0.050)


# name -> the law, and where its constants come from
LAWS: dict[str, tuple[Callable[[float], Optimum], str]] = {
    "Chinchilla, approach 1": (APPROACH_1.optimum, "Hoffmann 2022, table 3"),
    "Chinchilla, approach 2": (APPROACH_2.optimum, "Hoffmann 2022, table A3"),
    "Chinchilla, approach 3": (APPROACH_3.optimum, "Hoffmann 2022, table A3"),
    "parametric, as printed": (PUBLISHED.optimum, "Hoffmann 2022, equation 10"),
    "parametric, TeX source": (IN_TEX.optimum, "Hoffmann 2022, its TeX source"),
    "parametric, corrected": (CORRECTED.optimum, "Besiroglu 2024"),
    "20 tokens a parameter": (TWENTY.optimum, "rule of thumb"),
    "Kaplan": (kaplan, "Kaplan 2020, table 6; an older law"),
}


def for_serving(law: Parametric, flops: float, served_tokens: float) -> Optimum:
    """The model as good as the best one of that training compute [FLOPs], but with the least
    compute of training and serving together.

    A served token costs 2 N FLOPs. The more tokens are served, the smaller the model and the longer
    its training. Source: Sardana et al. 2024, Beyond Chinchilla-optimal, equation 4.
    """

    best = law.optimum(flops)
    loss = best.loss

    def cost(log_n: float) -> float:
        n = math.exp(log_n)
        return 6 * n * law.tokens_for(loss, n) + 2 * n * served_tokens

    low = math.log((law.A / (loss - law.E)) ** (1 / law.alpha)) + 1e-9  # smaller ones never do
    parameters = math.exp(_lowest(cost, low, math.log(best.parameters) + 1e-6))
    return Optimum(parameters, law.tokens_for(loss, parameters), loss)


def _lowest(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function with one minimum is lowest, by golden-section search."""
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(200):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if function(left) <= function(right):
            high = right
        else:
            low = left
    return (low + high) / 2
