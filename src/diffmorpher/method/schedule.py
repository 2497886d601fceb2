"""Even perceptual speed: which positions the frames of a film take (method, section 8).

A way to space them is a function in `SCHEDULES`, from a `Film` in the making to a `Plan`. To add one, write it, put it there,
and name it in `config.ScheduleMethod`; below the ways stands the arithmetic they are made of.
A film passes through its key images: each stretch between two neighbours is a whole number of gaps. In a loop the last
stretch leads back to image 0, and the frame that would repeat it is left out, so that there are as many gaps as frames.
"""

from __future__ import annotations

import bisect
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


def plan(film: Film, config: ScheduleConfig, pace: Sequence[float] | None = None) -> Plan:
    """Where the film's frames lie, in the way that `config` names; uniformly where it names none or there is no choice.

    pace: how much of the way is to be covered in each gap, in proportion, in place of equal parts.
    """
    if pace is not None:
        return paced(film, config, pace)
    choice = config.enabled and film.num_frames > (1 if film.loop else 2)
    return SCHEDULES[config.method if choice else "uniform"](film, config)


# ---- ways to space frames


def uniform(film: Film, config: ScheduleConfig) -> Plan:
    """Evenly in alpha, or as eased; nothing is looked at."""
    return Plan(uniform_positions(film.num_frames, film.num_images, film.loop, config))


def two_pass(film: Film, config: ScheduleConfig) -> Plan:
    """The paper's: a whole film evenly in alpha first, and from its distances the positions of even speed."""
    positions = uniform_positions(film.num_frames, film.num_images, film.loop)
    distances = [d for d, *_ in film.distances(positions)]
    even = even_positions(positions, distances, film.num_frames, film.num_images, film.loop, config)
    return Plan(even, distances)


def paced(film: Film, config: ScheduleConfig, pace: Sequence[float]) -> Plan:
    """At a pace that is given: a film of half as many frames tells the distances, for frames cannot be inserted into a beat."""
    stretches, gaps = stretches_and_gaps(film.num_frames, film.num_images, film.loop)
    seen = max(stretches, -(-gaps // 2))
    positions = uniform_positions(seen if film.loop else seen + 1, film.num_images, film.loop, config)
    if config.enabled:
        distances = [d for d, *_ in film.distances(positions)]
    else:
        closed = [*positions, float(film.num_images)] if film.loop else positions
        distances = [q - p for p, q in pairwise(closed)]
    return Plan(paced_positions(positions, distances, pace, film.num_images, film.loop, config))


def insert(film: Film, config: ScheduleConfig) -> Plan:
    """Rounds of frames, each put where the widest gaps of those before it are; of some more than needed the best stay.

    What a gap measures once it is split shows only then: it is more than its share wherever the film jumps. Frames of
    a long film beyond `config.most` are placed without being looked at, and made as they are asked for.
    """
    if config.ease != "linear" or config.stretch:
        return _insert_bent(film, config)
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


def _insert_bent(film: Film, config: ScheduleConfig) -> Plan:
    """The same, gaps being measured in the time that they should take, and none made that does not stay.

    With `config.stretch` each way between pictures has its number of gaps from the start, and is a film of its own.
    """
    stretches, gaps = stretches_and_gaps(film.num_frames, film.num_images, film.loop)
    final = share_stretches(gaps, config.stretch) if config.stretch else [gaps]
    least = [1] * stretches if config.stretch else [stretches]
    settled = [
        min(of, share)
        for of, share in zip(final, share_gaps(min(gaps, max(config.most, stretches)), final), strict=True)
    ]
    rounds = [
        [max(low, -(-of * i // config.rounds)) for of, low in zip(settled, least, strict=True)]
        for i in range(1, config.rounds + 1)
    ]
    first = rounds[0] if config.stretch else share_gaps(rounds[0][0], [1.0] * stretches)
    positions = eased_positions(first, config, film.loop)
    film.make(positions)
    for wanted in rounds[1:]:
        new = _longest(film, positions, wanted, config)
        film.make(new)
        positions = sorted([*positions, *new])
    return Plan(sorted([*positions, *_longest(film, positions, final, config)]))


def _longest(film: Film, positions: Sequence[float], wanted: Sequence[int], config: ScheduleConfig) -> list[float]:
    """Where to put new frames, so that there are so many gaps in each part: each way between pictures, or the whole film."""
    closed = [*positions, float(film.num_images)] if film.loop else list(positions)
    ends = [0, *(i for i, p in enumerate(closed) if p == int(p) and p > 0)] if len(wanted) > 1 else [0, len(closed) - 1]
    missing = [num - (end - start) for num, (start, end) in zip(wanted, pairwise(ends), strict=True)]
    if not any(missing):
        return []
    clock = _Clock(closed, [d for d, *_ in film.distances(positions)], config.ease)
    new: list[float] = []
    for num, (start, end) in zip(missing, pairwise(ends), strict=True):
        times = clock.times[start : end + 1]
        new += map(clock.position, insert_positions(times, np.diff(times).tolist(), num))
    return new


class _Clock:
    """Times at which an eased film is at `positions`: cumulated distance, bent on every way between pictures."""

    def __init__(self, positions: Sequence[float], distances: Sequence[float], ease: str) -> None:
        self._ease, self._unease = EASES[ease]
        self._positions = positions
        total = sum(distances) or 1.0
        # Where nothing changes a gap still is one.
        length = [max(float(d), 1e-9 * total) for d in distances]
        self._heights = np.concatenate([[0.0], np.cumsum(length)])
        self._stops = [float(h) for h, p in zip(self._heights, positions, strict=True) if p == int(p)]
        self.times = [self._bent(float(h), self._unease) for h in self._heights]

    def position(self, time: float) -> float:
        return float(np.interp(self._bent(time, self._ease), self._heights, self._positions))

    def _bent(self, height: float, curve: Callable[[float], float]) -> float:
        """Both times and heights run from stop to stop."""
        k = min(max(bisect.bisect_right(self._stops, height) - 1, 0), len(self._stops) - 2)
        low, high = self._stops[k], self._stops[k + 1]
        return low + (high - low) * curve(min(1.0, (height - low) / (high - low)))


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

#: By their names in `config.Ease`: the share of the way that is covered at a share of its time, and the other way round.
EASES: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "linear": (lambda t: t, lambda s: s),
    "in": (lambda t: t * t, math.sqrt),
    "out": (lambda t: 1 - (1 - t) ** 2, lambda s: 1 - math.sqrt(1 - s)),
    "in-out": (
        lambda t: 2 * t * t if t < 0.5 else 1 - 2 * (1 - t) ** 2,
        lambda s: math.sqrt(s / 2) if s < 0.5 else 1 - math.sqrt((1 - s) / 2),
    ),
}


def even_alphas(alphas: Sequence[float], distances: Sequence[float], num: int, ease: str = "linear") -> list[float]:
    """`num` alphas at which the cumulated distance grows evenly, or as `ease` bends it.

    `distances[i]` lies between `alphas[i]` and `alphas[i + 1]`; cumulated and divided by the total they are a
    piecewise-linear curve over alpha, which is inverted at `num` uniform heights. The first and the last alpha stay put.
    Where nothing changes at all (total 0) the alphas are uniform.
    """
    return _alphas_at([EASES[ease][0](t) for t in np.linspace(0, 1, num).tolist()], alphas, distances)


def _alphas_at(heights: Sequence[float], alphas: Sequence[float], distances: Sequence[float]) -> list[float]:
    """Where the cumulated distance has these heights, shares of its total from 0 to 1."""
    cumulated = np.concatenate([[0.0], np.cumsum(np.asarray(distances, dtype=np.float64))])
    if cumulated[-1] <= 0:
        return [float(a) for a in np.interp(heights, [0, 1], [alphas[0], alphas[-1]])]
    new = np.interp(heights, cumulated / cumulated[-1], np.asarray(alphas, dtype=np.float64))
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


def share_stretches(gaps: int, stretch: Sequence[float]) -> list[int]:
    """The same for times that were asked for, the one gap that each has at least being part of its share."""
    return share_gaps(gaps, [max(0.0, gaps * each / sum(stretch) - 1) for each in stretch])


def uniform_positions(
    num_frames: int, num_images: int, loop: bool = False, config: ScheduleConfig | None = None
) -> list[float]:
    """Positions evenly spaced in alpha on each stretch, the stretches sharing the gaps as evenly as whole numbers allow.

    config: whose `ease` and `stretch` bend this. Raises `ConfigError` when the frames are too few to show every image.
    """
    config = config or ScheduleConfig()
    stretches, gaps = stretches_and_gaps(num_frames, num_images, loop)
    return eased_positions(share_stretches(gaps, config.stretch or [1.0] * stretches), config, loop)


def eased_positions(shares: Sequence[int], config: ScheduleConfig, loop: bool) -> list[float]:
    """Positions for so many gaps on each stretch, eased in alpha."""
    curve = EASES[config.ease][0]
    positions = [k + curve(i / share) for k, share in enumerate(shares) for i in range(share)]
    return positions if loop else [*positions, float(len(shares))]


def even_positions(
    positions: Sequence[float],
    distances: Sequence[float],
    num_frames: int,
    num_images: int,
    loop: bool = False,
    config: ScheduleConfig | None = None,
) -> list[float]:
    """Positions of even perceptual speed from the distances of a first pass.

    positions, distances: the first pass and the distance after each of its frames (n - 1 of them, in a loop n).
    Each stretch is rescheduled by `even_alphas` and gets gaps in proportion to its perceptual length, or to `config.stretch`.
    """
    config = config or ScheduleConfig()
    stretches, gaps = stretches_and_gaps(num_frames, num_images, loop)
    ways = _ways(positions, distances, stretches, loop)
    shares = share_stretches(gaps, config.stretch) if config.stretch else share_gaps(gaps, [sum(d) for _, d in ways])
    new: list[float] = []
    for (alphas, steps), share in zip(ways, shares, strict=True):
        new += even_alphas(alphas, steps, share + 1, config.ease)[:-1]
    return new if loop else [*new, float(stretches)]


def _ways(
    positions: Sequence[float], distances: Sequence[float], stretches: int, loop: bool
) -> list[tuple[list[float], list[float]]]:
    """The positions on each stretch, its ends included, and the distances between them."""
    closed = np.asarray([*positions, float(stretches)] if loop else positions, dtype=np.float64)
    members = [np.flatnonzero((closed >= k) & (closed <= k + 1)) for k in range(stretches)]
    return [(closed[m].tolist(), [float(d) for d in distances[m[0] : m[-1]]]) for m in members]


def paced_positions(
    positions: Sequence[float],
    distances: Sequence[float],
    pace: Sequence[float],
    num_images: int,
    loop: bool,
    config: ScheduleConfig,
) -> list[float]:
    """Positions between which the film covers the shares of the way that `pace` has for each gap.

    positions, distances: of a first pass, as in `even_positions`. Every image is a frame: the one that is nearest by the pace,
    or that `config.stretch` names.
    """
    stretches = num_images if loop else num_images - 1
    ways = _ways(positions, distances, stretches, loop)
    heights = np.concatenate([[0.0], np.cumsum(np.asarray(pace, dtype=np.float64))])
    if config.stretch:
        stops = np.cumsum([0, *share_stretches(len(pace), config.stretch)]).tolist()
    else:
        lengths = np.cumsum([sum(d) or 1e-9 for _, d in ways])
        stops = [0]
        for k, length in enumerate(lengths[:-1]):  # one gap at least for each stretch
            nearest = int(np.abs(heights - heights[-1] * length / lengths[-1]).argmin())
            stops.append(min(max(nearest, stops[-1] + 1), len(pace) - (stretches - 1 - k)))
        stops.append(len(pace))
    new: list[float] = []
    for (alphas, steps), (start, end) in zip(ways, pairwise(stops), strict=True):
        part = heights[start : end + 1] - heights[start]
        part = part / part[-1] if part[-1] > 0 else np.linspace(0, 1, end - start + 1)
        new += _alphas_at(part.tolist(), alphas, steps)[:-1]
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
