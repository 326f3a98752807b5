"""`python -m cs_lm dpo`: a model learns from rankings or preferences, without a reward model.

The model that it begins with is the reference.
"""

from collections.abc import Sequence

from cs_lm.cli._errors import readable_errors
from cs_lm.cli._stage import Begun, rankings_of, run_stage


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    from cs_lm.alignment.dpo import DPOConfig

    return run_stage("dpo", DPOConfig, __doc__, argv, _task)


def _task(config, begun: Begun):
    from cs_lm.alignment.dpo import PreferenceOptimization
    from cs_lm.device import World, resolve_device

    world, sides = World(resolve_device(config.device)), rankings_of(config)
    return PreferenceOptimization(config, begun.base, begun.tokenizer, sides, world)
