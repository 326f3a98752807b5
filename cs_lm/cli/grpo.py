"""`python -m cs_lm grpo`: a model learns which of several answers to a prompt are better.

Scores come from a reward model or a rule; there is no value model. The model that it begins with is
the reference.
"""

from collections.abc import Sequence

from cs_lm.cli._errors import readable_errors
from cs_lm.cli._stage import Begun, policy_sources_of, run_stage


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    from cs_lm.alignment.grpo import GRPOConfig

    return run_stage("grpo", GRPOConfig, __doc__, argv, _task)


def _task(config, begun: Begun):
    from cs_lm.alignment.grpo import GroupRelativePolicyOptimization
    from cs_lm.device import World, resolve_device

    world = World(resolve_device(config.device))
    return GroupRelativePolicyOptimization(config, policy_sources_of(config, begun, world), world)
