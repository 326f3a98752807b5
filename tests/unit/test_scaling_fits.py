"""Fits of scaling laws find the constants that the runs were made with."""

import csv
import json
import math

import numpy as np
import pytest

from cs_lm.cli.train import config_of
from cs_lm.errors import UserError
from cs_lm.scaling.laws import CORRECTED, Parametric
from cs_lm.scaling.points import Point, read_points
from cs_lm.scaling.sweep import planned_runs, read_spec
from tests.end_to_end.conftest import ROOT

pytest.importorskip("scipy", reason="scipy is not installed")
from cs_lm.scaling.fits import (
    best_of_each,
    budgets_of,
    fit_isoflop,
    fit_parametric,
)

DOCS = ROOT / "docs" / "scaling"
# of the runs in docs/scaling.md that were predicted: N, tokens, predicted and measured loss
PROOFS = [(1184896, 21098496, 1.3428, 1.3276), (3507920, 14254080, 1.3254, 1.3001)]


def runs(law, noise=0.0, seed=0, sizes=8):
    """Runs of equal compute around the optimum of a law, with noise of the log losses."""
    random = np.random.default_rng(seed)
    found = []
    for flops in np.geomspace(6e18, 3e21, 9):
        best = law.optimum(flops).parameters
        for factor in np.geomspace(0.2, 5, sizes):
            size, tokens = best * factor, flops / 6 / best / factor
            loss = law.loss(size, tokens) * math.exp(noise * random.standard_normal())
            found.append(Point(size, tokens, flops, loss))
    return found


def test_runs_without_noise_give_their_law():
    fit = fit_parametric(runs(CORRECTED), 20)
    assert tuple(fit.law) == pytest.approx(tuple(CORRECTED), rel=1e-4)
    assert abs(fit.residuals).max() < 1e-7
    isoflop = fit_isoflop(runs(CORRECTED), 20)
    assert isoflop.exponent.value == pytest.approx(CORRECTED.exponent, abs=0.005)
    assert all(one.is_inside for one in isoflop.minima)


@pytest.mark.slow
def test_intervals_hold_what_the_runs_were_made_with():
    """8 of 8 here; benchmarks/scaling.py counts 100."""
    held, held_size = 0, 0
    for seed in range(8):
        points = runs(CORRECTED, 0.005, seed)
        fit = fit_parametric(points, 60, seed)
        own = [(fit.interval(lambda law, n=n: getattr(law, n)), getattr(CORRECTED, n))
               for n in Parametric._fields]  # fmt: skip
        held += all(interval.holds(value) for interval, value in own)
        best = CORRECTED.optimum(1e24)
        _, size, loss = fit.optimum(1e24)
        held_size += size.holds(best.parameters) and loss.holds(best.loss)
        assert size.low < size.value < size.high and size.high < 3 * size.low
    assert held >= 7 and held_size >= 7


def test_a_seed_gives_the_same_intervals():
    points = runs(CORRECTED, 0.005)
    one, same = (fit_parametric(points, 30, 1).loss(1e9, 2e10, 3) for _ in range(2))
    assert one == same and one != fit_parametric(points, 30, 2).loss(1e9, 2e10, 3)


def test_the_fit_does_not_follow_a_few_outliers():
    points = runs(CORRECTED, 1e-4)
    points[5] = points[5]._replace(loss=points[5].loss * 1.3)
    points[40] = points[40]._replace(loss=points[40].loss * 0.8)
    fit = fit_parametric(points, 20)
    assert fit.law.exponent == pytest.approx(CORRECTED.exponent, abs=0.01)
    assert fit.law.loss(7e10, 1.4e12) == pytest.approx(CORRECTED.loss(7e10, 1.4e12), rel=2e-3)


def test_the_curves_of_the_course(corpora):
    """72 runs, 9 budgets. They were made without noise, with constants that the fit finds."""
    points = read_points(corpora / "scaling" / "isoflops_curves.json")
    assert len(points) == 72 and len(budgets_of(points)) == 9
    fit = fit_parametric(points, 20)
    assert tuple(fit.law) == pytest.approx((2.69, 1606.4, 3210.7, 0.34, 0.36), rel=1e-6)
    isoflop = fit_isoflop(points, 50)
    assert isoflop.exponent.holds(fit.law.exponent)
    for flops, size in ((1e23, 91.9e9), (1e24, 300.3e9)):
        assert fit.law.optimum(flops).parameters == pytest.approx(size, rel=1e-3)
        assert isoflop.size(flops).value == pytest.approx(size, rel=0.02)


def test_a_minimum_outside_of_its_runs_is_not_used():
    best = CORRECTED.optimum(6e18).parameters
    points = [p for p in runs(CORRECTED) if p.flops > 1e19 or p.size > 1.1 * best]
    fit = fit_isoflop(points, 10)
    outside = [one for one in fit.minima if not one.is_inside]
    assert len(outside) == 1 and len(fit.minima) == 9
    assert fit.exponent.value == pytest.approx(CORRECTED.exponent, abs=0.005)


@pytest.mark.parametrize(
    ("content", "words"),
    [("[", "cannot be read"), ('{"a": 1}', "cannot be read"), ('[{"parameters": 5}]', "cannot be"),
     (json.dumps([{"parameters": 5, "tokens": 3, "loss": -1}]), "row 1 is"),
     (json.dumps([{"parameters": 0, "flops": 3, "loss": 1}]), "cannot be read .ZeroDivision"),
     ("[" * 100_000, "cannot be read .RecursionError"), ("[]", "has no run that has ended"),
     (json.dumps([{"parameters": 5, "tokens": 3, "loss": 1}] * 9), "got 9 runs, need 8 or more")],
)  # fmt: skip
def test_runs_that_cannot_be_fitted(tmp_path, content, words):
    (tmp_path / "x.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        fit_parametric(read_points(tmp_path / "x.json"), 20)


@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 12))]
)
def test_few_noisy_runs_give_finite_numbers_or_a_line(seed):
    """Also losses that rise with compute, or fall as one over it."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(int(random.integers(8, 14))):
        size, tokens = (float(np.exp(random.uniform(10, 16))) for _ in range(2))
        loss = {0: CORRECTED.loss(size, tokens), 1: 1e9 / size, 2: tokens**0.1}[seed % 3]
        noise = math.exp(0.05 * random.standard_normal())
        found.append(Point(size, tokens, 6 * size * tokens, loss * noise))
    fit = fit_parametric(found, 20, seed)
    for interval in (fit.loss(1e8, 1e9), *fit.optimum(1e20)[1:], fit.interval(lambda law: law.E)):
        assert 0 < interval.low <= interval.value <= interval.high < math.inf
    try:
        isoflop = fit_isoflop(found, 20, seed)
    except UserError:
        return
    assert math.isfinite(isoflop.loss(1e20).value)


def test_minima_that_are_all_outside_are_refused():
    points = [p for p in runs(CORRECTED) if p.size > 1.1 * CORRECTED.optimum(p.flops).parameters]
    with pytest.raises(UserError, match="0 of 9 budgets have their minimum among their runs"):
        fit_isoflop(points, 20)


def test_losses_of_equal_compute_follow_their_law():
    fit = fit_isoflop(runs(CORRECTED), 20)
    for flops in (1e20, 1e23):
        assert fit.loss(flops).value == pytest.approx(CORRECTED.optimum(flops).loss, rel=3e-3)


def test_of_equal_runs_the_best_counts():
    one = Point(1.0, 2.0, 12.0, 3.0)
    assert best_of_each([one, one._replace(loss=2.0), one._replace(loss=4.0)]) == [
        one._replace(loss=2.0)
    ]


def test_a_run_to_come_is_less_certain_than_the_law():
    fit = fit_parametric(runs(CORRECTED, 0.01), 60)
    law, run = fit.optimum(1e21)[2], fit.loss(*CORRECTED.optimum(1e21)[:2])
    assert run.high - run.low > 1.5 * (law.high - law.low)


def test_size_by_flops(tmp_path):
    row = {"parameters": 100, "tokens": 10, "flops": 12000.0, "loss": 2.0}
    (tmp_path / "x.json").write_text(json.dumps([row]), encoding="utf-8")
    assert read_points(tmp_path / "x.json") == [Point(100, 10, 12000, 2)]
    assert read_points(tmp_path / "x.json", "flops") == [Point(200, 10, 12000, 2)]


def test_the_experiment_of_the_docs(tmp_path, monkeypatch):
    """Its file makes the runs of its table, and the table gives the predictions that were made."""
    monkeypatch.chdir(tmp_path)
    for name in ("books-train.txt", "books-valid.txt"):
        (tmp_path / name).write_text("a text " * 100, encoding="utf-8")
    runs = planned_runs(read_spec(DOCS / "isoflop.toml"), config_of)
    with open(DOCS / "runs.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [run.name for run in runs] == [row["run"] for row in rows]
    for run, row in zip(runs, rows):
        assert run.config.max_steps * run.config.tokens_per_step == int(row["trained_tokens"])
    fit = fit_parametric(read_points(DOCS / "runs.csv", "flops"), 200)
    assert fit.law.exponent == pytest.approx(0.574, abs=1e-3)
    for size, tokens, expected, measured in PROOFS:
        predicted = fit.loss(size, tokens)
        assert predicted.value == pytest.approx(expected, abs=1e-4)
        assert predicted.holds(measured)
