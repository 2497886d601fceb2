"""How a film's frames are played and written: in which order, which of them are held, and when each is seen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Literal, get_args

from PIL import Image

from ..config import FPS, check_limits, numbers, setting
from ..errors import ConfigError

#: The longest frame is 100 s: gif's counter holds 655 s, and nobody wants a slower film.
MIN_FPS, MAX_FPS = 0.01, 240
#: Of files that lose something: the smaller or the better, each codec in its own terms.
Quality = Literal["small", "good", "best"]
#: Nobody looks at one picture for longer.
MAX_HOLD = 3600


@dataclass(frozen=True)
class Playback:
    """How the frames of a film are played and written. Nothing of it makes a frame: another playback costs no model.

    fps: frames per second. hold: seconds that a picture is held beyond its frame; one for all, one each, or none.
    reverse: backwards; a loop still begins with its first picture. ping_pong: then back again to the frame after the first.
    quality: of formats that lose something.
    """

    fps: float = setting(
        FPS, "fps", low=MIN_FPS, high=MAX_FPS, allowed=f"a number from {MIN_FPS} to {MAX_FPS} frames per second"
    )
    hold: tuple[float, ...] = setting((), "hold", low=0, high=MAX_HOLD, many=True)
    reverse: bool = setting(False, "reverse", bool)
    ping_pong: bool = setting(False, "ping-pong", bool)
    quality: Quality = setting("good", "quality", str, choices=get_args(Quality))

    def __post_init__(self) -> None:
        object.__setattr__(self, "hold", numbers(self.hold))
        check_limits(self)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Playback:
        """That of a film's settings, or of a recipe's. Raises `ConfigError`."""
        return cls(**{f.name: settings[f.name] for f in fields(cls) if settings.get(f.name) is not None})

    def check_images(self, num_images: int) -> None:
        """Raise `ConfigError` where holds are not one for all, one each, or none."""
        if len(self.hold) not in (0, 1, num_images):
            raise ConfigError(
                f"{len(self.hold)} holds were given for {num_images} pictures: give one for all, one each, or none."
            )

    def order(self, positions: Sequence[float], loop: bool = False) -> list[int]:
        """Which frame is seen in each place of the film: numbers of frames, whose positions these are."""
        way = list(range(len(positions)))
        if self.reverse:
            way = [0, *way[:0:-1]] if loop else way[::-1]
        way += way[-2:0:-1] if self.ping_pong else []
        return [i for i in way for _ in range(1 + self._held(positions[i]))]

    def times(self, positions: Sequence[float], loop: bool = False) -> list[float]:
        """When each frame is first seen, in seconds."""
        first: dict[int, int] = {}
        for place, i in enumerate(self.order(positions, loop)):
            first.setdefault(i, place)
        return [first[i] / self.fps for i in range(len(positions))]

    def frames_in(self, seconds: float, num_images: int, loop: bool = False) -> int:
        """How many frames a film of that length has, beside those that repeat one. Raises `ConfigError` for too few."""
        self.check_images(num_images)
        held = [self._held(k) for k in range(num_images)]
        turns = {0, *([num_images - 1] if not loop else [])} if self.ping_pong else set(range(num_images))
        places = round(seconds * self.fps) - sum(held) - sum(h for k, h in enumerate(held) if k not in turns)
        frames = round(places / 2) + 1 if self.ping_pong else places
        least = max(2, num_images)
        if frames < least:
            raise ConfigError(
                f"{seconds:g} s at {self.fps:g} frames per second leave {max(0, frames)} frames beside what is held, but "
                f"{num_images} pictures need {least}: give more seconds."
            )
        return frames

    def _held(self, position: float) -> int:
        """How often the frame at that position is repeated."""
        if not self.hold or position != int(position):
            return 0
        return round(self.hold[int(position) % len(self.hold)] * self.fps)


def played(frames: Iterable[Image.Image], order: Sequence[int]) -> Iterator[Image.Image]:
    """The frames in that order; as they come, where it only ever repeats the last one."""
    if all(0 <= after - before <= 1 for before, after in pairwise([0, *order])):
        repeats = iter(order)
        wanted = next(repeats, None)
        for i, frame in enumerate(frames):
            while wanted == i:
                yield frame
                wanted = next(repeats, None)
        return
    pictures = list(frames)
    for i in order:
        yield pictures[i]
