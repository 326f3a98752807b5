"""`run_clm.py`: reads flags and saved settings, then does a dry run or a training run."""

import difflib
import importlib.util
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from cs_lm.cli._errors import readable_errors
from cs_lm.cli._fit import check_writable, fit
from cs_lm.cli._init_from import Start, read_start
from cs_lm.cli._progress import ProgressLine
from cs_lm.cli._ranks import check_ranks, joined, kept_for_ranks, log_of_rank
from cs_lm.config.fields import flag_of, has_setting, replace, settings_of, value_of
from cs_lm.config.flags import FlagParser, add_flags, config_from_flags, read_flags
from cs_lm.config.model import ArchitectureConfig
from cs_lm.config.presets import DEFAULT_MODEL, model_names
from cs_lm.config.run import NOT_SAVED_SETTINGS, RunConfig, named_run
from cs_lm.data.corpus import check_corpora, label_of
from cs_lm.data.pipeline import prepare
from cs_lm.data.pipes import check_no_pipe
from cs_lm.device import resolve_device
from cs_lm.distributed.launch import is_first_rank
from cs_lm.distributed.ranks import ALONE, Ranks
from cs_lm.errors import Problem, UserError, missing_package
from cs_lm.training.console import log_to, print_line
from cs_lm.training.run_dir import RunFolder, saved_config, stage_of
from cs_lm.training.trackers import EXTRA_OF_TRACKER, names_of

DESCRIPTION = """\
Trains a Transformer language model on a text. A tokenizer and the encoded text are
made in data/ where they are missing; the run lands in runs/<label> or --out_dir.
Units stand in [brackets]."""
_FIXED_FROM_START = frozenset(("model_name", "special_tokens", "vocab_path", "merges_path"))
_FIXED_SETTINGS = _FIXED_FROM_START | {"valid_path", "valid_fraction"}
# Settings of this call only, which are not part of the run.
_OF_THIS_CALL = {*NOT_SAVED_SETTINGS, "out_dir"}


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    with log_of_rank(sys.stdout):
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    namespace, given, wrong_values = _read_words(argv)
    if given.get("resume"):
        return _resume(namespace, given, wrong_values)
    start = None if given.get("init_from") is None else read_start(given["init_from"])
    config = _new_config(namespace, given, start)
    folder = RunFolder(config.out_dir or Path("runs") / label_of(config.data))
    check_writable(folder.path)
    folder.refuse_a_run()
    tokenizer = None if start is None else start.tokenizer
    if config.dry_run:
        return _print_dry_run(config, folder, tokenizer)
    config = kept_for_ranks(config)
    weights = None if start is None else start.weights
    with joined(config) as ranks:
        check_ranks(config, ranks)
        with ranks.first_alone():
            data = _prepared(config, tokenizer)
        with _locked(folder, ranks):
            if ranks.is_first:
                folder.refuse_a_run()  # a run that began and ended meanwhile
            return fit(
                lambda: _new_trainer()(config, data, folder, weights=weights, ranks=ranks), ranks
            )


def config_of(words: Sequence[str]) -> RunConfig:
    """The settings of a new run with these flags. Raises: UserError for wrong ones."""
    namespace, given, _ = _read_words(words)
    start = None if given.get("init_from") is None else read_start(given["init_from"])
    return _new_config(namespace, given, start)


def _read_words(
    words: Sequence[str] | None,
) -> tuple[Namespace, dict[str, Any], list[Problem]]:
    parser = FlagParser(prog="run_clm.py", description=DESCRIPTION)
    add_flags(parser, RunConfig)
    namespace = parser.parse_strictly(words)
    return namespace, *read_flags(namespace, RunConfig)


def _new_config(namespace: Namespace, given: dict[str, Any], start: Start | None) -> RunConfig:
    if start is None:
        base = _named_base(given)
    else:
        base = start.base
        whose = "--init_from has", "leave the flag out, or --init_from"
        _refuse_what_cannot_change(base, given, whose, _FIXED_FROM_START)
    return config_from_flags(base, namespace, _problems_of_this_machine)


def _locked(folder: RunFolder, ranks: Ranks) -> AbstractContextManager[None]:
    """The folder's lock, which rank 0 holds for all."""
    return folder.lock() if ranks.is_first else nullcontext()


def _named_base(given: dict[str, Any]) -> RunConfig:
    model_name = given.get("model_name", DEFAULT_MODEL)
    names = model_names()
    if model_name not in names:  # the other defaults depend on it: stop here
        near = [name for name in names if name.startswith(model_name)]
        near = near or difflib.get_close_matches(model_name, names, n=1) or names
        raise UserError(f"--model: got {model_name!r}, need one of {', '.join(near)}")
    return named_run(model_name)


def _resume(namespace, given: dict[str, Any], wrong_values: list[Problem]) -> int:
    if wrong_values:
        raise UserError(*wrong_values)
    if given.get("init_from") is not None:
        raise UserError(Problem("--init_from", "begins a new run", fix="leave it out, or --resume"))
    asked = replace(RunConfig(), given)
    wrong_step = [problem for problem in asked.validate() if problem.where == "--resume_step"]
    if wrong_step:
        raise UserError(*wrong_step)
    folder = RunFolder(asked.out_dir or Path("runs") / label_of(asked.data))
    folder.require("check it, or start the run without --resume")
    if asked.dry_run:
        return _resume_locked(folder, namespace, given, ALONE)
    with joined(asked) as ranks, _locked(folder, ranks):
        return _resume_locked(folder, namespace, given, ranks)


def _read(folder: RunFolder, step: int | None, ranks: Ranks) -> dict[str, Any]:
    """The checkpoint of that step, or the newest that verifies at rank 0.

    Several ranks do not read all of it, but what they need later.
    """
    found, lazily = None, ranks.size > 1
    with ranks.first_alone():
        if ranks.is_first:
            found = folder.find("last" if step is None else str(step), lazily)
    of_first = ranks.from_first("" if found is None else f"{found.step} {found.kind}")
    if found is not None:
        return found.content
    step, kind = of_first.split()
    return folder.checkpoints.read(int(step), kind, lazily, verify=False)


def _resume_locked(folder: RunFolder, namespace, given: dict[str, Any], ranks: Ranks) -> int:
    checkpoint = _read(folder, given.get("resume_step"), ranks)
    refuse_a_stage(folder, checkpoint)
    saved = saved_config(checkpoint)
    # an imported model has no best checkpoint yet: its validation text may still change
    fixed = _FIXED_SETTINGS if checkpoint["iteration"] > 0 else _FIXED_FROM_START
    whose = ("the run to resume has", "leave the flag out, or start a new run in another --out_dir")
    _refuse_what_cannot_change(saved, given, whose, fixed)
    config = config_from_flags(saved, namespace, _problems_of_this_machine)
    for name in sorted(set(given) - _OF_THIS_CALL):
        before, now = value_of(saved, name), given[name]
        if before != now and ranks.is_first:
            print(f"resume: --{name} is {_shown(now)} from here on, it was {_shown(before)}")
    tokenizer = folder.load_tokenizer()
    if config.dry_run:
        return _print_dry_run(config, folder, tokenizer)
    config = kept_for_ranks(config)
    check_ranks(config, ranks)
    with ranks.first_alone():
        data = _prepared(config, tokenizer)
    held = [checkpoint]  # the trainer copies it: `pop` lets the original be freed during training
    del checkpoint
    return fit(lambda: _new_trainer()(config, data, folder, held.pop(), ranks=ranks), ranks)


def refuse_a_stage(folder: RunFolder, checkpoint: dict[str, Any]) -> None:
    """Raises: UserError for a run that another command trains."""
    stage = stage_of(checkpoint)
    if stage != "train":
        raise UserError(
            f"--resume: {str(folder.path)!r} is a run of cs-lm {stage}; resume it with "
            f"python -m cs_lm {stage} --resume --out_dir {folder.path}"
        )


def _refuse_what_cannot_change(
    saved: RunConfig, given: dict[str, Any], whose: tuple[str, str], fixed: frozenset[str]
) -> None:
    """Raises: UserError for flags that change the model, its tokenizer or a setting in `fixed`.

    whose  two parts of the message: who has the other setting, and what to do
    """
    has, remedy = whose
    wrong = []
    for name, (owner, each) in settings_of(RunConfig).items():
        if name not in given or not has_setting(saved, name):
            continue
        if issubclass(owner, ArchitectureConfig) or name in fixed:
            before = value_of(saved, name)
            if name != "drop_rate" and given[name] != before:
                what = f"got {_shown(given[name])}, but {has} {_shown(before)}"
                wrong.append(Problem(flag_of(each), what, fix=remedy))
    if wrong:
        raise UserError(*wrong)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def _problems_of_this_machine(config: RunConfig) -> list[Problem]:
    """Problems that appear only when files and devices are checked."""
    found = []
    try:
        resolve_device(config.device)
    except UserError as error:
        found += error.args
    found += check_corpora(config.data)
    for name in names_of(config):
        if importlib.util.find_spec(name) is None:
            found.append(missing_package(f"--{name}", name, EXTRA_OF_TRACKER[name]))
    return found


def _print_dry_run(config: RunConfig, folder: RunFolder, tokenizer) -> int:
    from cs_lm.scaling.run_time import predicted_seconds
    from cs_lm.training.estimate import report

    check_no_pipe(config)
    if not is_first_rank():
        return 0
    print(report(config, folder.path, tokenizer, lambda n: predicted_seconds(config, n)))
    print("dry run: settings are fine, nothing was written")
    return 0


def _new_trainer() -> Callable[..., Any]:
    from cs_lm.training.language_modeling import language_model_trainer

    return language_model_trainer


def _prepared(config: RunConfig, tokenizer):
    progress = ProgressLine()

    def write_line(text: str) -> None:
        progress.close()
        print_line(text, sys.stdout)

    with log_to(write_line) if is_first_rank() else nullcontext():
        return prepare(config, tokenizer, progress)
