"""Even perceptual speed: which positions the frames of a film take (method, section 8).

A film passes through its key images: each stretch between two neighbours is a whole number of gaps. In a loop the last
stretch leads back to image 0, and the frame that would repeat it is left out, so that there are as many gaps as frames.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Sequence
from itertools import pairwise

import numpy as np

from ..config import stretches_and_gaps


def even_alphas(alphas: Sequence[float], distances: Sequence[float], num: int) -> list[float]:
    """`num` alphas at which the cumulated distance grows evenly.

    `distances[i]` lies between `alphas[i]` and `alphas[i + 1]`; cumulated and divided by the total they are a
    piecewise-linear curve over alpha, which is inverted at `num` uniform heights. The first and the last alpha stay put.
    Where nothing changes at all (total 0) the alphas are uniform.
    """
    cumulated = np.concatenate([[0.0], np.cumsum(np.asarray(distances, dtype=np.float64))])
    if cumulated[-1] <= 0:
        return [float(a) for a in np.linspace(alphas[0], alphas[-1], num)]
    new = np.interp(np.linspace(0, 1, num), cumulated / cumulated[-1], np.asarray(alphas, dtype=np.float64))
    new[0], new[-1] = alphas[0], alphas[-1]  # a flat stretch at either end must not move it
    return [float(a) for a in new]


def share_gaps(gaps: int, lengths: Sequence[float]) -> list[int]:
    """Share a film's gaps among its stretches in proportion to their lengths, at least one each (largest remainder)."""
    spare = gaps - len(lengths)
    total = float(sum(lengths))
    exact = [spare * (length / total if total > 0 else 1 / len(lengths)) for length in lengths]
    shares = [int(e) for e in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: spare - sum(shares)]:
        shares[i] += 1
    return [1 + s for s in shares]


def uniform_positions(num_frames: int, num_images: int, loop: bool = False) -> list[float]:
    """Positions evenly spaced in alpha on each stretch, the stretches sharing the gaps as evenly as whole numbers allow.

    Raises `ConfigError` when the frames are too few to show every image.
    """
    stretches, gaps = stretches_and_gaps(num_frames, num_images, loop)
    positions = [k + i / share for k, share in enumerate(share_gaps(gaps, [1.0] * stretches)) for i in range(share)]
    return positions if loop else [*positions, float(stretches)]


def even_positions(
    positions: Sequence[float], distances: Sequence[float], num_frames: int, num_images: int, loop: bool = False
) -> list[float]:
    """Positions of even perceptual speed from the distances of a first pass.

    positions, distances: the first pass and the distance after each of its frames (n - 1 of them, in a loop n).
    Each stretch is rescheduled by `even_alphas` and gets gaps in proportion to its perceptual length.
    """
    stretches, gaps = stretches_and_gaps(num_frames, num_images, loop)
    closed = np.asarray([*positions, float(stretches)] if loop else positions, dtype=np.float64)
    steps = np.asarray(distances, dtype=np.float64)
    members = [np.flatnonzero((closed >= k) & (closed <= k + 1)) for k in range(stretches)]
    shares = share_gaps(gaps, [float(steps[m[0] : m[-1]].sum()) for m in members])
    new: list[float] = []
    for m, share in zip(members, shares, strict=True):
        new += even_alphas(closed[m].tolist(), steps[m[0] : m[-1]].tolist(), share + 1)[:-1]
    return new if loop else [*new, float(stretches)]


def gaps_of_rounds(gaps: int, stretches: int, rounds: int) -> list[int]:
    """How many gaps there are after each round of insertion: growing evenly, each stretch having one at least."""
    return [*dict.fromkeys(max(stretches, -(-gaps * i // rounds)) for i in range(1, rounds + 1))]


def most_even(near: Sequence[Sequence[float]], num: int, stops: Collection[int] = ()) -> list[int]:
    """Which of n positions to keep so that the `num` gaps between them are most even: least in the sum of their squares.

    near[i][s]: the distance from position i to position i + 1 + s, for every s up to the n - 1 - num that are left out. The
    first and the last are kept, and those named in `stops`. Shortest paths, by dynamic programming.
    """
    last, spare = len(near), len(near) - num
    # best[j][k]: least sum on the way to position j with k left out, and the position before it.
    best: list[list[tuple[float, int]]] = [[(math.inf, -1)] * (spare + 1) for _ in range(last + 1)]
    best[0][0] = (0.0, -1)
    for j in range(1, last + 1):
        for i in range(j - 1, max(-1, j - 2 - spare), -1):
            for k in range(j - i - 1, spare + 1):
                best[j][k] = min(best[j][k], (best[i][k - (j - i - 1)][0] + near[i][j - i - 1] ** 2, i))
            if i in stops:
                break  # which no gap may step over
    kept, k = [last], spare
    while kept[-1]:
        before = best[kept[-1]][k][1]
        k -= kept[-1] - before - 1
        kept.append(before)
    return kept[::-1]


def insert_positions(positions: Sequence[float], distances: Sequence[float], num: int) -> list[float]:
    """`num` new positions, ascending, in the widest gaps: one after the other into the gap whose parts are longest.

    `distances[i]` lies between `positions[i]` and `positions[i + 1]`. A gap is split evenly.
    """
    parts = [1] * len(distances)
    widest = [(-float(d), i) for i, d in enumerate(distances)]
    heapq.heapify(widest)
    for _ in range(num):
        _, i = widest[0]
        parts[i] += 1
        heapq.heapreplace(widest, (-float(distances[i]) / parts[i], i))
    return [p + (q - p) * j / n for (p, q), n in zip(pairwise(positions), parts, strict=True) for j in range(1, n)]
