"""`python -m cs_lm compare`: which of several models answers prompts better.

Answers are judged by a rule, by a reward model, or by you: without both, they are shown on the
terminal in an order that hides whose they are. Each model is held against the first one.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cs_lm.alignment.comparison import (
    DrawingOptions,
    DrawnAnswers,
    Standing,
    answer_prompts,
    standings,
)
from cs_lm.alignment.records import Prompt, read_prompts
from cs_lm.cli._errors import readable_errors
from cs_lm.cli._judges import PERSON, Judge, JudgeStopped, judge_of, scores_of, shown
from cs_lm.cli._outputs import COMPARISON, growing_file, output_problems
from cs_lm.cli._progress import ProgressLine
from cs_lm.config.fields import not_positive, setting
from cs_lm.config.flags import parse_config
from cs_lm.config.shared import checkpoint_setting, device_setting, validate_checkpoint
from cs_lm.device import resolve_device
from cs_lm.errors import Problem
from cs_lm.training.run_dir import RunFolder, load_trained


@dataclass(frozen=True)
class CompareConfig:
    """A comparison of models."""

    runs: tuple[str, ...] = setting((), "folders of two or more runs; required")
    checkpoint: str = checkpoint_setting()
    prompts: tuple[str, ...] = setting((), "prompts: JSON or JSONL files, or patterns; required")
    max_prompts: int | None = setting(None, "take this many of them; default: all")
    rule: str | None = setting(
        None, "judge by a rule: exact, contains, last_number, length, or module:function"
    )
    reward: str | None = setting(None, "judge by the reward model in this folder")
    temperature: float = setting(1.0, "of the answers")
    max_new_tokens: int = setting(64, "of an answer", "tokens")
    seed: int = setting(0, "of the answers, and of the order in which they are shown", minimum=0)
    results_path: str | None = setting(None, "write one JSON line for each prompt to this file")
    device: str = device_setting()

    def validate(self) -> list[Problem]:
        found = not_positive(self)
        if len(self.runs) < 2:
            what = f"got {len(self.runs)}"
            found.append(Problem("--runs", what, "the folders of two or more runs"))
        elif len(set(map(os.path.realpath, self.runs))) < len(self.runs):
            found.append(Problem("--runs", "names a run twice", fix="name each once"))
        if not self.prompts:
            found.append(Problem("--prompts", "is missing", fix="name it"))
        if self.rule is not None and self.reward is not None:
            found.append(Problem("--rule, --reward", "got both", fix="give one of the two"))
        found += output_problems("--results_path", self.results_path, COMPARISON, self.prompts)
        if self.results_path is not None and _holds_judgements_of_a_person(self.results_path):
            what = f"got {self.results_path!r}, which holds judgements of a person"
            found.append(Problem("--results_path", what, fix="name another file"))
        return found + validate_checkpoint(self.checkpoint)


def _holds_judgements_of_a_person(path: str) -> bool:
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return any(f'"judge": "{PERSON}"'.encode() in line for line in file)


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(CompareConfig, "python -m cs_lm compare", __doc__, argv)
    prompts = read_prompts(config.prompts)[: config.max_prompts]
    device = resolve_device(config.device)
    judge = judge_of(config.rule, config.reward, device)
    answers = _drawn(config, prompts, judge.reads, device)
    scores: list[list[float]] = [[] for _ in config.runs]
    with growing_file(config.results_path) as append:
        try:
            for number, prompt in enumerate(prompts):
                given = [own.answers[number] for own in answers]
                found = scores_of(judge, prompt, given, f"{config.seed}:{number}")
                for own, score in zip(scores, found):
                    own.append(score)
                record = _record(config, judge, number, prompt, answers, found)
                append(json.dumps(record).encode("utf-8") + b"\n")
        except JudgeStopped as stopped:
            print(stopped)
    if not scores[0]:
        return 2
    print(f"{len(scores[0]):,} prompts, judged by {'you' if judge.is_person else judge.name}")
    _print_table(standings(config.runs, answers, scores))
    if config.results_path is not None:
        print(f"results  {config.results_path}")
    return 0


def _drawn(
    config: CompareConfig, prompts: Sequence[Prompt], judge_reads: int | None, device: torch.device
) -> list[DrawnAnswers]:
    """The answers of each run; the divergence is that from the first one, where it is defined."""
    options = DrawingOptions(config.max_new_tokens, config.temperature, config.seed, judge_reads)
    first, answers = None, []
    for path in config.runs:
        trained = load_trained(RunFolder(path, "--runs"), config.checkpoint, device)
        progress = ProgressLine()

        def show(done: int, path: str = path, progress: ProgressLine = progress) -> None:
            progress(path, done, len(prompts))

        is_alike = first is not None and (
            trained.tokenizer.fingerprint == first.tokenizer.fingerprint
        )
        reference = first.model if is_alike else None
        answers.append(answer_prompts(trained, prompts, options, reference, show))
        progress.close()
        first = first or trained
    return answers


def _record(
    config: CompareConfig,
    judge: Judge,
    number: int,
    prompt: Prompt,
    answers: Sequence[DrawnAnswers],
    scores: Sequence[float],
) -> dict:
    return {
        "compared_runs": config.runs,
        "number": number,
        "prompt": shown(prompt.conversation),
        "answers": [own.answers[number].text for own in answers],
        "ended": [own.answers[number].ended for own in answers],
        "scores": list(scores),
        "judge": judge.name,
        "seed": config.seed,
    }


def _print_table(found: Sequence[Standing]) -> None:
    width = max(len(one.name) for one in found)
    print(
        f"{'run':<{width}}{'score':>9}{'wins over the first (95%)':>28}{'KL':>8}{'length':>8}"
        f"{'ended':>7}{'distinct-4':>12}"
    )
    for one in found:
        wins, kl = "-", "-" if one.kl is None else f"{one.kl:.2f}"
        if one.wins is not None:
            low, high = one.wins.interval
            wins = f"{one.wins.share:.3f} ({low:.3f} to {high:.3f})"
        distinct = "-" if one.distinct_4 is None else f"{one.distinct_4:.3f}"
        print(
            f"{one.name:<{width}}{one.score:>9.3f}{wins:>28}{kl:>8}{one.length:>8.1f}"
            f"{one.ended:>7.2f}{distinct:>12}"
        )
