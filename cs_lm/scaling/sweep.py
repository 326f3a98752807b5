"""A family of runs, from a small file: a grid of settings, random ones, or equal compute.

    [flags]                       # of every run, as run_clm.py takes them
    corpus_path = "book.txt"
    tokens = 2_000_000            # in place of max_steps and num_epochs

    [vary]                        # a run for each combination
    lr = [1e-3, 3e-3, 1e-2]
    shape = [{d_model = 64, num_heads = 2}, {d_model = 128, num_heads = 4}]

    [random]                      # so many of them, drawn; a setting may then also be a range:
    count = 20                    # lr = {low = 1e-4, high = 1e-2, log = true}
    seed = 0

    [isoflop]                     # each combination with each compute [FLOPs]: it sets the tokens
    budgets = [1e12, 3e12]
    tokens_per_parameter = [4, 250]  # other combinations are left out

A value of [vary] that is a table sets several flags at once.
"""

import itertools
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cs_lm.config.run import RunConfig
from cs_lm.errors import Problem, UserError
from cs_lm.models.stats import flops_per_token, num_parameters

Settings = dict[str, Any]
ConfigOf = Callable[[list[str]], RunConfig]
BUDGET = "budget"  # the column of the compute that a run of equal compute gets [FLOPs]
# names of columns in the table of results
RESERVED = ("run", "state", "parameters", "trained_tokens", "flops", "epochs", "loss", "best",
            "bits_per_byte", "seconds", BUDGET, "settings", "isoflop")  # fmt: skip
TOKENS = "tokens"  # the setting that stands for --max_steps and --num_epochs
MAX_RUNS = 10_000
MIN_STEPS = 20  # of a run of equal compute: with fewer, its loss says nothing
_LENGTHS = (TOKENS, "max_steps", "num_epochs")
_RATIOS = "tokens_per_parameter"
_EPOCHS = 1e6  # so many that --max_steps decides
_OWN_FLAGS = ("out_dir", "resume", "resume_step", "dry_run")
_PARTS = ("flags", "vary", "random", "isoflop")


class PlannedRun(NamedTuple):
    """A run of a sweep: its name, what sets it apart, and the words of its command."""

    name: str
    settings: Settings
    words: list[str]
    config: RunConfig


class Spec(NamedTuple):
    """What a sweep varies.

    budgets  compute [FLOPs]: each combination is trained with each of them
    ratios   the lowest and highest number of tokens per parameter of such a run
    """

    flags: Settings
    vary: dict[str, Any]
    count: int | None = None
    seed: int = 0
    budgets: tuple[float, ...] = ()
    ratios: tuple[float, float] = (0.0, math.inf)

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"flags": self.flags, "vary": self.vary}
        if self.count is not None:
            found["random"] = {"count": self.count, "seed": self.seed}
        if self.budgets:
            found["isoflop"] = {"budgets": list(self.budgets)}
            if self.ratios != (0.0, math.inf):
                found["isoflop"][_RATIOS] = list(self.ratios)
        return found


def read_spec(path: str | Path) -> Spec:
    """A spec from a TOML or JSON file. Raises: UserError naming what is wrong in it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text) if Path(path).suffix == ".json" else tomllib.loads(text)
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(Problem("--spec", f"{str(path)!r} cannot be read ({error})")) from None
    return spec_of(content)


def spec_of(content: Any) -> Spec:
    if not isinstance(content, dict):
        raise UserError(Problem("--spec", "is no table", "[flags], [vary], [random], [isoflop]"))
    wrong = [Problem("--spec", f"has an unknown part [{n}]") for n in content if n not in _PARTS]
    parts = {name: content.get(name, {}) for name in _PARTS}
    for name, table in parts.items():
        if not isinstance(table, dict):
            wrong.append(Problem("--spec", f"[{name}] is no table"))
    if wrong:
        raise UserError(*wrong)
    random, isoflop = parts["random"], parts["isoflop"]
    wrong += _unknown("random", random, ("count", "seed"))
    wrong += _unknown("isoflop", isoflop, ("budgets", _RATIOS))
    ratios = isoflop.get(_RATIOS, [0.0, math.inf])
    is_range = isinstance(ratios, list) and len(ratios) == 2
    if (
        not is_range
        or any(type(one) not in (int, float) for one in ratios)
        or not (0 <= ratios[0] < ratios[1])
    ):
        need = "the lowest and the highest number"
        wrong.append(Problem("--spec", f"[isoflop] {_RATIOS}: got {ratios!r}", need))
    count, seed, budgets = random.get("count"), random.get("seed", 0), isoflop.get("budgets", [])
    if random and not (type(count) is int and 1 <= count <= MAX_RUNS):
        wrong.append(Problem("--spec", f"[random] count: got {count!r}", f"1 to {MAX_RUNS}"))
    if type(seed) is not int or seed < 0:
        wrong.append(Problem("--spec", f"[random] seed: got {seed!r}", "0 or more"))
    is_list = isinstance(budgets, list) and bool(budgets)
    if isoflop and not (is_list and all(_is_number(one) and one > 0 for one in budgets)):
        need = "a list of numbers of FLOPs above 0"
        wrong.append(Problem("--spec", f"[isoflop] budgets: got {budgets!r}", need))
    for name, values in parts["vary"].items():
        wrong += _problems_of(name, values, is_random=bool(random))
    wrong += [problem for table in _tables(parts) for problem in _strange_values(table)]
    if wrong:
        raise UserError(*wrong)
    for name in _OWN_FLAGS:
        if any(name in each for each in _tables(parts)):
            wrong.append(Problem("--spec", f"{name}: the sweep sets it", fix="leave it out"))
    named = {name for each in _tables(parts) for name in each}
    of_length = [name for name in _LENGTHS if name in named]
    if of_length and isoflop:
        what = f"{of_length[0]}: with [isoflop], the compute sets it"
        wrong.append(Problem("--spec", what, fix="leave it out"))
    elif TOKENS in of_length and len(of_length) > 1:
        what = f"{TOKENS} and {of_length[1]} say the same"
        wrong.append(Problem("--spec", what, fix="leave one of them out"))
    if not parts["vary"] and not isoflop:
        wrong.append(Problem("--spec", "varies nothing", fix="name settings under [vary]"))
    if wrong:
        raise UserError(*wrong)
    return Spec(
        parts["flags"], parts["vary"], count, seed, tuple(map(float, budgets)), tuple(ratios)
    )


def _tables(parts: Mapping[str, Any]) -> Iterator[Settings]:
    yield parts["flags"]
    yield parts["vary"]
    for values in parts["vary"].values():
        if isinstance(values, list):
            yield from (one for one in values if isinstance(one, dict))


def _unknown(part: str, table: Settings, known: tuple[str, ...]) -> list[Problem]:
    needed = " or ".join(known)
    return [
        Problem("--spec", f"[{part}] {n}: unknown", needed, "settings stand under [vary]")
        for n in table
        if n not in known
    ]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def _problems_of(name: str, values: Any, is_random: bool) -> list[Problem]:
    where = f"[vary] {name}: got {str(values)[:80]}"
    if not re.fullmatch(r"[A-Za-z][\w-]*", name) or name in RESERVED:
        what = f"[vary] {name}: is no name of a setting or of a group of them"
        return [Problem("--spec", what, fix="use letters, digits and _; some words are taken")]
    if isinstance(values, dict):
        if not is_random:
            return [Problem("--spec", where, "a list; a range is for [random]")]
        low, high = values.get("low"), values.get("high")
        is_range = _is_number(low) and _is_number(high) and low < high
        if not is_range or set(values) - {"low", "high", "log"}:
            return [Problem("--spec", where, "low and high, and log = true for even ratios")]
        if type(values.get("log", False)) is not bool:
            return [Problem("--spec", where, "log = true or log = false")]
        if values.get("log", False) and low <= 0:
            return [Problem("--spec", where, "low above 0, because of log")]
        return []
    if not isinstance(values, list) or not values:
        return [Problem("--spec", where, "a list of values")]
    if len({repr(one) for one in values}) < len(values):
        return [Problem("--spec", where, "each value once")]
    return []


def _strange_values(table: Settings) -> Iterator[Problem]:
    """Values that no flag can have."""
    for name, value in table.items():
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, (str, bool, dict)) and not _is_number(one):
                what = f"{name}: got {str(one)[:80]}"
                yield Problem("--spec", what, "numbers, texts, true, false or tables")


# ---- the runs ----


def planned_runs(spec: Spec, config_of: ConfigOf) -> list[PlannedRun]:
    """The runs in their order, which with their names is always the same for a spec.

    config_of  the settings of a command line; raises UserError for wrong ones
    Raises: UserError with the problems of each run.
    """
    found, wrong = [], []
    for settings in _combinations(spec):
        try:
            for varied, flags in _with_compute(spec, settings, config_of):
                words = words_of(flags)
                name = f"{len(found):03d}-{_label(varied)}"
                found.append(PlannedRun(name, varied, words, config_of(words)))
        except UserError as error:
            whose = f"{_label(settings)}: " if settings else ""
            wrong += [f"{whose}{problem}" for problem in error.args]
    if wrong:
        raise UserError(*dict.fromkeys(wrong))
    if not found:
        what = f"no model makes {MIN_STEPS} updates with any of the budgets"
        raise UserError(Problem("--spec", what, fix="raise budgets, or lower --batch_size"))
    return found


def _combinations(spec: Spec) -> Iterator[Settings]:
    names = list(spec.vary)
    if spec.count is None:
        number = math.prod(map(len, spec.vary.values()))
        if number > MAX_RUNS:
            raise UserError(Problem("--spec", f"makes {number:,} runs", f"at most {MAX_RUNS:,}"))
        for values in itertools.product(*spec.vary.values()):
            yield dict(zip(names, values))
        return
    random = np.random.Generator(np.random.PCG64(spec.seed))
    for _ in range(spec.count):
        yield {name: _drawn(spec.vary[name], random) for name in names}


def _drawn(values: Any, random: np.random.Generator) -> Any:
    if isinstance(values, list):
        return values[int(random.integers(len(values)))]
    low, high = values["low"], values["high"]
    if values.get("log", False):
        number = math.exp(random.uniform(math.log(low), math.log(high)))
    else:
        number = random.uniform(low, high)
    are_whole = type(low) is int and type(high) is int
    return round(number) if are_whole else float(f"{number:.4g}")


def _with_compute(
    spec: Spec, settings: Settings, config_of: ConfigOf
) -> Iterator[tuple[Settings, Settings]]:
    """What is varied and all flags, for each budget that the model can use."""
    flags = {**spec.flags, **_flat(settings)}
    if not spec.budgets:
        yield settings, _with_steps(flags, config_of)
        return
    config = config_of(words_of(flags))
    for budget in spec.budgets:
        tokens = budget / flops_per_token(config.model, config.seq_length)
        steps = round(tokens / config.tokens_per_step)
        low, high = spec.ratios
        is_wanted = low <= tokens / num_parameters(config.model) <= high
        if steps >= MIN_STEPS and is_wanted:
            yield {BUDGET: budget, **settings}, _for_steps(flags, steps)


def _flat(settings: Settings) -> Settings:
    """The flags of settings, of which one may stand for several."""
    found: Settings = {}
    for name, value in settings.items():
        found |= value if isinstance(value, dict) else {name: value}
    return found


def _with_steps(flags: Settings, config_of: ConfigOf) -> Settings:
    if TOKENS not in flags:
        return flags
    tokens = flags[TOKENS]
    others = {name: value for name, value in flags.items() if name != TOKENS}
    if not _is_number(tokens) or tokens < 1:
        raise UserError(Problem(TOKENS, f"got {tokens!r}", "1 or more"))
    per_step = config_of(words_of(others)).tokens_per_step
    return _for_steps(others, max(1, round(tokens / per_step)))


def _for_steps(flags: Settings, steps: int) -> Settings:
    return {**flags, "max_steps": steps, "num_epochs": _EPOCHS}


def words_of(flags: Settings) -> list[str]:
    """The words of a command line."""
    words: list[str] = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            words += [f"--{name}", str(value)]
    return words


def _label(settings: Settings) -> str:
    shown = ",".join(f"{name}={shown_value(value)}" for name, value in settings.items())
    safe = "".join(c if c.isalnum() or c in "=,.-+" else "_" for c in shown)
    return safe[:80]


def shown_value(value: Any) -> str:
    """A value as a short text: of several flags in one, their values."""
    if isinstance(value, dict):
        return "x".join(shown_value(one) for one in value.values())
    return f"{value:g}" if type(value) is float else str(value)
