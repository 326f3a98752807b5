"""`python -m cs_lm eval`: a trained model answers the questions of a task.

Each question stands alone (--num_shots 0), or after solved examples, the demonstrations. With
several numbers, each is evaluated; with --dev_path, the best one there is evaluated on the task.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cs_lm.cli._errors import readable_errors
from cs_lm.cli._outputs import PLOT, RESULTS, growing_file, output_problems
from cs_lm.cli._progress import ProgressLine
from cs_lm.config.fields import setting
from cs_lm.config.flags import parse_config
from cs_lm.config.shared import (
    checkpoint_setting,
    device_setting,
    document_separator_setting,
    encoding_errors_setting,
    text_field_setting,
    validate_checkpoint,
)
from cs_lm.data.corpus import text_of
from cs_lm.device import resolve_device
from cs_lm.errors import Problem, UserError, no_effect_without
from cs_lm.evaluation.contamination import NGRAM_WORDS, contaminated
from cs_lm.evaluation.in_context import (
    MAX_NEW_TOKENS,
    SCORINGS,
    Accuracy,
    Answered,
    InContextOptions,
    Question,
    accuracy,
    accuracy_by_subject,
    answer_all,
    mean_logprob,
    pose,
)
from cs_lm.evaluation.prompts import PromptFormat
from cs_lm.evaluation.tasks import KINDS, Example, files_named, kind_of, read_examples
from cs_lm.reports.accuracy_plot import draw_accuracy
from cs_lm.training.run_dir import RunFolder, TrainedModel, load_trained

_FORMAT = PromptFormat()
_MOST_SUBJECTS = 100  # in the table; the results have all
_QUESTIONS_AT_ONCE = 128  # then their answers are in the file of the results


@dataclass(frozen=True)
class EvalConfig:
    out_dir: str = setting("", "folder of the run; required")
    checkpoint: str = checkpoint_setting()
    task_path: tuple[str, ...] = setting(
        (), "files (.jsonl, .csv) or patterns with the questions; required"
    )
    demonstrations_path: tuple[str, ...] = setting(
        (), "files or patterns with solved examples to show before a question"
    )
    dev_path: tuple[str, ...] = setting(
        (), "files or patterns on which the best of --num_shots is chosen"
    )
    num_shots: tuple[int, ...] = setting(
        (0,), "demonstrations before a question, as many as fit the context; several are compared"
    )
    kind: str = setting(
        "auto",
        "how answers are judged; auto: multiple_choice with choices, last_number with '####' in "
        "the answer, else exact_match",
        choices=("auto", *KINDS),
    )
    scoring: str = setting(
        "sum",
        "a choice counts by its log-probability: sum, per_token (mean), or answer_only (minus that "
        "without the question)",
        choices=SCORINGS,
    )
    template: str = setting(
        _FORMAT.template.replace("\n", "\\n"), "a solved example; \\n stands for a line end"
    )
    separator: str = setting(
        _FORMAT.separator.replace("\n", "\\n"), "text between examples; \\n stands for a line end"
    )
    instruction: str = setting("", "first text of each prompt")
    letters: bool = setting(False, "list the choices, and answer with their letter")
    max_examples: int | None = setting(None, "take this many questions; default: all")
    max_new_tokens: int | None = setting(
        None, f"of a generated answer; default: {MAX_NEW_TOKENS}", "tokens"
    )
    seed: int = setting(0, "of the demonstrations")
    results_path: str | None = setting(None, "write one JSON line for each answer to this file")
    plot_path: str | None = setting(None, "draw accuracy against --num_shots to this .png or .svg")
    contamination_path: tuple[str, ...] = setting(
        (), "training text: report which questions occur in it, and the accuracy without them"
    )
    ngram: int | None = setting(
        None, f"a question occurs if this many of its words do, in a row; default: {NGRAM_WORDS}"
    )
    encoding_errors: str = encoding_errors_setting()
    text_field: str = text_field_setting()
    document_separator: str | None = document_separator_setting()
    device: str = device_setting()

    def validate(self) -> list[Problem]:
        found = [
            Problem(f"--{name}", "is missing", fix="name it")
            for name in ("out_dir", "task_path")
            if not getattr(self, name)
        ]
        for name in ("max_examples", "max_new_tokens", "ngram"):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(Problem(f"--{name}", f"got {value}", "1 or more"))
        if not self.num_shots or min(self.num_shots) < 0:
            got = " ".join(map(str, self.num_shots)) or "nothing"
            found.append(Problem("--num_shots", f"got {got}", "0 or more"))
        elif len(set(self.num_shots)) < len(self.num_shots):
            found.append(Problem("--num_shots", "has a number twice"))
        elif max(self.num_shots) > 0 and not self.demonstrations_path:
            what = "has no solved examples to show"
            found.append(Problem("--num_shots", what, fix="name --demonstrations_path"))
        elif max(self.num_shots) == 0 and self.demonstrations_path:
            what, fix = "has no effect without demonstrations", "add --num_shots, such as 0 4"
            found.append(Problem("--demonstrations_path", what, fix=fix))
        if self.dev_path and len(self.num_shots) < 2:
            found.append(Problem("--dev_path", "has no effect with one value of --num_shots"))
        if self.seed < 0:
            found.append(Problem("--seed", f"got {self.seed}", "0 or more"))
        for name in ("ngram", "encoding_errors", "text_field", "document_separator"):
            is_given = getattr(self, name) != getattr(EvalConfig, name)
            if is_given and not self.contamination_path:
                found.append(no_effect_without(f"--{name}", "--contamination_path"))
        return found + validate_checkpoint(self.checkpoint)


class _Report(NamedTuple):
    """The answers after one number of demonstrations."""

    num_shots: int
    answered: list[Answered]


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(EvalConfig, "python -m cs_lm eval", __doc__, argv)
    _check_outputs(config)
    examples = read_examples(config.task_path)[: config.max_examples]
    pool = _examples(config.demonstrations_path, "--demonstrations_path")
    dev = _examples(config.dev_path, "--dev_path")
    kind = kind_of(examples) if config.kind == "auto" else config.kind
    options = InContextOptions(
        kind,
        _prompt_format(config),
        config.scoring,
        config.seed,
        config.max_new_tokens or MAX_NEW_TOKENS,
    )
    _check_kind(config, options, (*examples, *dev))
    is_dirty = _contamination(config, examples)
    device = resolve_device(config.device)
    trained = load_trained(RunFolder(config.out_dir), config.checkpoint, device)
    print(f"model    {config.out_dir}, {config.checkpoint}, step {trained.iteration}")
    print(f"task     {' '.join(config.task_path)}: {len(examples):,} questions, {kind}")

    def posed(examples: Sequence[Example]) -> dict[int, list[Question]]:
        length = trained.config.model.context_length
        return {
            n: pose(trained.tokenizer, length, examples, pool, n, options) for n in config.num_shots
        }

    questions, of_dev = posed(examples), posed(dev)  # all are checked before the first answer
    if dev:
        on_dev = [_report(trained, n, of_dev[n], options) for n in config.num_shots]
        print("\non the development part")
        _print_accuracies(on_dev)
        best = max(on_dev, key=lambda report: accuracy(report.answered).share)
        questions = {best.num_shots: questions[best.num_shots]}
        print(f"chosen: {best.num_shots}")
    with growing_file(config.results_path) as append:

        def add(num_shots: int, index: int, one: Answered) -> None:
            dirty = None if is_dirty is None else is_dirty[index]
            append(_record(config, trained.iteration, num_shots, index, one, dirty))

        reports = [_report(trained, n, asked, options, add) for n, asked in questions.items()]
    print()
    _print_accuracies(reports)
    _print_subjects(reports)
    if is_dirty is not None:
        _print_contamination(reports, is_dirty, config.ngram or NGRAM_WORDS)
    if config.results_path is not None:
        print(f"\nresults  {config.results_path}")
    if config.plot_path is not None:
        _draw(config.plot_path, reports, examples)
        print(f"plot     {config.plot_path}")
    return 0


def _check_outputs(config: EvalConfig) -> None:
    given = {"--task_path": config.task_path, "--dev_path": config.dev_path,
             "--demonstrations_path": config.demonstrations_path}  # fmt: skip
    inputs = [str(file) for flag, paths in given.items() for file in files_named(paths, flag)]
    problems = output_problems("--results_path", config.results_path, RESULTS, inputs)
    problems += output_problems("--plot_path", config.plot_path, PLOT)
    if problems:
        raise UserError(*problems)


def _check_kind(config: EvalConfig, options: InContextOptions, examples: Sequence[Example]) -> None:
    kind = options.kind
    if kind == "multiple_choice":
        bare = next((example for example in examples if not example.choices), None)
        if bare is not None:
            raise UserError(f"--kind: got multiple_choice, but {bare.where} has no choices")
    no_effect = {
        "--letters": config.letters and kind != "multiple_choice",
        "--scoring": config.scoring != "sum" and options.is_generated,
        "--max_new_tokens": config.max_new_tokens is not None and not options.is_generated,
    }
    for flag, is_given in no_effect.items():
        if is_given:
            raise UserError(f"{flag}: has no effect with answers of kind {kind}; leave it out")


def _examples(paths: Sequence[str], flag: str) -> list[Example]:
    return read_examples(paths, flag) if paths else []


def _prompt_format(config: EvalConfig) -> PromptFormat:
    template, separator, instruction = (
        text.replace("\\n", "\n")
        for text in (config.template, config.separator, config.instruction)
    )
    return PromptFormat(template, separator, instruction, config.letters)


def _contamination(config: EvalConfig, examples: Sequence[Example]) -> list[bool] | None:
    if not config.contamination_path:
        return None
    text = text_of(config.contamination_path, config, (), "--contamination_path")
    return contaminated(examples, text.read(), config.ngram or NGRAM_WORDS)


def _report(
    trained: TrainedModel,
    num_shots: int,
    questions: Sequence[Question],
    options: InContextOptions,
    add: Callable[[int, int, Answered], None] = lambda num_shots, index, one: None,
) -> _Report:
    """add: called with number of demonstrations, place and answer, as soon as they are there"""
    progress, report = ProgressLine(), _Report(num_shots, [])
    for first in range(0, len(questions), _QUESTIONS_AT_ONCE):

        def show(done: int, first: int = first) -> None:
            progress(f"{num_shots} demonstrations", first + done, len(questions))

        part = questions[first : first + _QUESTIONS_AT_ONCE]
        answered = answer_all(trained.model, trained.tokenizer, part, options, show)
        for index, one in enumerate(answered, start=first):
            add(num_shots, index, one)
        report.answered.extend(answered)
    progress.close()
    return report


def _print_accuracies(reports: Sequence[_Report]) -> None:
    scored = bool(reports[0].answered[0].scores)
    heads = (
        f"{'demonstrations':>14}{'fitted':>8}{'correct':>14}{'accuracy':>10}{'95% interval':>18}"
    )
    print(heads + (f"{'nats of the right answer (95%)':>34}" if scored else ""))
    for num_shots, answered in reports:
        found = accuracy(answered)
        low, high = found.interval
        fitted = sum(one.question.num_shots for one in answered) / len(answered)
        counts = f"{found.num_correct:,} of {found.num_examples:,}"
        line = f"{num_shots:>14}{fitted:>8.1f}{counts:>14}{found.share:>10.4f}"
        line += f"{f'{low:.4f} to {high:.4f}':>18}"
        if scored:
            mean, least, most = mean_logprob(answered)
            line += f"{f'{mean:.3f} ({least:.3f} to {most:.3f})':>34}"
        print(line)
    for num_shots, answered in reports:
        if cut := [one.example.where for one in answered if one.question.is_cut]:
            print(
                f"{num_shots} demonstrations: {len(cut):,} questions do not fit the context with "
                f"their answer, and lose their beginning (the first: {cut[0]})"
            )


def _print_subjects(reports: Sequence[_Report]) -> None:
    tables = [accuracy_by_subject(report.answered) for report in reports]
    if not 1 < len(tables[0]) <= _MOST_SUBJECTS:
        return
    width = max(8, *map(len, tables[0])) + 2
    shown = "".join(f"{report.num_shots:>26}" for report in reports)
    print(f"\n{'subject':<{width}}{'questions':>9}{shown}")
    for subject, first in tables[0].items():
        cells = "".join(f"{_cell(table[subject]):>26}" for table in tables)
        print(f"{subject:<{width}}{first.num_examples:>9,}{cells}")


def _cell(found: Accuracy) -> str:
    low, high = found.interval
    return f"{found.share:.3f} ({low:.3f} to {high:.3f})"


def _print_contamination(reports: Sequence[_Report], is_dirty: list[bool], ngram: int) -> None:
    total = sum(is_dirty)
    print(f"\n{total:,} of {len(is_dirty):,} questions share {ngram} words in a row with the text")
    for num_shots, answered in reports:
        clean = [one for one, dirty in zip(answered, is_dirty, strict=True) if not dirty]
        left = _cell(accuracy(clean)) if clean else "none is left"
        print(f"{num_shots:>14} demonstrations, without them: {left}")


def _record(
    config: EvalConfig, step: int, num_shots: int, index: int, one: Answered, is_dirty: bool | None
) -> bytes:
    """One line of the results. (id, num_shots, seed) names the same question in every file."""
    record = {
        "model": config.out_dir,
        "step": step,
        "subject": one.example.subject,
        "id": one.example.id,
        "index": index,
        "num_shots": num_shots,
        "num_shots_fitted": one.question.num_shots,
        "scoring": config.scoring,
        "seed": config.seed,
        "question": one.example.question,
        "question_is_cut": one.question.is_cut,
        "choices": one.example.choices,
        "answer": one.example.answer,
        "given": one.given,
        "correct": one.is_correct,
        "scores_nats": one.scores,
        "contaminated": is_dirty,
    }
    return json.dumps(record).encode("utf-8") + b"\n"


def _draw(path: str, reports: Sequence[_Report], examples: Sequence[Example]) -> None:
    points = []
    for num_shots, answered in reports:
        found = accuracy(answered)
        points.append((num_shots, found.share, *found.interval))
    chance = None
    if all(example.choices for example in examples):
        chance = sum(1 / len(example.choices) for example in examples) / len(examples)
    draw_accuracy({"accuracy": points}, path, chance)
