"""`python -m cs_lm sweep`: trains a family of runs, and shows which settings give the lowest loss.

The family stands in a file of TOML or JSON (docs/scaling.md), or in flags:

    cs-lm sweep --out_dir sweeps/lr --flags "--corpus_path book.txt --d_model 64" \\
        --vary lr=1e-3,3e-3,1e-2 tokens=1000000,3000000

Each run is a normal one, in <out_dir>/runs. After a stop or a crash, --resume goes on with what is
left. Results: results.csv and plots in --out_dir, and the command of the best run.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cs_lm.cli._errors import readable_errors
from cs_lm.cli._outputs import no_place
from cs_lm.cli.train import config_of
from cs_lm.config.fields import setting
from cs_lm.config.flags import parse_config
from cs_lm.errors import Problem, UserError, missing, no_effect_without
from cs_lm.models.stats import flops_per_token, num_parameters
from cs_lm.scaling.coordinate_check import HEAD_SIZE, coordinate_check, plot_changes, slopes
from cs_lm.scaling.sweep import PlannedRun, Spec, planned_runs, read_spec, spec_of
from cs_lm.scaling.sweep_plots import plot_sweep
from cs_lm.scaling.sweep_results import (
    Result,
    at_an_end,
    ranked,
    result_of,
    results_of,
    table,
    write_results,
)
from cs_lm.scaling.sweep_runs import DONE, SweepFolder, command_of, train_runs
from cs_lm.scaling.text_table import text_table


@dataclass(frozen=True)
class SweepConfig:
    out_dir: str = setting("", "folder of the sweep; required")
    spec: str | None = setting(None, "file with the family of runs, .toml or .json")
    flags: str | None = setting(None, "in place of --spec: flags of every run, in one text")
    vary: tuple[str, ...] = setting(
        (), "in place of --spec: settings and their values, name=value,value; each combination runs"
    )
    budgets: tuple[float, ...] = setting(
        (), "with --vary: train each model for these amounts of compute", "FLOPs"
    )
    coordinate_check: tuple[int, ...] = setting(
        (),
        "no sweep: models of these widths make 4 updates, with muP for the first width and "
        "without; how much their activations change",
        "widths",
    )
    lr: float = setting(1e-2, "with --coordinate_check: the learning rate")
    num_jobs: int = setting(1, "runs at a time, which share the cores")
    resume: bool = setting(False, "go on with the sweep in --out_dir")
    dry_run: bool = setting(False, "show the runs and what they take; train none")

    def validate(self) -> list[Problem]:
        found = missing({"--out_dir": self.out_dir})
        by_flags = self.flags is not None or bool(self.vary) or bool(self.budgets)
        if self.spec is not None and by_flags:
            what = "cannot be used with --flags, --vary or --budgets"
            found.append(Problem("--spec", what, fix="leave one of them out"))
        if self.out_dir:
            found += no_place("--out_dir", self.out_dir, Path(self.out_dir))
        if self.coordinate_check:
            return found + self._problems_of_check(by_flags)
        if self.lr != SweepConfig.lr:
            found.append(no_effect_without("--lr", "--coordinate_check"))
        if not self.names_a_family:
            if not self.resume:
                found.append(Problem("--spec", "is missing", fix="name a file, or give --vary"))
            elif self.flags is not None:
                found.append(no_effect_without("--flags", "--vary or --budgets"))
        if self.num_jobs < 1:
            found.append(Problem("--num_jobs", f"got {self.num_jobs}", "1 or more"))
        for one in self.vary:
            name, _, values = one.partition("=")
            if not name or not values:
                need = "name=value,value, for example lr=1e-3,3e-3"
                found.append(Problem("--vary", f"got {one!r}", need))
        return found

    @property
    def names_a_family(self) -> bool:
        return self.spec is not None or bool(self.vary) or bool(self.budgets)

    def _problems_of_check(self, by_flags: bool) -> list[Problem]:
        found = []
        if self.spec is not None or by_flags or self.resume:
            what = "cannot be used with --spec, --flags, --vary, --budgets or --resume"
            found.append(Problem("--coordinate_check", what, fix="leave them out"))
        if self.dry_run or self.num_jobs != SweepConfig.num_jobs:
            flag = "--dry_run" if self.dry_run else "--num_jobs"
            found.append(Problem(flag, "has no effect with --coordinate_check", fix="leave it out"))
        widths = self.coordinate_check
        if len(set(widths)) < 2 or any(one < HEAD_SIZE or one % HEAD_SIZE for one in widths):
            need = f"two or more multiples of {HEAD_SIZE}"
            got = f"got {' '.join(map(str, widths))}"
            found.append(Problem("--coordinate_check", got, need))
        if not 1e-6 <= self.lr <= 10:
            found.append(Problem("--lr", f"got {self.lr}", "1e-6 to 10"))
        return found


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(SweepConfig, "python -m cs_lm sweep", __doc__, argv)
    folder = SweepFolder(config.out_dir)
    if config.coordinate_check:
        return _check_coordinates(config, folder.path)
    spec = _spec(config, folder)
    runs = planned_runs(spec, config_of)
    if config.dry_run:
        print(_described(runs))
        return 0
    with folder.lock():
        if not config.resume:
            _refuse_a_sweep(folder)  # that began meanwhile
            folder.write_spec(spec)
        try:
            train_runs(runs, folder, config.num_jobs, _say_that_it_trains, _told(runs, folder))
        finally:
            results = results_of(runs, folder)
            write_results(results, folder.results)
    return _shown(config, folder, runs, results)


def _shown(
    config: SweepConfig,
    folder: SweepFolder,
    runs: Sequence[PlannedRun],
    results: Sequence[Result],
) -> int:
    print(table(results))
    print(f"results  {folder.results}")
    _plot(results, folder.path)
    best = ranked(results)
    if best:
        own = Path(config.out_dir) / "best"
        print(f"best     {best[0].run.name}: {command_of(best[0].run, own)}")
        for name, end in at_an_end(results):
            print(f"note     the best {name} is the {end} of those tried; try further")
    num_failed = sum(one.state.startswith("failed") for one in results)
    if num_failed:
        logs = folder.path / "logs"
        print(f"{num_failed} of {len(runs)} runs failed: see {logs}; --resume tries them again")
    return 1 if num_failed else 0


def _check_coordinates(config: SweepConfig, folder: Path) -> int:
    widths = config.coordinate_check
    changes = {
        "muP": coordinate_check(widths, widths[0], config.lr),
        "without muP": coordinate_check(widths, None, config.lr),
    }
    rows = [("after the last update", *changes)]
    of_each = {title: slopes(found) for title, found in changes.items()}
    for name in of_each["muP"]:
        rows.append((f"{name} ~ width^", *(f"{found[name]:+.2f}" for found in of_each.values())))
    print(text_table(rows))
    try:
        print(f"plot     {plot_changes(changes, folder / 'coordinate-check.png')}")
    except UserError as error:  # matplotlib is missing
        print(error)
    return 0


def _spec(config: SweepConfig, folder: SweepFolder) -> Spec:
    if config.resume:
        if not folder.exists():
            what = f"{config.out_dir!r} holds no sweep"
            raise UserError(Problem("--resume", what, fix="name its folder, or leave --resume out"))
        spec = folder.read_spec()
        if config.names_a_family and _spec_of_flags(config) != spec:
            what = f"the sweep in {config.out_dir!r} is another one than the flags say"
            fix = "leave --spec, --flags, --vary and --budgets out, or name another folder"
            raise UserError(Problem("--resume", what, fix=fix))
        return spec
    if not config.dry_run:
        _refuse_a_sweep(folder)
    return _spec_of_flags(config)


def _spec_of_flags(config: SweepConfig) -> Spec:
    if config.spec is not None:
        return read_spec(config.spec)
    vary = {}
    for one in config.vary:
        name, _, values = one.partition("=")
        if name in vary:
            raise UserError(Problem("--vary", f"names {name} twice", fix="give all values at once"))
        vary[name.removeprefix("--")] = [_value(text) for text in values.split(",")]
    content: dict[str, Any] = {"vary": vary, "flags": _flags(config.flags or "")}
    if config.budgets:
        content["isoflop"] = {"budgets": list(config.budgets)}
    return spec_of(content)


def _refuse_a_sweep(folder: SweepFolder) -> None:
    if folder.exists():
        what = f"{str(folder.path)!r} holds a sweep already"
        raise UserError(Problem("--out_dir", what, fix="add --resume, or name another folder"))


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text, text)


def _flags(text: str) -> dict[str, Any]:
    """The flags of a command line as a table."""
    found: dict[str, Any] = {}
    name = None
    try:
        words = shlex.split(text)
    except ValueError as error:  # a quotation that does not end
        raise UserError(Problem("--flags", f"got {text!r} ({error})")) from None
    for word in words:
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            if name in found:
                raise UserError(Problem("--flags", f"has --{name} twice", fix="give it once"))
            found[name] = [_value(value)] if has_value else []
        elif name is None:
            raise UserError(Problem("--flags", f"got {word!r}, which belongs to no flag"))
        else:
            found[name].append(_value(word))
    return {
        name.removeprefix("no-"): values if len(values) > 1 else values[0]
        if values else not name.startswith("no-")
        for name, values in found.items()
    }  # fmt: skip


def _say_that_it_trains(run: PlannedRun) -> None:
    print(f"training {run.name}", flush=True)


def _told(runs: Sequence[PlannedRun], folder: SweepFolder):
    """Prints each run as it ends, and keeps the table up to date."""
    results = results_of(runs, folder)
    places = {run.name: place for place, run in enumerate(runs)}
    ended = {one.run.name for one in results if one.state in ("done", "diverged")}

    def on_end(run: PlannedRun, status: int) -> None:
        own = results[places[run.name]] = result_of(run, folder, status)
        write_results(results, folder.results)
        ended.add(run.name)
        shown = "" if own.loss is None else f", loss {own.loss:.4f}"
        took = "" if own.seconds is None else f" ({own.seconds:.0f} s)"
        print(f"[{len(ended)}/{len(runs)}] {run.name}: {own.state}{shown}{took}", flush=True)
        if status != DONE:
            print(f"  its output: {folder.log(run.name)}", flush=True)

    return on_end


def _plot(results: Sequence[Any], folder: Path) -> None:
    try:
        for path in plot_sweep(results, folder):
            print(f"plot     {path}")
    except UserError as error:
        print(error)


def _described(runs: Sequence[PlannedRun]) -> str:
    lines, total = [], 0.0
    for run in runs:
        model = run.config.model
        steps, tokens = run.config.max_steps, None
        if steps is not None:
            tokens = steps * run.config.tokens_per_step
            total += tokens * flops_per_token(model, run.config.seq_length)
        shown = (
            "tokens by --num_epochs" if tokens is None else f"{tokens:,} tokens in whole updates"
        )
        lines.append(f"{run.name}: {num_parameters(model):,} parameters, {shown}")
    known = f"{total:.3g} FLOPs" if total else "their FLOPs follow from --num_epochs"
    return "\n".join([*lines, f"{len(runs)} runs, {known}"])
