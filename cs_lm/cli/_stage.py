"""Starts or resumes a run of a stage of alignment."""

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from cs_lm.alignment.policy_task import PolicyConfig, PolicySources, Scorer
from cs_lm.alignment.records import Ranking, read_prompts, read_rankings
from cs_lm.alignment.reward_training import load_reward_model
from cs_lm.alignment.rules import rule_of
from cs_lm.alignment.stage import StageConfig, StageTask, hash_of_weights, split_by_prompt
from cs_lm.alignment.text_mix import TextMixConfig
from cs_lm.cli._fit import check_writable, fit
from cs_lm.cli._init_from import read_start
from cs_lm.cli._progress import ProgressLine
from cs_lm.config.data import DataConfig
from cs_lm.config.fields import flag_of, from_json, settings_of, value_of
from cs_lm.config.flags import FlagParser, add_flags, config_from_flags, read_flags
from cs_lm.config.run import RunConfig
from cs_lm.data.corpus import find_files
from cs_lm.data.pipeline import PreparedData, prepare
from cs_lm.device import World, resolve_device
from cs_lm.errors import Problem, UserError
from cs_lm.tokenizer import BPETokenizer
from cs_lm.training.console import log_to, print_line
from cs_lm.training.run_dir import RunFolder, saved_config, stage_of
from cs_lm.training.trainer import Trainer

# What may be another value in a resumed run.
_MAY_CHANGE = frozenset((
    "num_epochs", "max_steps", "lr", "lr_min", "max_norm", "device", "log_interval",
    "save_interval", "keep_last", "on_nan", "eval_interval", "sample_interval", "tensorboard",
    "wandb", "mlflow", "resume", "resume_step", "out_dir",
))  # fmt: skip


class Begun(NamedTuple):
    """The model of a stage.

    base  settings of a run with this model
    data  the text that it was trained on; None: unknown
    """

    base: RunConfig
    tokenizer: BPETokenizer
    data: DataConfig | None


MakeTask = Callable[[Any, Begun], StageTask]


def run_stage(
    name: str,
    config_class: type[StageConfig],
    description: str,
    argv: Sequence[str] | None,
    make_task: MakeTask,
) -> int:
    """The exit status of the command.

    make_task  (config, Begun) -> the task; it gets its weights afterwards
    """
    parser = FlagParser(prog=f"python -m cs_lm {name}", description=description)
    add_flags(parser, config_class)
    namespace = parser.parse_strictly(argv)
    with log_to(lambda text: print_line(text, sys.stdout)):
        given, wrong = read_flags(namespace, config_class)
        if not given.get("resume"):
            config = config_from_flags(config_class(), namespace, _problems_of_this_machine)
            return _begin(config, make_task)
        if wrong or not given.get("out_dir"):
            missing = Problem("--out_dir", "is missing", fix="name the folder of the run")
            raise UserError(*(wrong or [missing]))
        folder = RunFolder(given["out_dir"])
        folder.require("check it, or start the run without --resume")
        with folder.lock():
            return _resume(name, config_class, folder, namespace, given, make_task)


def rankings_of(config: Any) -> tuple[list[Ranking], list[Ranking]]:
    """The rankings to train on, and those to validate on."""
    train = read_rankings(config.data)
    if config.valid_data:
        return train, read_rankings(config.valid_data, "--valid_data")
    return split_by_prompt(train, config.valid_fraction, lambda one: one.prompt)


def text_of_stage(config: TextMixConfig, begun: Begun) -> PreparedData | None:
    """The text of the pre-training, in tokens; None if none is mixed in.

    Raises: UserError if nobody knows what it was.
    """
    if not config.pretraining_mix:
        return None
    data = begun.data
    if config.pretraining_path:
        find_files(config.pretraining_path, "--pretraining_path")  # a missing one is named so
        data = dataclasses.replace(data or DataConfig(), corpus_path=config.pretraining_path)
    if data is None:
        raise UserError(
            "--pretraining_path: is missing: nobody knows what text the weights in --from were "
            "trained on; name one"
        )
    run_config = dataclasses.replace(config.as_run(begun.base), data=data)
    return prepare(run_config, begun.tokenizer, ProgressLine())


def policy_sources_of(config: PolicyConfig, begun: Begun, world: World) -> PolicySources:
    """What a policy is trained from: prompts, scores, text, and the reference."""
    if config.rule is not None:
        scorer = Scorer(f"the rule {config.rule}", None, rule_of(config.rule))
    else:
        model = load_reward_model(RunFolder(config.reward, "--reward"), "best", world.device)
        name = f"the reward model {hash_of_weights(model.model.state_dict())[:16]}"
        scorer = Scorer(name, model, None)
    return PolicySources(
        begun.base,
        begun.tokenizer,
        read_prompts(config.prompts),
        scorer,
        None if config.gold_rule is None else rule_of(config.gold_rule, "--gold_rule"),
        text_of_stage(config, begun),
        lambda: first_weights_of(config),
    )


def first_weights_of(config: StageConfig) -> Mapping[str, Tensor]:
    """The weights that a run began with, read again."""
    return read_start(config.source, "--from").weights


def _begin(config: StageConfig, make_task: MakeTask) -> int:
    folder = RunFolder(config.out_dir)
    check_writable(folder.path)
    folder.refuse_a_run()
    start = read_start(config.source, "--from")
    if config.template == "auto" and start.template is not None:
        config = dataclasses.replace(config, template=start.template)
    begun = Begun(start.base, start.tokenizer, start.data)
    task = make_task(config, begun)
    task.begin_with(start.weights)
    with folder.lock():
        folder.refuse_a_run()
        run_config = dataclasses.replace(config.as_run(begun.base), data=begun.data or DataConfig())
        return fit(lambda: Trainer(run_config, task, folder))


def _resume(
    name: str,
    config_class: type[StageConfig],
    folder: RunFolder,
    namespace: Any,
    given: dict[str, Any],
    make_task: MakeTask,
) -> int:
    step = given.get("resume_step")
    checkpoint = folder.read("last" if step is None else str(step))
    if stage_of(checkpoint) != name:
        raise UserError(
            f"--resume: {str(folder.path)!r} is a run of cs-lm {stage_of(checkpoint)}, not of "
            f"{name}; resume it with that command"
        )
    settings = settings_of(config_class)
    saved = from_json(config_class, checkpoint["extras"]["stage"]["config"])
    if given.get("template") == "auto":  # it stays what it was found to be
        namespace.template = given["template"] = saved.template
    if "source" in given and os.path.normpath(given["source"]) == os.path.normpath(saved.source):
        namespace.source = given["source"] = saved.source
    refused = [
        Problem(flag_of(settings[key][1]), "cannot change in a resumed run", fix="leave it out")
        for key in given
        if key not in _MAY_CHANGE and given[key] != value_of(saved, key)
    ]
    if refused:
        raise UserError(*refused)
    config = config_from_flags(saved, namespace, _problems_of_this_machine)
    base = saved_config(checkpoint)
    begun = Begun(base, folder.load_tokenizer(), base.data)
    run_config, task = config.as_run(begun.base), make_task(config, begun)
    held = [checkpoint]  # the trainer copies it: `pop` lets the original be freed
    del checkpoint
    return fit(lambda: Trainer(run_config, task, folder, held.pop()))


def _problems_of_this_machine(config: StageConfig) -> list[Problem]:
    try:
        resolve_device(config.device)
    except UserError as error:
        return list(error.args)
    return []
