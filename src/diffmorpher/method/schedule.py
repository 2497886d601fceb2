"""Even perceptual speed: which positions the frames of a film take (method, section 8).

A way to space them is a function in `SCHEDULES`, from a `Film` in the making to a `Plan`. To add one, write it, put it there,
and name it in `config.ScheduleMethod`; below the ways stands the arithmetic they are made of.
A film passes through its key images: each stretch between two neighbours is a whole number of gaps. In a loop the last
stretch leads back to image 0, and the frame that would repeat it is left out, so that there are as many gaps as frames.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import numpy as np

from ..config import ScheduleConfig, stretches_and_gaps


class Film(Protocol):
    """What a way to space frames may ask of the film it spaces."""

    num_frames: int
    num_images: int
    loop: bool

    def make(self, positions: Sequence[float], spare: int = 0) -> None:
        """Sample frames that the film will hold, all but `spare` of those made in the end; they are not sampled again."""

    def distances(self, positions: Sequence[float], reach: int = 1) -> list[list[float]]:
        """Perceptual distances from the frame at each of the ascending `positions` to the `reach` after it, the next one first.

        Fewer where the film ends before; in a loop the first frame follows the last, otherwise the last has no entry. Frames
        not made yet are sampled for this and not kept.
        """


@dataclass(frozen=True)
class Plan:
    """positions: of the frames, ascending. distances_before: along evenly spaced positions, where those were measured."""

    positions: list[float]
    distances_before: list[float] = field(default_factory=list)


def plan(film: Film, config: ScheduleConfig) -> Plan:
    """Where the film's frames lie, in the way that `config` names; uniformly where it names none or there is no choice."""
    choice = config.enabled and film.num_frames > (1 if film.loop else 2)
    return SCHEDULES[config.method if choice else "uniform"](film, config)


# ---- ways to space frames


def uniform(film: Film, config: ScheduleConfig) -> Plan:
    """Evenly in alpha; nothing is looked at."""
    return Plan(uniform_positions(film.num_frames, film.num_images, film.loop))


def two_pass(film: Film, config: ScheduleConfig) -> Plan:
    """The paper's: a whole film evenly in alpha first, and from its distances the positions of even speed."""
    positions = uniform_positions(film.num_frames, film.num_images, film.loop)
    distances = [d for d, *_ in film.distances(positions)]
    return Plan(even_positions(positions, distances, film.num_frames, film.num_images, film.loop), distances)


def insert(film: Film, config: ScheduleConfig) -> Plan:
    """Rounds of frames, each put where the widest gaps of those before it are; of some more than needed the best stay.

    What a gap measures once it is split shows only then: it is more than its share wherever the film jumps. Frames of
    a long film beyond `config.most` are placed without being looked at, and made as they are asked for.
    """
    stretches, gaps = stretches_and_gaps(film.num_frames, film.num_images, film.loop)
    spare = min(config.spare, (gaps - stretches) // 7) if gaps <= config.most else 0
    settled = min(gaps, max(config.most, stretches)) + spare
    first, *others = gaps_of_rounds(settled, stretches, config.rounds)
    positions = uniform_positions(first if film.loop else first + 1, film.num_images, film.loop)
    film.make(positions, spare)
    for wanted in others:
        new = _widest(film, positions, wanted)
        film.make(new, spare)
        positions = sorted([*positions, *new])
    if spare:
        stops = {i for i, position in enumerate(positions) if position == int(position)}
        kept = most_even(film.distances(positions, spare + 1), gaps, stops)
        positions = [positions[i] for i in kept[: film.num_frames]]
    return Plan(sorted([*positions, *_widest(film, positions, gaps)]))


def _widest(film: Film, positions: Sequence[float], gaps: int) -> list[float]:
    """Where to put new frames so that there are so many gaps."""
    closed = [*positions, float(film.num_images)] if film.loop else positions
    missing = gaps - len(closed) + 1
    return insert_positions(closed, [d for d, *_ in film.distances(positions)], missing) if missing else []


#: Every way by its name in `ScheduleConfig.method`; "uniform" is what `enabled=False` means.
SCHEDULES: dict[str, Callable[[Film, ScheduleConfig], Plan]] = {
    "uniform": uniform,
    "two-pass": two_pass,
    "insert": insert,
}


# ---- the arithmetic


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
