"""Fits scaling laws to trained models: minima of equal compute, and L = E + A / N^a + B / D^b.

scipy, an extra, does the optimisation. Intervals are of 95%, from a bootstrap whose random numbers
come from a seed.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cs_lm.errors import UserError, missing_package
from cs_lm.scaling.laws import Optimum, Parametric
from cs_lm.scaling.points import Point

DELTA = 1e-3  # where Huber's loss of log losses becomes linear: Hoffmann et al. 2022, section D.2
_LEVEL = 0.95
_STARTS = [
    (a, b, e) for a in (0.15, 0.35, 0.7) for b in (0.15, 0.35, 0.7) for e in (0.3, 0.7, 0.95)
]
_TINY, _FAR = 1e-300, 690.0  # a small number, and the log of a large one
_SAME_BUDGET = 0.05  # relative difference of compute within which runs are of one budget


class Interval(NamedTuple):
    """An estimate, and the ends of its interval."""

    value: float
    low: float
    high: float

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


def interval_of(value: float, samples: Sequence[float], widen: float = 1.0) -> Interval:
    """From the percentiles of bootstrap samples, which are above 0.

    widen  multiplies the distances of the logs of both ends
    """
    tail = 100 * (1 - _LEVEL) / 2
    low, high = map(float, np.percentile(samples, (tail, 100 - tail)))
    middle = math.log(value)
    low, high = (middle + widen * (math.log(max(end, _TINY)) - middle) for end in (low, high))
    low, high = max(min(low, middle), -_FAR), min(max(high, middle), _FAR)
    return Interval(value, min(value, math.exp(low)), max(value, math.exp(high)))


def _widening(num_points: int, num_constants: int) -> float:
    """Residuals of a fit are smaller than the noise, and quantiles of few points are wider."""
    from scipy import stats

    free = num_points - num_constants
    quantile = stats.t.ppf((1 + _LEVEL) / 2, free) / stats.norm.ppf((1 + _LEVEL) / 2)
    return float(quantile) * math.sqrt(num_points / free)


def _optimizers():
    try:
        from scipy import optimize
    except ImportError:
        raise UserError(missing_package("scaling-law", "scipy", "scaling")) from None
    return optimize


# ---- the parametric law ----


class ParametricFit(NamedTuple):
    """The best constants, those of each bootstrap sample, and the residuals of log losses."""

    law: Parametric
    samples: list[Parametric]
    residuals: np.ndarray

    def interval(self, of: Callable[[Parametric], float]) -> Interval:
        """Of a number that follows from the law, for example `lambda law: law.alpha`."""
        return self._interval(of(self.law), [of(one) for one in self.samples])

    def loss(self, size: float, tokens: float, seed: int = 0) -> Interval:
        """Of a run to come: with the noise that a single run has."""
        random = np.random.Generator(np.random.PCG64(seed))
        noise = random.choice(self.residuals, len(self.samples))
        losses = [one.loss(size, tokens) * math.exp(n) for one, n in zip(self.samples, noise)]
        return self._interval(self.law.loss(size, tokens), losses)

    def _interval(self, value: float, samples: Sequence[float]) -> Interval:
        return interval_of(value, samples, _widening(len(self.residuals), len(self.law)))

    def optimum(self, flops: float) -> tuple[Optimum, Interval, Interval]:
        """Of this compute, with the intervals of size and loss."""
        size = self.interval(lambda law: law.optimum(flops).parameters)
        return self.law.optimum(flops), size, self.interval(lambda law: law.optimum(flops).loss)


def fit_parametric(points: Sequence[Point], num_samples: int = 200, seed: int = 0) -> ParametricFit:
    """Minimises Huber's loss of log L from many starts; the bootstrap draws runs anew.

    Exponents are between 0.001 and 3, and E is at most the lowest loss.
    Raises: UserError for fewer than 8 runs, or runs of one size or one number of tokens.
    """
    columns = np.array(points, dtype=np.float64).reshape(-1, 4)
    log_n, log_d, log_loss = np.log(columns[:, 0]), np.log(columns[:, 1]), np.log(columns[:, 3])
    if len(columns) < 8 or np.ptp(log_n) < 0.1 or np.ptp(log_d) < 0.1:
        need = "8 or more runs, of several sizes and several numbers of tokens"
        raise UserError(f"scaling-law: got {len(columns)} runs, need {need}")
    best, theta = math.inf, None
    for start in _starts(log_n, log_d, log_loss):
        found = _minimised(start, log_n, log_d, log_loss)
        if found.cost < best:
            best, theta = found.cost, found.x
    random = np.random.Generator(np.random.PCG64(seed))
    samples = []
    for _ in range(num_samples):
        rows = random.integers(len(columns), size=len(columns))
        found = _minimised(theta, log_n[rows], log_d[rows], log_loss[rows])
        samples.append(_law(found.x))
    return ParametricFit(_law(theta), samples, log_loss - _predicted(theta, log_n, log_d))


def _starts(log_n: np.ndarray, log_d: np.ndarray, log_loss: np.ndarray) -> list[np.ndarray]:
    """Exponents and E on a grid; A and B share what is left of the mean loss."""
    lowest, mean = math.exp(log_loss.min()), math.exp(log_loss.mean())
    found = []
    for alpha, beta, share in _STARTS:
        half = math.log(max(1e-6, mean - share * lowest) / 2)
        a, b = half + alpha * log_n.mean(), half + beta * log_d.mean()
        found.append(np.array([a, b, math.log(share * lowest), alpha, beta]))
    return found


def _law(theta: np.ndarray) -> Parametric:
    a, b, e, alpha, beta = map(float, theta)
    return Parametric(math.exp(e), math.exp(a), math.exp(b), alpha, beta)


def _terms(theta: np.ndarray, log_n: np.ndarray, log_d: np.ndarray) -> np.ndarray:
    a, b, e, alpha, beta = theta
    return np.stack([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)])


def _predicted(theta: np.ndarray, log_n: np.ndarray, log_d: np.ndarray) -> np.ndarray:
    """log L, as the log of a sum of exponentials."""
    return np.logaddexp.reduce(_terms(theta, log_n, log_d))


def _minimised(
    start: np.ndarray, log_n: np.ndarray, log_d: np.ndarray, log_loss: np.ndarray
) -> Any:
    def residuals(theta: np.ndarray) -> np.ndarray:
        return _predicted(theta, log_n, log_d) - log_loss

    def slopes(theta: np.ndarray) -> np.ndarray:
        terms = _terms(theta, log_n, log_d)
        a, b, e = np.exp(terms - np.logaddexp.reduce(terms))
        return np.stack([a, b, e, -log_n * a, -log_d * b], axis=1)

    # E is at least a millionth of the lowest loss: its interval is one of ratios
    highest = float(log_loss.min())
    low = np.array([-50.0, -50.0, highest - 14, 1e-3, 1e-3])
    high = np.array([200.0, 200.0, highest, 3.0, 3.0])
    inside = np.clip(start, low + 1e-6, high - 1e-6)
    return _optimizers().least_squares(
        residuals, inside, slopes, (low, high), x_scale="jac", loss="huber", f_scale=DELTA,
        max_nfev=400,
    )  # fmt: skip


# ---- minima of equal compute ----


class Minimum(NamedTuple):
    """Of the runs of one budget [FLOPs]: best size and its loss.

    is_inside  whether there are runs on both sides; outside of them, the minimum is a guess
    """

    flops: float
    size: float
    loss: float
    is_inside: bool


class IsoflopFit(NamedTuple):
    """Parabolas of the loss over log size, one for each budget, and a line through their minima.

    parabolas  by budget: the three numbers of np.polyval, over log size
    log_size   intercept at 1 FLOP and slope of log size over log compute; samples  of the bootstrap
    loss_law   loss = E + k C^-g at the minima: (E, k, g); loss_samples  of the bootstrap
    """

    minima: list[Minimum]
    parabolas: dict[float, np.ndarray]
    log_size: tuple[float, float]
    samples: list[tuple[float, float]]
    loss_law: tuple[float, float, float]
    loss_samples: list[tuple[float, float, float]]

    @property
    def exponent(self) -> Interval:
        """a of N ~ C^a."""
        return interval_of(self.log_size[1], [slope for _, slope in self.samples])

    def size(self, flops: float) -> Interval:
        return interval_of(
            _on_line(self.log_size, flops), [_on_line(one, flops) for one in self.samples]
        )

    def loss(self, flops: float) -> Interval:
        return interval_of(
            loss_at(self.loss_law, flops), [loss_at(one, flops) for one in self.loss_samples]
        )


def loss_at(law: tuple[float, float, float], flops: float) -> float:
    floor, factor, power = law
    return floor + factor * flops**-power


def _on_line(line: tuple[float, float], flops: float) -> float:
    return math.exp(line[0] + line[1] * math.log(flops))


def best_of_each(points: Sequence[Point]) -> list[Point]:
    """Of runs with equal size and tokens, the one with the lowest loss: the best settings."""
    found: dict[tuple[float, float], Point] = {}
    for point in points:
        key = point.size, point.tokens
        if key not in found or point.loss < found[key].loss:
            found[key] = point
    return list(found.values())


def budgets_of(points: Sequence[Point]) -> dict[float, list[Point]]:
    """The runs by their compute; budgets that differ by rounding are one."""
    found: dict[float, list[Point]] = {}
    for point in sorted(points, key=lambda one: one.flops):
        last = next(reversed(found), None)
        if last is None or point.flops > last * (1 + _SAME_BUDGET):
            found[point.flops] = [point]
        else:
            found[last].append(point)
    return found


def fit_isoflop(points: Sequence[Point], num_samples: int = 200, seed: int = 0) -> IsoflopFit:
    """Needs 2 budgets or more with 4 sizes or more each; other budgets are left out.

    The bootstrap adds residuals, drawn anew, to each parabola.
    Source: Hoffmann et al. 2022, section 3.2. Raises: UserError for too few runs.
    """
    budgets = budgets_of(points)
    usable = {flops: own for flops, own in budgets.items() if len({p.size for p in own}) >= 4}
    parabolas = {flops: _parabola(own) for flops, own in usable.items()}
    curved = {flops: one for flops, one in parabolas.items() if one[0] > 0}
    if len(curved) < 2:
        need = "2 budgets or more with 4 sizes or more each, around a minimum"
        raise UserError(f"scaling-law: got {len(curved)} of them, need {need}")
    minima = [_minimum(flops, curved[flops], usable[flops]) for flops in curved]
    inside = [one for one in minima if one.is_inside]
    if len(inside) < 2:
        raise UserError(
            f"scaling-law: {len(inside)} of {len(minima)} budgets have their minimum among their "
            "runs, need 2 or more; train smaller or larger models with the same compute"
        )
    random = np.random.Generator(np.random.PCG64(seed))
    samples, loss_samples = [], []
    for _ in range(num_samples):
        drawn = [_drawn(one, usable[one.flops], curved[one.flops], random) for one in inside]
        drawn = [one for one in drawn if one is not None]
        if len(drawn) >= 2:
            samples.append(_line(drawn))
            loss_samples.append(_loss_law(drawn))
    if len(samples) < num_samples / 2:
        raise UserError("scaling-law: the minima are not certain; train more runs around them")
    return IsoflopFit(minima, curved, _line(inside), samples, _loss_law(inside), loss_samples)


def _parabola(points: Sequence[Point]) -> np.ndarray:
    return np.polyfit([math.log(one.size) for one in points], [one.loss for one in points], 2)


def _minimum(flops: float, parabola: np.ndarray, points: Sequence[Point]) -> Minimum:
    log_size = -parabola[1] / (2 * parabola[0])
    sizes = [one.size for one in points]
    is_inside = bool(math.log(min(sizes)) < log_size < math.log(max(sizes)))
    # far outside, the exponential would overflow
    at = min(max(log_size, math.log(min(sizes)) - 7), math.log(max(sizes)) + 7)
    return Minimum(flops, math.exp(at), float(np.polyval(parabola, at)), is_inside)


def _drawn(
    minimum: Minimum, points: Sequence[Point], parabola: np.ndarray, random: np.random.Generator
) -> Minimum | None:
    fitted = np.polyval(parabola, [math.log(one.size) for one in points])
    residuals = np.array([one.loss for one in points]) - fitted
    # the parabola has taken 3 of the residuals' degrees of freedom
    scale = math.sqrt(len(points) / max(1, len(points) - 3))
    noise = random.choice(residuals, len(points)) * scale
    again = [one._replace(loss=value) for one, value in zip(points, fitted + noise)]
    own = _parabola(again)
    return _minimum(minimum.flops, own, points) if own[0] > 0 else None


def _line(minima: Sequence[Minimum]) -> tuple[float, float]:
    slope, intercept = np.polyfit(
        [math.log(one.flops) for one in minima], [math.log(one.size) for one in minima], 1
    )
    return float(intercept), float(slope)


def _loss_law(minima: Sequence[Minimum]) -> tuple[float, float, float]:
    """loss = E + k C^-g through the minima; with fewer than 4 of them, E is 0."""
    log_c = np.log([one.flops for one in minima])
    losses = np.array([one.loss for one in minima])
    middle = log_c.mean()
    slope, height = np.polyfit(log_c - middle, np.log(losses), 1)
    if len(minima) < 4:
        return 0.0, float(math.exp(height - slope * middle)), float(-slope)

    def residuals(theta: np.ndarray) -> np.ndarray:
        floor, log_k, power = theta
        return floor + np.exp(log_k - power * (log_c - middle)) - losses

    start = [
        0.5 * losses.min(),
        math.log(losses.mean() - 0.5 * losses.min()),
        min(max(-2 * slope, 0.01), 1.9),
    ]
    bounds = ([0.0, -np.inf, 1e-4], [losses.min(), np.inf, 2.0])
    floor, log_k, power = _optimizers().least_squares(residuals, start, bounds=bounds).x
    return float(floor), float(math.exp(log_k + power * middle)), float(power)
