"""A film's frames from first to last, evenly spaced by perceptual distance (method, section 8), each as it is made.

Memory does not grow with the film: frames are sampled and decoded a batch at a time, and handed on as 8-bit pictures.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from .config import SampleConfig, ScheduleConfig
from .method import schedule as spacing
from .method.ghost import ghost, middle_third, some_of
from .method.matte import matte
from .method.perceptual import perceptual_distance
from .models.turns import settled
from .path import MorphPath, to_bytes, to_picture
from .progress import ProgressCallback

#: Frames whose ghost is taken on each way between pictures; they are in memory together.
_GHOSTS = 12


class Helpers(Protocol):
    """Others who make a film's frames, with the same model and on the same kind of device. ahead: batches at a time."""

    ahead: int

    def latents(
        self, path: MorphPath, config: SampleConfig, parts: Sequence[list[float]], report: Callable[[int], None]
    ) -> list[Tensor]:
        """`path.sample_latents` of each part; report is told of steps of the network, of all parts together."""

    def pictures(self, path: MorphPath, config: SampleConfig, parts: Sequence[Tensor]) -> list[Tensor]:
        """`path.decode` of each part, as bytes."""


class FrameStream:
    """The frames of a prepared path: `plan` says where they lie, iterating makes them in order.

    positions: of all frames, after `plan`. distances: from each frame to the next (n - 1 of them; in a loop n, the last
    back to the first), complete when the last frame has been made. distances_before: those of evenly spaced positions,
    where the schedule measured them. seconds: wall time of "schedule" and "sample". ghosts: of each way between pictures,
    as far as it has been made.
    """

    def __init__(
        self,
        path: MorphPath,
        num_frames: int,
        sample: SampleConfig,
        schedule: ScheduleConfig,
        progress: ProgressCallback | None = None,
        pace: Sequence[float] | None = None,
        helpers: Helpers | None = None,
    ) -> None:
        schedule.check_images(path.num_images, path.loop)
        self.schedule, self.pace, self.loop = schedule, pace, path.loop
        self.positions = spacing.uniform_positions(num_frames, path.num_images, path.loop)  # refuses too few
        self.distances: list[float] = []
        self.distances_before: list[float] = []
        self.ghosts: list[float] = []
        self._frames = _Frames(path, num_frames, sample, progress, helpers)
        self._planned = False
        self.seconds = self._frames.clock.seconds

    def plan(self) -> list[float]:
        """Settle the positions, sampling what that takes; the frames made on the way that stay are not made again."""
        if not self._planned:
            self._planned = True
            with self._frames.clock.running("schedule"):
                plan = spacing.plan(self._frames, self.schedule, self.pace)
            self.positions, self.distances_before = plan.positions, plan.distances_before
            self._frames.keep(self.positions)
        return self.positions

    def __iter__(self) -> Iterator[Image.Image]:
        self.plan()
        ends = _Ends(self.positions, self.loop)
        self.distances.clear()  # of an iteration before
        self.ghosts.clear()
        for i, (picture, distances) in enumerate(self._frames.along(self.positions, "sample")):
            self.distances += distances
            self.ghosts += ends.pass_by(i, picture)
            if i < len(self.positions):
                yield to_picture(self._with_opacity(picture, self.positions[i]))

    def _with_opacity(self, picture: Tensor, position: float) -> Tensor:
        opacity = self._frames.path.opacity
        if opacity is None:
            return picture
        left = min(int(position), len(opacity) - (not self.loop) - 1)
        return matte(picture, opacity[left], opacity[(left + 1) % len(opacity)], position - left)


class _Ends:
    """Keeps what the ghost of each way between pictures takes, until the frame of the next picture comes by."""

    def __init__(self, positions: Sequence[float], loop: bool) -> None:
        stops = [i for i, position in enumerate(positions) if position == int(position)]
        stops += [len(positions)] if loop else []
        middles = [some_of(middle_third(start, end), _GHOSTS) for start, end in pairwise(stops)]
        self._wanted = {i for middle in middles for i in middle}
        self._stops = set(stops)
        self._kept: list[Tensor] = []

    def pass_by(self, i: int, picture: Tensor) -> list[float]:
        """The mean ghost of the way that ends with frame i, (3, H, W) uint8; nothing where none does."""
        found = []
        if i in self._stops:
            first, *middle = [frame.float() for frame in self._kept] or [picture]
            if middle:
                found = [float(ghost(torch.stack(middle), first, picture.float()).mean())]
            self._kept = [picture]
        elif i in self._wanted:
            self._kept.append(picture)
        return found


class _Frames:
    """The `Film` that a schedule works on: frames of a path by their positions, made in batches, kept, measured."""

    def __init__(
        self,
        path: MorphPath,
        num_frames: int,
        sample: SampleConfig,
        progress: ProgressCallback | None,
        helpers: Helpers | None,
    ) -> None:
        self.path, self.num_frames, self.sample, self.progress = path, num_frames, sample, progress
        self._helpers = helpers
        self.num_images, self.loop = path.num_images, path.loop
        self.clock = _Clock("schedule", "sample")
        self._made: dict[float, Tensor] = {}  # (3, H, W) uint8, of frames that the schedule looked at and that stay
        self._done, self._total = {"schedule": 0, "sample": 0}, {"schedule": 0, "sample": num_frames}  # frames
        self._measure = Measure(path.backbone.device)

    # ---- what a schedule asks for

    def make(self, positions: Sequence[float], spare: int = 0) -> None:
        self._total["sample"] = self.num_frames + spare
        self._made |= dict(zip(positions, self._sampled([positions], "sample"), strict=True))

    def distances(self, positions: Sequence[float], reach: int = 1) -> list[list[float]]:
        self._total["schedule"] += sum(position not in self._made for position in positions)
        near: list[list[float]] = [[] for _ in range(len(positions) if self.loop else len(positions) - 1)]
        for j, (_, distances) in enumerate(self.along(positions, "schedule", reach)):
            for i, distance in enumerate(distances, start=j - len(distances)):
                near[i].append(distance)
        return near

    # ---- what the stream asks for

    def keep(self, positions: Sequence[float]) -> None:
        self._made = {position: self._made[position] for position in positions if position in self._made}

    def along(self, positions: Sequence[float], stage: str, reach: int = 1) -> Iterator[tuple[Tensor, list[float]]]:
        """The frames at `positions`, (3, H, W) uint8, in a loop the first again at the end; each with its distances from
        the `reach` before it. Those not made yet are made a batch at a time and not kept."""
        return self._measure.along(self._pictures(positions, stage), reach)

    def _pictures(self, positions: Sequence[float], stage: str) -> Iterator[tuple[float, Tensor]]:
        missing = [position for position in positions if position not in self._made]
        size, ahead = self.path.batch_size(self.sample), self._helpers.ahead if self._helpers else 1
        batch: list[Tensor] = []
        first: Tensor | None = None
        for position in positions:
            if position not in self._made and not batch:
                chunks = [missing[i * size : (i + 1) * size] for i in range(ahead)]
                batch, missing = self._sampled(chunks, stage), missing[ahead * size :]
            picture = self._made[position] if position in self._made else batch.pop(0)
            first = picture if first is None else first
            yield position, picture
        if self.loop and first is not None:
            yield float(self.num_images), first

    def _sampled(self, chunks: Sequence[Sequence[float]], stage: str) -> list[Tensor]:
        """New frames; progress counts the U-Net steps of all that are made in a stage.

        chunks: of positions, each made as if it were asked for alone.
        """
        steps, before, count = self.sample.steps, self._done[stage], sum(map(len, chunks))

        def report(reported: str, at: int, of: int) -> None:
            if self.progress and reported == "invert":
                self.progress(reported, at, of)
            elif self.progress:
                done = before * steps + count * steps * at // of
                self.progress(stage, done, self._total[stage] * steps)

        if not count:
            return []
        with self.clock.running(stage):
            if self._helpers:
                pictures = self._with_helpers(self._helpers, [chunk for chunk in chunks if chunk], report)
            else:
                (positions,) = chunks
                pictures = list(to_bytes(self.path.decode(self.path.sample_latents(positions, self.sample, report))))
            self._done[stage] += count
            return pictures

    def _with_helpers(
        self, helpers: Helpers, chunks: Sequence[Sequence[float]], report: ProgressCallback
    ) -> list[Tensor]:
        path, sample = self.path, self.sample
        batches = [[(chunk, batch) for batch in path.batches(chunk, sample)] for chunk in chunks]
        parts = [[chunk[i] for i in batch] for each in batches for chunk, batch in each]
        made = helpers.latents(path, sample, parts, lambda done: report("sample", done, len(parts) * sample.steps))
        pieces: list[Tensor] = []
        for chunk, each in zip(chunks, batches, strict=True):
            latents = path.latents.new_empty(len(chunk), *path.latents.shape[1:])
            for _, batch in each:
                latents[batch] = made.pop(0)
            pieces += latents.split(path.decoded_at_once)
        return [picture for pictures in helpers.pictures(path, sample, pieces) for picture in pictures]


class Measure:
    """Perceptual distances between frames known by their positions: each pair is measured once, and each frame passes the
    network at most once while it is among the last few."""

    def __init__(self, device: torch.device) -> None:
        self._network = perceptual_distance(str(device))
        self._known: dict[tuple[float, float], float] = {}
        self._maps: dict[float, list[Tensor]] = {}  # the features of the few frames that are being compared

    def along(self, frames: Iterable[tuple[float, Tensor]], reach: int = 1) -> Iterator[tuple[Tensor, list[float]]]:
        """Each picture as it comes, with its distances from the `reach` before it, the nearest last.   # (3, H, W) uint8"""
        last: deque[tuple[float, Tensor]] = deque(maxlen=reach)
        for q, picture in frames:
            distances = [self.between(p, q, before, picture) for p, before in last]
            last.append((q, picture))
            self._maps = {p: self._maps[p] for p, _ in last if p in self._maps}
            yield picture, distances
        self._maps.clear()

    def between(self, p: float, q: float, a: Tensor, b: Tensor) -> float:
        """The distance between the pictures a, b at p, q."""
        if (p, q) not in self._known:
            with torch.inference_mode(), settled():
                for position, picture in ((p, a), (q, b)):
                    if position not in self._maps:
                        pixels = picture[None].to(self._network.shift.device).float() / 127.5 - 1
                        self._maps[position] = self._network.features(pixels)
                self._known[p, q] = float(self._network.compare(self._maps[p], self._maps[q])[0])
        return self._known[p, q]


class _Clock:
    """Wall time by stage, in seconds; a stage that runs within another stops the other's time meanwhile."""

    def __init__(self, *stages: str) -> None:
        self.seconds = dict.fromkeys(stages, 0.0)
        self._within = 0.0  # what stages within the one that runs have taken

    @contextmanager
    def running(self, stage: str) -> Iterator[None]:
        started, outer = time.perf_counter(), self._within
        self._within = 0.0
        try:
            yield
        finally:
            took = time.perf_counter() - started
            self.seconds[stage] += took - self._within
            self._within = outer + took
