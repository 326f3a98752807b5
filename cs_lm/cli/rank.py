"""`python -m cs_lm rank`: samples answers to prompts, and ranks them.

The order comes from a rule, from a reward model, or from you: without both, each prompt's answers
are shown on the terminal. The file can be given to `reward --data`. Prompts that the file holds
already are left out, so the same command goes on after a stop.
"""

import itertools
import json
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cs_lm.alignment.answers import Answer
from cs_lm.alignment.comparison import answers_of, check_room
from cs_lm.alignment.conversations import template_of
from cs_lm.alignment.records import Prompt, ranks_of, read_prompts, record_of
from cs_lm.alignment.rollouts import draw_answers, longest_row
from cs_lm.cli._errors import readable_errors
from cs_lm.cli._judges import Judge, JudgeStopped, judge_of, scores_of
from cs_lm.cli._outputs import is_an_input, unwritable
from cs_lm.config.fields import not_positive, setting
from cs_lm.config.flags import parse_config
from cs_lm.config.shared import checkpoint_setting, device_setting, validate_checkpoint
from cs_lm.device import resolve_device
from cs_lm.errors import Problem, UserError, missing
from cs_lm.inference.sampling import uniform_draws
from cs_lm.storage.lock import locked
from cs_lm.training.run_dir import RunFolder, load_trained

_PROMPTS_AT_ONCE = 64
_BEGINNINGS = (b'{"prompt"', b'{"instruction"', b'{"messages"')  # of a ranking


@dataclass(frozen=True)
class RankConfig:
    """Ranked answers."""

    source: str = setting("", "folder of the run that answers; required", flag="--from")
    checkpoint: str = checkpoint_setting()
    prompts: tuple[str, ...] = setting((), "prompts: JSON or JSONL files, or patterns; required")
    out: str = setting("", "JSONL file of the rankings; it is continued if it is there; required")
    num_answers: tuple[int, ...] = setting(
        (4,), "answers to each prompt: one number, or the least and the most of a random one"
    )
    rule: str | None = setting(
        None, "rank by a rule: exact, contains, last_number, length, or module:function"
    )
    reward: str | None = setting(None, "rank by the reward model in this folder")
    temperature: float = setting(1.0, "of the sampled answers")
    max_new_tokens: int = setting(128, "of an answer", "tokens")
    seed: int = setting(0, "of the answers", minimum=0)
    device: str = device_setting()

    def validate(self) -> list[Problem]:
        found = missing({"--from": self.source, "--prompts": self.prompts, "--out": self.out})
        found += not_positive(self)
        counts = list(self.num_answers)
        if not 1 <= len(counts) <= 2 or counts != sorted(counts) or counts[0] < 2:
            what = f"got {' '.join(map(str, counts))}"
            need = "one number, or the least and the most, from 2"
            found.append(Problem("--num_answers", what, need))
        if self.rule is not None and self.reward is not None:
            found.append(Problem("--rule, --reward", "got both", fix="give one of the two"))
        if self.out:
            found += unwritable("--out", self.out) or is_an_input("--out", self.out, self.prompts)
        return found + validate_checkpoint(self.checkpoint)


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(RankConfig, "python -m cs_lm rank", __doc__, argv)
    prompts = read_prompts(config.prompts)
    device = resolve_device(config.device)
    judge = judge_of(config.rule, config.reward, device)
    answers_to = _Sampler(config, judge.reads, device)
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.with_name(f".{out.name}.lock"), remove=True) as is_ours:
        if not is_ours:
            what = f"another process ranks into {str(out)!r}"
            raise UserError(Problem("--out", what, fix="wait for it, or name another file"))
        try:
            _rank(config, prompts, judge, answers_to, out)
        except JudgeStopped as stopped:
            print(stopped)
    print(f"rankings: {out}")
    return 0


def _rank(
    config: RankConfig, prompts: Sequence[Prompt], judge: Judge, answers_to: "_Sampler", out: Path
) -> None:
    made = {
        "judge": judge.name,
        "from": os.path.normpath(config.source),
        "temperature": config.temperature,
    }
    done = _prompts_in(out, made)
    todo = []
    for number, one in enumerate(prompts):  # a prompt that occurs twice is ranked twice
        key = _key(record_of(one))
        done[key] -= 1
        if done[key] < 0:
            todo.append((number, one))
    print(f"{len(prompts):,} prompts, {len(prompts) - len(todo):,} of them ranked already")
    todo = [(number, one, answers_to.ids_of(one)) for number, one in todo]
    with out.open("a", encoding="utf-8") as file:
        for start in range(0, len(todo), _PROMPTS_AT_ONCE):
            part = todo[start : start + _PROMPTS_AT_ONCE]
            for (number, prompt, _), answers in zip(part, answers_to(part), strict=True):
                scores = scores_of(judge, prompt, answers, f"{config.seed}:{number}")
                record = _ranked(prompt, answers, scores) | made
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()


class _Sampler:
    """Draws the answers. Those to prompt number n follow from (seed, n), not from the others."""

    def __init__(self, config: RankConfig, judge_reads: int | None, device: torch.device):
        """judge_reads  as `longest_row` takes it"""
        trained = load_trained(RunFolder(config.source, "--from"), config.checkpoint, device)
        self._template = template_of(trained.tokenizer, trained.template or "auto")
        self._model, self._tokenizer, self._config = trained.model, trained.tokenizer, config
        self._longest = longest_row(trained.config.model.context_length, judge_reads)

    def ids_of(self, prompt: Prompt) -> list[int]:
        """Its token ids. Raises: UserError for a prompt that leaves no room for an answer."""
        ids = self._template.render_for_completion(prompt.conversation)
        check_room(prompt, len(ids), self._config.max_new_tokens, self._longest)
        return ids

    def __call__(self, numbered: Sequence[tuple[int, Prompt, list[int]]]) -> list[list[Answer]]:
        """The answers to each of some prompts (number, prompt, ids), all drawn in one batch."""
        rows, uniform, counts = [], [], []
        for number, _, ids in numbered:
            rng = random.Random(f"{self._config.seed}:{number}")
            counts.append(rng.randint(self._config.num_answers[0], self._config.num_answers[-1]))
            rows += [ids] * counts[-1]
            seed, length = rng.getrandbits(40), self._config.max_new_tokens
            uniform.append(uniform_draws(seed, range(counts[-1]), length))
        temperature, end_id = self._config.temperature, self._template.end_id
        drawn = draw_answers(self._model, rows, end_id, torch.cat(uniform), temperature)
        answers = iter(answers_of(drawn, self._tokenizer, end_id))
        return [list(itertools.islice(answers, count)) for count in counts]


def _ranked(prompt: Prompt, answers: Sequence[Answer], scores: list[float]) -> dict:
    texts, ended = [one.text for one in answers], [one.ended for one in answers]
    found = {"responses": texts, "ranks": ranks_of(scores)}
    return record_of(prompt) | found | {"scores": scores, "ended": ended}


def _key(record: dict) -> str:
    names = ("prompt", "instruction", "input", "messages")
    return json.dumps([record.get(name) for name in names])


def _prompts_in(path: Path, made: dict[str, Any]) -> Counter[str]:
    """How often each prompt is in a file that an earlier call wrote.

    A half line at its end is taken out.
    made  who answered and who judged
    Raises: UserError for a file that holds anything else, or rankings that were made otherwise;
    it stays as it is.
    """
    if not path.exists():
        return Counter()
    content = path.read_bytes()
    whole, rest = content[: content.rfind(b"\n") + 1], content[content.rfind(b"\n") + 1 :]
    try:
        records = [json.loads(line) for line in whole.splitlines() if line.strip()]
        keys = Counter(_key(record) for record in records if record["ranks"])
        last = _parsed(rest)
        if last is not None:
            keys[_key(last)] += bool(last["ranks"])
        elif rest and not rest.startswith(_BEGINNINGS):
            raise ValueError
    except (ValueError, TypeError, KeyError):
        what, fix = f"{str(path)!r} holds other lines than rankings", "name another file"
        raise UserError(Problem("--out", what, fix=fix)) from None
    for name, now in made.items():
        before = next((one[name] for one in records if one.get(name, now) != now), None)
        if before is not None:
            what = f"{str(path)!r} has rankings with {name} {before!r}, not {now!r}"
            raise UserError(Problem("--out", what, fix="name another file, or give the same again"))
    if last is not None:
        with path.open("ab") as file:
            file.write(b"\n")
    elif rest:
        os.truncate(path, len(whole))
    return keys


def _parsed(text: bytes) -> Any:
    """The JSON value, or None for what is none, such as half a line."""
    try:
        return json.loads(text)
    except ValueError:
        return None
