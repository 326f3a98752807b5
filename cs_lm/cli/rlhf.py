"""`python -m cs_lm rlhf`: the whole way from a text to an aligned model, on a task that is known.

A model learns the Python manual, then to answer instructions about words, from demonstrations in
three styles. Noisy labelers rank its answers, a reward model learns from them, and PPO, PPO-ptx,
DPO and GRPO go on from the same model. Because it is known what is really better, the report shows
what nobody knows of real people. Every stage is a run like any other; a chain that was stopped goes
on.
"""

import dataclasses
import importlib
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cs_lm.alignment import words
from cs_lm.alignment.answers import row_of
from cs_lm.alignment.comparison import DrawingOptions, answer_prompts, standings
from cs_lm.alignment.records import Prompt, ranks_of, read_prompts, read_rankings
from cs_lm.alignment.reward_model import preference_report, render_rankings, score_rows
from cs_lm.alignment.reward_training import RewardConfig, RewardModel, load_reward_model
from cs_lm.alignment.rules import score_by_rule
from cs_lm.alignment.stage import split_by_prompt
from cs_lm.cli._errors import readable_errors
from cs_lm.cli._fit import check_writable
from cs_lm.cli._progress import ProgressLine
from cs_lm.config.data import DataConfig
from cs_lm.config.fields import not_positive, setting
from cs_lm.config.flags import parse_config
from cs_lm.config.shared import device_setting
from cs_lm.data.corpus import embedded_text
from cs_lm.data.pipeline import prepare
from cs_lm.data.token_store import Tokens
from cs_lm.device import resolve_device
from cs_lm.errors import Problem, UserError
from cs_lm.evaluation.perplexity import EvalOptions, evaluate, token_byte_lengths
from cs_lm.reports.alignment_report import COLUMNS, ModelRow, Run, alignment_report, cells_of
from cs_lm.storage.atomic import atomic_write
from cs_lm.training.metrics_log import MetricsLog
from cs_lm.training.run_dir import RunFolder, TrainedModel, load_trained

SPECIAL = "<|endoftext|> <|user|> <|assistant|> <|end|>"
NUM_DEMONSTRATIONS, NUM_RANKED, NUM_PROMPTS, NUM_SHOWN = 36_000, 6000, 4000, 6
NUM_FOR_DPO = 2000  # of the rankings, all of which are for the reward model
MAX_NEW_TOKENS = 24
_RULES = "cs_lm.alignment.words"
BASE = (
    f"--vocab_size 260 --special_tokens {SPECIAL} --d_model 96 --num_heads 4 --d_ff 256 "
    "--num_layers 3 --max_seq_length 96 --seq_length 96 --batch_size 16 --max_steps 350 "
    "--lr 3e-3 --lr_min 3e-4 --eval_interval 350 --save_interval 100 --sample_interval 350"
)
SFT = (
    "--batch_size 64 --num_epochs 99 --max_steps 1100 --lr 6e-3 --lr_min 2e-4 "
    "--pretraining_mix 0.0625 --ptx_coef 0.5 --eval_interval 400 --save_interval 100 "
    "--sample_interval 400"
)
RANK = (  # warmer than the policy answers, so that there is more to tell apart
    f"--num_answers 4 9 --temperature 1.5 --rule {_RULES}:label --max_new_tokens {MAX_NEW_TOKENS}"
)
REWARD = (
    "--batch_size 8 --num_epochs 2 --lr 1e-3 --lr_min 1e-4 --eval_interval 0 --save_interval 100"
)
_POLICY = (
    f"--max_new_tokens {MAX_NEW_TOKENS} --rollout_size 64 --batch_size 32 --num_epochs 99 "
    f"--gold_rule {_RULES}:gold --eval_interval 0 --save_interval 40 "
    "--log_interval 20 --warmup_ratio 0"
)
_TEXT = "--pretraining_mix 0.25 --ptx_coef 1"
PPO = f"{_POLICY} --max_steps 180 --lr 1e-4 --lr_min 1e-5 --kl_coef 0.15"
# four times as fast, so that half a minute shows where it leads
PPO_FREE = f"{_POLICY} --max_steps 140 --lr 4e-4 --lr_min 4e-4 --kl_coef 0"
GRPO = (
    f"{_POLICY} --max_steps 120 --group_size 4 --rollout_epochs 2 --lr 1e-4 --lr_min 1e-4 "
    "--beta 0.1"
)
DPO = (
    "--batch_size 8 --num_epochs 1 --beta 0.5 --lr 1e-4 --lr_min 1e-5 --eval_interval 0 "
    "--save_interval 50"
)


@dataclass(frozen=True)
class RLHFConfig:
    """The demonstration of alignment."""

    seed: int = setting(0, "of the data, the weights and all draws", minimum=0)
    device: str = device_setting()
    out_dir: str = setting("runs/rlhf", "folder of all runs, the data and the report")

    def validate(self) -> list[Problem]:
        return not_positive(self)


class Chain:
    """The stages, each in a folder of its own. `seconds` is the time of those that ran."""

    def __init__(self, config: RLHFConfig):
        self.config, self.folder = config, Path(config.out_dir)
        self._times = self.folder / "seconds.json"
        self.seconds: dict[str, float] = {}
        if self._times.is_file():
            self.seconds = json.loads(self._times.read_text(encoding="utf-8"))

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def run(self, name: str, command: str, flags: str, **paths: str) -> None:
        """A training stage: begun, gone on with, or done already. Raises: UserError if it fails."""
        folder = RunFolder(self.folder / name)
        given = [word for key, value in paths.items() for word in (f"--{key}", value)]
        given += ["--seed", str(self.config.seed), "--device", self.config.device]
        words = [*flags.split(), *given, "--out_dir", str(folder.path)]
        if folder.exists():
            if folder.ends():
                return
            words = ["--resume", "--out_dir", str(folder.path)]
            if command == "train":
                words += ["--corpus_size", "python-manual"]
        self.call(name, command, words)

    def call(self, name: str, command: str, words: Sequence[str]) -> None:
        print(f"\n==== {name}: cs-lm {command}", flush=True)
        begun = time.monotonic()
        status = importlib.import_module(f"cs_lm.cli.{command}").main(words)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begun
        atomic_write(self._times, json.dumps(self.seconds).encode("utf-8"))
        if status:
            raise SystemExit(status)


@readable_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(RLHFConfig, "python -m cs_lm rlhf", __doc__, argv)
    resolve_device(config.device)
    check_writable(Path(config.out_dir))
    _check_seed(config)
    chain = Chain(config)
    _write_data(chain)
    _train_all(chain)
    _report(chain)
    return 0


def _check_seed(config: RLHFConfig) -> None:
    """Remembers the seed of the folder. Raises: UserError if it was begun with another one."""
    path = Path(config.out_dir) / "seed.json"
    if path.is_file():
        seed = json.loads(path.read_text(encoding="utf-8"))
        if seed != config.seed:
            what = f"got {config.seed}, but {config.out_dir!r} was begun with {seed}"
            raise UserError(Problem("--seed", what, fix="name another --out_dir"))
    else:
        atomic_write(path, json.dumps(config.seed).encode("utf-8"))


def _write_data(chain: Chain) -> None:
    seed = chain.config.seed
    known, rng = words.words_of(embedded_text(), seed), random.Random(seed)
    files = {
        "demonstrations": lambda: words.demonstrations_for(known.train, NUM_DEMONSTRATIONS, seed),
        "to_rank": lambda: words.prompts_for(rng.choices(known.train, k=NUM_RANKED), seed + 1),
        "prompts": lambda: words.prompts_for(rng.choices(known.train, k=NUM_PROMPTS), seed + 2),
        "test": lambda: words.prompts_for(known.test, seed + 3),
    }
    chain.folder.mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        words.write_records(chain.folder / f"{name}.jsonl", records())


def _train_all(chain: Chain) -> None:
    path = chain.path
    chain.run("base", "train", f"{BASE} --corpus_size python-manual")
    sft = {"from": path("sft")}
    chain.run("sft", "sft", SFT, data=path("demonstrations.jsonl"), **{"from": path("base")})
    _rank(chain, "rankings", "sft")
    chain.run("reward", "reward", REWARD, data=path("rankings.jsonl"), **sft)
    scored = {"prompts": path("prompts.jsonl"), "reward": path("reward"), **sft}
    chain.run("ppo", "ppo", PPO, **scored)
    chain.run("ppo_ptx", "ppo", f"{PPO} {_TEXT}", **scored)
    chain.run("ppo_free", "ppo", PPO_FREE, **scored)
    _keep_some(Path(path("rankings.jsonl")), Path(path("rankings_for_dpo.jsonl")))
    chain.run("dpo", "dpo", DPO, data=path("rankings_for_dpo.jsonl"), **sft)
    chain.run("grpo", "grpo", GRPO, **scored)


def _rank(chain: Chain, name: str, source: str) -> None:
    flags = [*RANK.split(), "--from", chain.path(source), "--prompts", chain.path("to_rank.jsonl"),
             "--out", chain.path(f"{name}.jsonl"), "--seed", str(chain.config.seed),
             "--device", chain.config.device]  # fmt: skip
    chain.call(name, "rank", flags)


def _keep_some(rankings: Path, target: Path) -> None:
    lines = rankings.read_bytes().splitlines(keepends=True)[:NUM_FOR_DPO]
    atomic_write(target, b"".join(lines))


MODELS = {
    "SFT": "sft",
    "PPO": "ppo",
    "PPO-ptx": "ppo_ptx",
    "PPO without KL": "ppo_free",
    "DPO": "dpo",
    "GRPO": "grpo",
}


def _report(chain: Chain) -> None:
    device = resolve_device(chain.config.device)
    judge = load_reward_model(RunFolder(chain.path("reward")), "last", device)
    prompts = read_prompts([chain.path("test.jsonl")])
    begun = time.monotonic()
    rows, texts = _measured(chain, prompts, judge, device)
    chain.seconds["report"] = time.monotonic() - begun
    agreement = _agreement(chain, judge, device)
    folders = {**MODELS, "base": "base", "reward": "reward"}
    records = {
        name: list(MetricsLog(RunFolder(chain.path(folder)).metrics).records())
        for name, folder in folders.items()
    }
    runs = [
        Run(name, [r for r in records[name] if r["kind"] == "rollout"])
        for name in ("PPO", "PPO-ptx", "PPO without KL", "GRPO")
    ]
    valid = [r for r in records["reward"] if r["kind"] == "valid"][-1]
    base = [r for r in records["base"] if r.get("bits_per_byte") is not None][-1]
    facts = [
        f"Seed {chain.config.seed}. {len(prompts)} prompts about words that no stage has "
        "seen; answers are drawn at temperature 1. Gold reward: 2 if right, 0.5 for each step of "
        "style, -0.01 a character, -1 without an end. PPO without KL runs at four times the "
        "learning rate, so that half a minute shows where it leads.",
        f"The reward model is right on {valid['accuracy']:.3f} of {valid['num_pairs']:,} pairs "
        "of answers that it has not seen, as noisy labelers ranked them; they themselves order "
        f"{agreement['labeler_accuracy']:.3f} of those pairs as they should be, and it orders "
        f"{agreement['gold_accuracy']:.3f}.",
    ]
    answers = [
        (prompt.conversation[-1].content, {name: own[number] for name, own in texts.items()})
        for number, prompt in enumerate(prompts[:NUM_SHOWN])
    ]
    text = alignment_report(
        "From a text to an aligned model", facts, rows, runs, valid["calibration"], answers,
        chain.seconds,
    )  # fmt: skip
    atomic_write(chain.folder / "report.html", text.encode("utf-8"))
    summary = {
        "seed": chain.config.seed, "models": {row.name: row._asdict() for row in rows},
        "reward_model": valid, "base_bits_per_byte": base["bits_per_byte"],
        "seconds": chain.seconds,
        **agreement,
    }  # fmt: skip
    atomic_write(chain.folder / "summary.json", json.dumps(summary, indent=1).encode("utf-8"))
    table = [COLUMNS, *map(cells_of, rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    print()
    for line in table:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths)).rstrip())
    print(f"\n{sum(chain.seconds.values()) / 60:.1f} minutes; report: {chain.path('report.html')}")


def _measured(
    chain: Chain, prompts: Sequence[Prompt], judge: RewardModel, device: torch.device
) -> tuple[list[Any], dict[str, list[str]]]:
    """The rows of the report, and the answers of each model."""
    options = DrawingOptions(MAX_NEW_TOKENS, seed=chain.config.seed)
    first, drawn, proxies, bits = None, [], [], []
    for folder in MODELS.values():
        trained = load_trained(RunFolder(chain.path(folder)), "last", device)
        if first is None:
            first, manual = trained, _manual_of(trained)
        reference = None if trained is first else first.model
        drawn.append(answer_prompts(trained, prompts, options, reference))
        rows = [
            row_of(judge.template, prompt.conversation, answer)
            for prompt, answer in zip(prompts, drawn[-1].answers)
        ]
        proxies.append(score_rows(judge.model, rows, device).mean().item())
        bits.append(_bits_per_byte(trained, manual))
    scores = {
        rule: [
            [score_by_rule(rule, a.text, p, a.ended) for p, a in zip(prompts, own.answers)]
            for own in drawn
        ]
        for rule in (words.gold, words.right, words.liked)
    }
    found = [
        ModelRow(
            one.name,
            one.score,
            proxy,
            sum(right) / len(right),
            sum(liked) / len(liked),
            one.wins and (one.wins.share, *one.wins.interval),
            one.kl,
            one.length,
            one.ended,
            of_text,
        )
        for one, proxy, right, liked, of_text in zip(
            standings(list(MODELS), drawn, scores[words.gold]),
            proxies,
            scores[words.right],
            scores[words.liked],
            bits,
        )
    ]
    return found, {name: own.texts for name, own in zip(MODELS, drawn)}


def _agreement(chain: Chain, judge: RewardModel, device: torch.device) -> dict[str, float]:
    """Shares of the validation pairs that are ordered as they should be by what is really better.

    gold_accuracy     by the reward model
    labeler_accuracy  by the labelers
    """
    rankings = read_rankings([chain.path("rankings.jsonl")])
    _, valid = split_by_prompt(rankings, RewardConfig.valid_fraction, lambda one: one.prompt)
    truth = []
    for one in valid:
        fields = {"answer": words.answer_to(one.prompt[-1].content), "ended": True}
        ranks = ranks_of([words.gold(answer, fields) for answer in one.answers])
        truth.append(one._replace(ranks=tuple(ranks)))
    rendered, _ = render_rankings(truth, judge.template, judge.model.trunk.config.context_length)
    by_model = [score_rows(judge.model, one.rows, device) for one in rendered]
    by_labelers = [
        -torch.tensor([own.ranks[one.places.index(row)] for row in range(len(one.rows))]).float()
        for own, one in zip(valid, rendered)
    ]
    return {
        name: preference_report(scores, rendered)["accuracy"]
        for name, scores in (("gold_accuracy", by_model), ("labeler_accuracy", by_labelers))
    }


def _manual_of(trained: TrainedModel) -> Tokens:
    """The validation part of the manual, in the tokens of the model."""
    data = DataConfig(corpus_size="python-manual", special_tokens=tuple(SPECIAL.split()))
    config = dataclasses.replace(trained.config, data=data)
    return prepare(config, trained.tokenizer, ProgressLine()).valid


def _bits_per_byte(trained: TrainedModel, text: Tokens) -> float:
    options = EvalOptions(trained.config.model.context_length, 16, 30_000)
    lengths = token_byte_lengths(trained.tokenizer.vocab)
    return evaluate(trained.model, text, lengths, options).bits_per_byte
