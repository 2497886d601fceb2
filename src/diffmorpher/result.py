"""`MorphResult`: a film and how it came about."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from .files.films import save_made
from .method.perceptual import pdv, ppl
from .path import MorphPath


@dataclass
class MorphResult:
    """A film's frames and how they came about.

    frames: PIL images, one size; empty where they were written as they came. alphas: their positions. distances: perceptual
    distance from each frame to the next (n - 1 of them; in a loop n, the last back to the first frame). seconds: wall time by
    stage. unet_rows: rows of all U-Net batches, a trained row counting 3. settings: what it was made with (the pictures by
    their hashes), which goes into the film's metadata.
    distances_before: the distances of evenly spaced positions, before rescheduling; empty without it.
    """

    frames: list[Image.Image]
    alphas: list[float]
    distances: list[float]
    seconds: dict[str, float]
    unet_rows: int
    settings: dict[str, Any]
    path: MorphPath
    distances_before: list[float] = field(default_factory=list)

    @property
    def ppl(self) -> float:
        """Perceptual path length, the sum of the distances."""
        return ppl(self.distances)

    @property
    def pdv(self) -> float:
        """Perceptual distance variance: how uneven the film is."""
        return pdv(self.distances)

    def save(self, out: str | os.PathLike[str], fps: float | None = None, ping_pong: bool | None = None) -> Path:
        """Write .mp4, .gif, .webp, .png (contact sheet), or a folder of PNG frames where the name has no suffix.

        fps: frames per second. ping_pong: a film that runs back to its first frame, so that it plays on without a jump; sheets
        and folders hold each frame once. None takes what the recipe says, where the film was made from one, or else 8 and
        False. Raises `OutputError`; an older output is then left as it was.
        """
        return save_made(self.frames, out, self.settings, fps, ping_pong)
