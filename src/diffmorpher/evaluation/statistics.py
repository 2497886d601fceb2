"""Intervals: bootstrap over pairs, differences of two runs, shares of votes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np


def bootstrap(values: Sequence[float], seed: int = 0, draws: int = 10_000) -> tuple[float, float, float]:
    """(mean, low, high): the mean and its 95 % percentile interval over resampled pairs. One value has no width."""
    data = np.asarray(values, dtype=np.float64)
    if len(data) == 0:
        raise ValueError("the mean of no values is not defined; give at least one")
    picks = np.random.default_rng(seed).integers(0, len(data), (draws, len(data)))
    low, high = np.percentile(data[picks].mean(axis=1), [2.5, 97.5])
    return float(data.mean()), float(low), float(high)


def paired_difference(a: Sequence[float], b: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """(mean of b - a, low, high) over the same pairs: pairs are resampled, not sides."""
    return bootstrap([y - x for x, y in zip(a, b, strict=True)], seed)


def binomial_interval(wins: int, votes: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927): unlike the normal one it stays in [0, 1], also for few votes."""
    if votes <= 0 or not 0 <= wins <= votes:
        raise ValueError(f"{wins} of {votes} votes is no share")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = wins / votes
    middle = (share + z * z / (2 * votes)) / (1 + z * z / votes)
    spread = z * math.sqrt(share * (1 - share) / votes + z * z / (4 * votes * votes)) / (1 + z * z / votes)
    return max(0.0, middle - spread), min(1.0, middle + spread)
