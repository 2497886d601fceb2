"""`MorphResult`: a film and how it came about."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .config import SampleConfig
from .errors import ConfigError
from .files.films import save_made
from .files.keyframes import BETWEEN, MAX_STILLS, Still, write_keyframes
from .files.playback import Playback
from .method.perceptual import pdv, ppl
from .path import MorphPath


@dataclass
class MorphResult:
    """A film's frames and how they came about.

    frames: PIL images, one size; empty where they were written as they came. alphas: their positions. distances: perceptual
    distance from each frame to the next (n - 1 of them; in a loop n, the last back to the first frame). seconds: wall time by
    stage. unet_rows: rows of all U-Net batches, a trained row counting 3. settings: what it was made with (the pictures by
    their hashes), which goes into the film's metadata.
    distances_before: the distances of evenly spaced positions, before rescheduling; empty without it. ghosts: of each way
    between pictures that has frames in its middle third, the mean `ghost` of some of them.
    """

    frames: list[Image.Image]
    alphas: list[float]
    distances: list[float]
    seconds: dict[str, float]
    unet_rows: int
    settings: dict[str, Any]
    path: MorphPath
    distances_before: list[float] = field(default_factory=list)
    ghosts: list[float] = field(default_factory=list)

    @property
    def ppl(self) -> float:
        """Perceptual path length, the sum of the distances. Raises `ConfigError` where frames were left out by `write`."""
        return ppl(self._all_distances())

    @property
    def pdv(self) -> float:
        """Perceptual distance variance: how uneven the film is. Raises `ConfigError` where frames were left out by `write`."""
        return pdv(self._all_distances())

    def _all_distances(self) -> list[float]:
        wanted = len(self.alphas) - (not self.path.loop)
        if len(self.distances) != wanted:
            raise ConfigError(
                f"the film has {len(self.distances)} of {wanted} distances, as write did not take all frames: take each."
            )
        return self.distances

    @property
    def ghost(self) -> float | None:
        """How much of a cross-fade the film is, from 0 to 1, the mean of `ghosts`; None where no frame is between pictures.

        Raises `ConfigError` where frames were left out by `write`.
        """
        self._all_distances()  # as many as there should be
        return sum(self.ghosts) / len(self.ghosts) if self.ghosts else None

    @property
    def times(self) -> list[float]:
        """When each frame is first seen in the film, in seconds."""
        return Playback.of(self.settings).times(self.alphas, bool(self.settings.get("loop")))

    @property
    def length(self) -> float:
        """How long the film is, in seconds."""
        play = Playback.of(self.settings)
        return len(play.order(self.alphas, bool(self.settings.get("loop")))) / play.fps

    def keyframes(self, count: int) -> list[Still]:
        """Where so many stills lie that are as far from each other to the eye, the first picture and the last among them.

        Times are those of the film, played forwards. Raises `ConfigError` for fewer than 2 stills.
        """
        if isinstance(count, bool) or not isinstance(count, int) or not 2 <= count <= MAX_STILLS:
            raise ConfigError(f"stills is {count!r}, but must be a whole number from 2 to {MAX_STILLS}.")
        loop = self.path.loop
        positions = [*self.alphas, float(self.path.num_images)] if loop else self.alphas
        way = [0.0, *accumulate(self._all_distances())]
        play = replace(Playback.of(self.settings), reverse=False, ping_pong=False)
        times = play.times(self.alphas, loop)
        times += [len(play.order(self.alphas, loop)) / play.fps] if loop else []
        stills = []
        for k in range(count):
            at = way[-1] * k / (count - 1)
            position, time = (float(np.interp(at, way, each)) for each in (positions, times))
            near = min(positions, key=lambda p: abs(p - position))
            position = near if abs(near - position) < 1e-3 else position  # a picture is itself
            stills.append(Still(position, time, 1.0 if position == int(position) else BETWEEN))
        return stills

    def save_keyframes(self, folder: str | os.PathLike[str], count: int = 5) -> Path:
        """Write `keyframes(count)` as numbered stills, and keyframes.json with their times, and their indices and strengths
        for LTX and Wan (docs/video-models.md). Raises `ConfigError`, `OutputError`.
        """
        stills = self.keyframes(count)
        pictures = self.path.sample([still.position for still in stills], SampleConfig(**self.settings["sample"]))
        return write_keyframes(pictures, stills, folder, self.settings)

    def save(self, out: str | os.PathLike[str], audio: str | os.PathLike[str] | None = None, **playback: Any) -> Path:
        """Write .mp4, .webm, .mov, .mkv, .gif, .webp, .apng, .png (contact sheet), or a folder of PNG frames for no suffix.

        audio: a file whose sound a video gets. playback: fps, hold, reverse, ping_pong, quality, as in `Playback`; sheets and
        folders hold each frame once. What is not given is as the recipe says, where the film was made from one, or else 8
        frames per second. Raises `ConfigError`, `OutputError`, `SoundError`; an older output is then left as it was.
        """
        return save_made(self.frames, out, self.settings, audio, **playback)
