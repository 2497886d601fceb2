"""A film's frames from first to last, evenly spaced by perceptual distance (method, section 8), each as it is made.

Memory does not grow with the film: frames are sampled and decoded a batch at a time, and handed on as 8-bit pictures.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from PIL import Image
from torch import Tensor

from .config import SampleConfig, ScheduleConfig
from .errors import DiffMorpherError
from .method.perceptual import perceptual_distance
from .method.schedule import even_positions, gaps_of_rounds, insert_positions, most_even, uniform_positions
from .models.backbone import float32_products
from .path import MorphPath, to_bytes, to_picture
from .progress import ProgressCallback


class FrameStream:
    """The frames of a prepared path: `plan` says where they lie, iterating makes them in order.

    positions: of all frames, after `plan`. distances: from each frame to the next (n - 1 of them; in a loop n, the last
    back to the first), complete when the last frame has been made. distances_before: those of evenly spaced positions,
    where the schedule measured them. seconds: wall time of "schedule" and "sample".
    """

    def __init__(
        self,
        path: MorphPath,
        num_frames: int,
        sample: SampleConfig,
        schedule: ScheduleConfig,
        progress: ProgressCallback | None = None,
    ) -> None:
        self.path, self.num_frames, self.sample, self.schedule = path, num_frames, sample, schedule
        self.progress = progress
        self._to_make = num_frames  # and what the insertion makes to choose from
        self._sampled_in = {"schedule": 0, "sample": 0}  # frames, so far
        self.seconds = {"schedule": 0.0, "sample": 0.0}
        self.distances: list[float] = []
        self.distances_before: list[float] = []
        self.positions = uniform_positions(num_frames, path.num_images, path.loop)
        self._planned = not schedule.enabled or num_frames <= (1 if path.loop else 2)
        self._end = path.num_images if path.loop else path.num_images - 1
        self._made: dict[float, Tensor] = {}  # (3, H, W) uint8, of frames that the schedule looked at and that stay
        self._known: dict[tuple[float, float], float] = {}  # the distance between two positions
        self._maps: dict[float, list[Tensor]] = {}  # the perceptual features of the few frames that are being compared
        self._measure = perceptual_distance(str(path.backbone.device))

    def plan(self) -> list[float]:
        """Settle the positions, sampling what that takes; the frames made on the way that stay are not made again."""
        if not self._planned:
            self._planned = True
            if self.schedule.method == "two-pass":
                self.distances_before = self._walk(self.positions)
                self.positions = even_positions(
                    self.positions, self.distances_before, self.num_frames, self.path.num_images, self.path.loop
                )
            else:
                self._insert()
        return self.positions

    def __iter__(self) -> Iterator[Image.Image]:
        self.plan()
        for picture in self._pictures(self.positions, "sample", self.distances):
            yield to_picture(picture)

    # ---- two passes

    def _walk(self, positions: Sequence[float]) -> list[float]:
        """The distances along a film that is not kept."""
        distances: list[float] = []
        for _ in self._pictures(positions, "schedule", distances):
            pass
        return distances

    # ---- insertion

    def _insert(self) -> None:
        """Rounds of frames, each put where the widest gaps of those before it are; of some more than needed the best stay.

        What a gap measures once it is split shows only then: it is more than its share wherever the film jumps. Frames of
        a long film beyond `schedule.most` are placed without being looked at, and made as they are asked for.
        """
        gaps = self.num_frames if self.path.loop else self.num_frames - 1
        spare = min(self.schedule.spare, (gaps - self._end) // 7) if gaps <= self.schedule.most else 0
        settled = min(gaps, max(self.schedule.most, self._end)) + spare
        self._to_make = self.num_frames + spare
        first, *others = gaps_of_rounds(settled, self._end, self.schedule.rounds)
        positions = uniform_positions(first if self.path.loop else first + 1, self.path.num_images, self.path.loop)
        self._make(positions)
        for wanted in others:
            new = self._widest(positions, wanted)
            self._make(new)
            positions = sorted([*positions, *new])
        if spare:
            closed = self._closed(positions)
            stops = {i for i, position in enumerate(closed) if position == int(position)}
            kept = most_even(self._near(closed, spare + 1), gaps, stops)
            positions = [closed[i] for i in kept[: self.num_frames]]
            self._made = {position: self._made[position] for position in positions}
        self.positions = sorted([*positions, *self._widest(positions, gaps)])

    def _make(self, positions: Sequence[float]) -> None:
        self._made |= dict(zip(positions, self._sampled(positions, "sample"), strict=True))

    def _widest(self, positions: Sequence[float], gaps: int) -> list[float]:
        """Where to put new frames so that there are so many gaps."""
        closed = self._closed(positions)
        if gaps == len(closed) - 1:
            return []
        return insert_positions(closed, [d for d, *_ in self._near(closed)], gaps - len(closed) + 1)

    def _closed(self, positions: Sequence[float]) -> list[float]:
        return [*positions, float(self._end)] if self.path.loop else list(positions)

    def _near(self, closed: Sequence[float], reach: int = 1) -> list[list[float]]:
        """The distances from each position but the last to the `reach` after it, as far as there are so many."""
        with _timed(self.seconds, "schedule"):
            pictures = [self._made[p if p in self._made else 0.0] for p in closed]  # a loop ends on its first frame
            near: list[list[float]] = [[] for _ in closed[1:]]
            for j in range(1, len(closed)):
                for i in range(max(0, j - reach), j):
                    near[i].append(self._distance(closed[i], closed[j], pictures[i], pictures[j]))
                self._maps = {p: self._maps[p] for p in closed[max(0, j + 1 - reach) : j + 1] if p in self._maps}
            self._maps.clear()
            return near

    # ---- frames

    def _pictures(self, positions: Sequence[float], stage: str, distances: list[float]) -> Iterator[Tensor]:
        """The frames at `positions`, in order, (3, H, W) uint8; their distances are added as both ends are there."""
        size, start = self.path.batch_size(self.sample), 0
        first: Tensor | None = None
        last: tuple[float, Tensor] | None = None
        while start < len(positions):
            stop = start
            missing: list[float] = []
            while stop < len(positions) and len(missing) + (positions[stop] not in self._made) <= size:
                if positions[stop] not in self._made:
                    missing.append(positions[stop])
                stop += 1
            made = dict(zip(missing, self._sampled(missing, stage), strict=True))
            for position in positions[start:stop]:
                picture = made[position] if position in made else self._made[position]
                first = picture if first is None else first
                if last is not None:
                    distances.append(self._distance(last[0], position, last[1], picture))
                    self._maps.pop(last[0], None)
                last = position, picture
                yield picture
            start = stop
        if self.path.loop and first is not None and last is not None:
            distances.append(self._distance(last[0], float(self._end), last[1], first))

    def _sampled(self, positions: Sequence[float], stage: str) -> list[Tensor]:
        """New frames; progress counts the U-Net steps of all that are made in a stage."""
        steps, before = self.sample.steps, self._sampled_in[stage]

        def report(reported: str, at: int, of: int) -> None:
            if self.progress and reported == "invert":
                self.progress(reported, at, of)
            elif self.progress:
                done = before * steps + len(positions) * steps * at // of
                self.progress(stage, done, self._to_make * steps)

        if not positions:
            return []
        with _timed(self.seconds, stage):
            latents = self.path.sample_latents(positions, self.sample, report)
            pixels = self.path.decode(latents)
            if not bool(pixels.isfinite().all()):
                raise DiffMorpherError("the model gave no valid picture (NaN): lower the LoRA rate, or use float32.")
            self._sampled_in[stage] += len(positions)
            return list(to_bytes(pixels))

    def _distance(self, p: float, q: float, a: Tensor, b: Tensor) -> float:
        """Between the frames a, b at p, q: each looked at once while it is among the last few."""
        if (p, q) not in self._known:
            with torch.inference_mode(), float32_products(tf32=False):
                for position, picture in ((p, a), (q, b)):
                    if position not in self._maps:
                        pixels = picture[None].to(self._measure.shift.device).float() / 127.5 - 1
                        self._maps[position] = self._measure.features(pixels)
                self._known[p, q] = float(self._measure.compare(self._maps[p], self._maps[q])[0])
        return self._known[p, q]


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] += time.perf_counter() - started
