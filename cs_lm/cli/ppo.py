"""`python -m cs_lm ppo`: a model learns from the scores of answers that it draws itself.

Scores come from a reward model or a rule. The model that it begins with is the reference, and what
it may move away from it is limited. With --pretraining_mix, it is PPO-ptx.
"""

from collections.abc import Sequence

from cs_lm.cli._errors import readable_errors
from cs_lm.cli._stage import Begun, policy_sources_of, run_stage


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    from cs_lm.alignment.ppo import PPOConfig

    return run_stage("ppo", PPOConfig, __doc__, argv, _task)


def _task(config, begun: Begun):
    from cs_lm.alignment.ppo import ProximalPolicyOptimization
    from cs_lm.device import World, resolve_device

    world = World(resolve_device(config.device))
    return ProximalPolicyOptimization(config, policy_sources_of(config, begun, world), world)
