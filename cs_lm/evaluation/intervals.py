"""Intervals around accuracies and means."""

import math
from collections.abc import Sequence

import numpy as np

Z_95 = 1.959963984540054  # 97.5% of a standard normal distribution lie below


def wilson_interval(num_correct: int, num_examples: int, z: float = Z_95) -> tuple[float, float]:
    """Bounds of a share k of n, 95% by default. No examples give (0, 1).

        (p + z^2/2n +- z sqrt(p (1 - p) / n + z^2/4n^2)) / (1 + z^2/n)      with p = k/n

    Source: Wilson 1927; unlike p +- z sqrt(p (1 - p) / n) it stays within 0 and 1.
    """
    n = num_examples
    if n == 0:
        return 0.0, 1.0
    p = num_correct / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def bootstrap_interval(
    values: Sequence[float], seed: int = 0, num_resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Bounds of the mean: percentiles of the means of resampled values.

    Source: Efron 1979.
    """
    array = np.asarray(values, np.float64)
    generator = np.random.default_rng(seed)
    means = [
        array[generator.integers(0, len(array), len(array))].mean() for _ in range(num_resamples)
    ]
    tail = 50 * (1 - level)
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)
