"""Whether scaling-law intervals hold, and whether predicted times are those of this machine.

    python -m benchmarks.scaling [--only coverage time] [--sets 100]

coverage  sets of 72 runs are made with the constants of a published law and noise of 0.5%; of how
          many sets do the intervals of 95% hold each constant, the best model for 1e24 FLOPs, and
          the loss of a run to come
time      an update of models of several widths on one thread of this machine, beside the prediction
          that --dry_run gives
"""

import argparse
import json
import math
import time

import numpy as np
import torch

from cs_lm.config.model import ModelConfig
from cs_lm.config.optim import OptimConfig
from cs_lm.config.run import RunConfig
from cs_lm.data.batches import Batch
from cs_lm.models.registry import build_model
from cs_lm.optim.param_groups import adamw_of
from cs_lm.scaling.fits import fit_isoflop, fit_parametric
from cs_lm.scaling.laws import CORRECTED, Parametric
from cs_lm.scaling.points import Point
from cs_lm.scaling.run_time import predicted_seconds
from cs_lm.training.step import train_step

NOISE, BUDGETS, SIZES, FAR = 0.005, 9, 8, 1e24
SHAPES = [(32, 2, 2), (64, 3, 4), (128, 4, 8), (256, 6, 8), (512, 6, 8)]  # width, layers, heads
ROWS, LENGTH, VOCAB = 16, 128, 512


def coverage(num_sets: int) -> dict[str, str]:
    names = (*Parametric._fields, "exponent", "best N", "its loss", "a run")
    held = dict.fromkeys((*names, "exponent, equal compute", "best N, equal compute"), 0)
    far = CORRECTED.optimum(FAR)
    for seed in range(num_sets):
        random = np.random.default_rng(seed)
        points = list(_runs(random))
        fit = fit_parametric(points, 100, seed)
        for name in Parametric._fields:
            own = fit.interval(lambda law, name=name: getattr(law, name))
            held[name] += own.holds(getattr(CORRECTED, name))
        held["exponent"] += fit.interval(lambda law: law.exponent).holds(CORRECTED.exponent)
        _, size, loss = fit.optimum(FAR)
        held["best N"] += size.holds(far.parameters)
        held["its loss"] += loss.holds(far.loss)
        measured = far.loss * math.exp(NOISE * random.standard_normal())
        held["a run"] += fit.loss(far.parameters, far.tokens, seed).holds(measured)
        isoflop = fit_isoflop(points, 100, seed)
        held["exponent, equal compute"] += isoflop.exponent.holds(CORRECTED.exponent)
        held["best N, equal compute"] += isoflop.size(FAR).holds(far.parameters)
    return {name: f"{count} of {num_sets}" for name, count in held.items()}


def _runs(random: np.random.Generator):
    for flops in np.geomspace(6e18, 3e21, BUDGETS):
        best = CORRECTED.optimum(flops).parameters
        for factor in np.geomspace(0.2, 5, SIZES):
            size = best * factor
            tokens = flops / 6 / size
            loss = CORRECTED.loss(size, tokens) * math.exp(NOISE * random.standard_normal())
            yield Point(size, tokens, flops, loss)


def times() -> list[dict[str, float]]:
    torch.set_num_threads(1)
    found = []
    for width, layers, heads in SHAPES:
        model_config = ModelConfig(
            d_model=width, num_heads=heads, d_ff=8 * round(width / 3), num_layers=layers,
            vocab_size=VOCAB, context_length=LENGTH,
        )  # fmt: skip
        config = RunConfig(model=model_config, seq_length=LENGTH, batch_size=ROWS, device="cpu")
        measured = _update_s(model_config)
        predicted = predicted_seconds(config, ROWS * LENGTH)
        found.append(
            {"width": width, "measured_ms": round(1000 * measured, 2),
             "predicted_ms": round(1000 * predicted, 2), "ratio": round(predicted / measured, 3)}
        )  # fmt: skip
    return found


def _update_s(config: ModelConfig) -> float:
    model = build_model(config)
    optimizer = adamw_of(model, OptimConfig())
    ids = torch.randint(VOCAB, (ROWS, LENGTH + 1))
    batch = Batch(ids[:, :-1], ids[:, 1:])
    best = math.inf
    for _ in range(12):
        begun_s = time.perf_counter()
        train_step(model, optimizer, [batch], 1.0)
        best = min(best, time.perf_counter() - begun_s)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=("coverage", "time"))
    parser.add_argument("--sets", type=int, default=100)
    given = parser.parse_args()
    kinds = given.only or ("coverage", "time")
    if "time" in kinds:
        print(json.dumps({"time": times()}, indent=1))
    if "coverage" in kinds:
        print(json.dumps({"coverage": coverage(given.sets)}, indent=1))


if __name__ == "__main__":
    main()
