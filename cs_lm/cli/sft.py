"""`python -m cs_lm sft`: fine-tunes a language model on conversations, instructions or pairs.

The new run generates, chats, serves and exports as every other run does.
"""

from collections.abc import Sequence

from cs_lm.cli._errors import readable_errors
from cs_lm.cli._stage import Begun, first_weights_of, run_stage, text_of_stage


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    from cs_lm.alignment.sft import SFTConfig

    return run_stage("sft", SFTConfig, __doc__, argv, _task)


def _task(config, begun: Begun):
    from cs_lm.alignment.records import read_demonstrations
    from cs_lm.alignment.reward_training import load_reward_model
    from cs_lm.alignment.sft import Sources, SupervisedFineTuning
    from cs_lm.alignment.stage import split_by_prompt
    from cs_lm.device import World, resolve_device
    from cs_lm.training.run_dir import RunFolder

    train = read_demonstrations(config.data)
    if config.valid_data:
        valid = read_demonstrations(config.valid_data, "--valid_data")
    else:
        train, valid = split_by_prompt(
            train, config.valid_fraction, lambda one: one.conversation[:-1]
        )
    text = text_of_stage(config, begun)
    device, reward = resolve_device(config.device), None
    if config.reward is not None:
        reward = load_reward_model(RunFolder(config.reward, "--reward"), "best", device)
    sources = Sources(begun.base, begun.tokenizer, text, lambda: first_weights_of(config), reward)
    return SupervisedFineTuning(config, sources, train, valid, World(device))
