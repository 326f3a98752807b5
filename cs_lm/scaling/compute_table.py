"""Training compute of models as GPT-3's paper counts it, by a rule for each kind of model.

FLOPs = tokens x parameters x share of them that a token uses x 2 x 3: a multiplication and an
addition for each weight, and backward twice as much as forward. Attention is left out.
Source: Brown et al. 2020, Language models are few-shot learners, table D.1.
"""

from typing import NamedTuple

from cs_lm.scaling.laws import PF_DAY, training_flops

# An encoder-decoder reads a token in one of its two halves.
RULES = {"decoder": 1.0, "encoder": 1.0, "encoder-decoder": 0.5}


class TrainedModel(NamedTuple):
    """A row of the table. rule: one of RULES; published FLOPs and PF-days, rounded there."""

    name: str
    rule: str
    parameters: float
    tokens: float
    published_flops: float
    published_pf_days: float

    @property
    def flops(self) -> float:
        return training_flops(self.parameters * RULES[self.rule], self.tokens)

    @property
    def pf_days(self) -> float:
        return self.flops / PF_DAY


GPT3_TABLE = [
    TrainedModel(name, rule, millions * 1e6, billions * 1e9, flops, pf_days)
    for name, rule, millions, billions, flops, pf_days in (
        ("T5-Small", "encoder-decoder", 60, 1000, 1.80e20, 2.08),
        ("T5-Base", "encoder-decoder", 220, 1000, 6.60e20, 7.64),
        ("T5-Large", "encoder-decoder", 770, 1000, 2.31e21, 26.7),
        ("T5-3B", "encoder-decoder", 3000, 1000, 9.00e21, 104),
        ("T5-11B", "encoder-decoder", 11000, 1000, 3.30e22, 382),
        ("BERT-Base", "encoder", 109, 250, 1.64e20, 1.89),
        ("BERT-Large", "encoder", 355, 250, 5.33e20, 6.16),
        ("RoBERTa-Base", "encoder", 125, 2000, 1.50e21, 17.4),
        ("RoBERTa-Large", "encoder", 355, 2000, 4.26e21, 49.3),
        ("GPT-3 Small", "decoder", 125, 300, 2.25e20, 2.60),
        ("GPT-3 Medium", "decoder", 356, 300, 6.41e20, 7.42),
        ("GPT-3 Large", "decoder", 760, 300, 1.37e21, 15.8),
        ("GPT-3 XL", "decoder", 1320, 300, 2.38e21, 27.5),
        ("GPT-3 2.7B", "decoder", 2650, 300, 4.77e21, 55.2),
        ("GPT-3 6.7B", "decoder", 6660, 300, 1.20e22, 139),
        ("GPT-3 13B", "decoder", 12850, 300, 2.31e22, 268),
        ("GPT-3 175B", "decoder", 174600, 300, 3.14e23, 3640),
    )
]
