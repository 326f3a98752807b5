"""`python -m cs_lm reward`: trains a reward model on rankings or preferences.

It begins with the weights of a language model, and gives one number for an answer.
"""

from collections.abc import Sequence

from cs_lm.cli._errors import readable_errors
from cs_lm.cli._stage import Begun, rankings_of, run_stage


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    from cs_lm.alignment.reward_training import RewardConfig

    return run_stage("reward", RewardConfig, __doc__, argv, _task)


def _task(config, begun: Begun):
    from cs_lm.alignment.reward_training import RewardModeling
    from cs_lm.device import World, resolve_device

    world = World(resolve_device(config.device))
    return RewardModeling(config, begun.base, begun.tokenizer, rankings_of(config), world)
