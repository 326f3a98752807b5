"""`python -m cs_lm sft`: fine-tunes a language model on conversations, instructions or pairs.

The new run generates, chats, serves and exports as every other run does.
"""

import dataclasses
from collections.abc import Sequence

from cs_lm.cli._errors import readable_errors
from cs_lm.cli._progress import ProgressLine
from cs_lm.cli._stage import Begun, run_stage
from cs_lm.config.data import DataConfig
from cs_lm.errors import UserError


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    from cs_lm.alignment.sft import SFTConfig

    return run_stage("sft", SFTConfig, __doc__, argv, _task)


def _task(config, begun: Begun):
    from cs_lm.alignment.records import read_demonstrations
    from cs_lm.alignment.sft import Sources, SupervisedFineTuning
    from cs_lm.alignment.stage import split_by_prompt
    from cs_lm.device import World, resolve_device

    train = read_demonstrations(config.data)
    if config.valid_data:
        valid = read_demonstrations(config.valid_data, "--valid_data")
    else:
        train, valid = split_by_prompt(
            train, config.valid_fraction, lambda one: one.conversation[:-1]
        )
    text = _text(config, begun) if config.pretraining_mix else None
    sources = Sources(begun.base, begun.tokenizer, text)
    return SupervisedFineTuning(config, sources, train, valid, World(resolve_device(config.device)))


def _text(config, begun: Begun):
    """The text of the pre-training, in tokens."""
    from cs_lm.data.pipeline import prepare

    data = begun.data
    if config.pretraining_path:
        data = dataclasses.replace(data or DataConfig(), corpus_path=config.pretraining_path)
    if data is None:
        raise UserError(
            "--pretraining_path: is missing: nobody knows what text the weights in --from were "
            "trained on; name one"
        )
    run_config = dataclasses.replace(config.as_run(begun.base), data=data)
    return prepare(run_config, begun.tokenizer, ProgressLine())
