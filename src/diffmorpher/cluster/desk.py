"""A film's parts, to be made by whoever is free: the process that makes the film, and others that help it.

A part is a batch of frames as one process alone would sample it, or as many latents as it would decode at once: so the bytes
are the same, whoever made which.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..config import SampleConfig
from ..errors import Cancelled
from ..path import MorphPath, to_bytes
from ..progress import ProgressCallback

#: Latents of the frames at some positions, or the pictures of some latents.
Part = tuple[str, Any]


@dataclass
class _Shared:
    """What is on the desk. own: parts that nobody else shall try (again). taken: by whom, and which."""

    parts: list[Part]
    spare: deque[int]
    own: deque[int]
    taken: dict[int, int]
    made: dict[int, Any]


class Desk:
    """The parts of one film at work. ahead: how many are worth having at once."""

    def __init__(self, ahead: int = 1) -> None:
        self.ahead = ahead
        self.path: MorphPath | None = None
        self.config: SampleConfig | None = None
        self._changed = threading.Condition()
        self._now = _Shared([], deque(), deque(), {}, {})
        self._stopped = False

    # ---- whoever makes the film (`stream.Helpers`)

    def latents(
        self, path: MorphPath, config: SampleConfig, parts: Sequence[list[float]], report: Callable[[int], None]
    ) -> list[Tensor]:
        """Those at each part's positions. report: is told of steps of the network, of all parts together."""
        path.noises_at(config.steps)  # else each who helps makes them
        made = self._share(path, config, [("latents", part) for part in parts], report)
        for _, rows in made:
            path.backbone.count_rows(rows)  # of others; one's own were counted, and are 0 here
        return [latents.to(path.latents.device) for latents, _ in made]

    def pictures(self, path: MorphPath, config: SampleConfig, parts: Sequence[Tensor]) -> list[Tensor]:
        """Those of each part's latents, uint8, on the CPU."""
        return self._share(path, config, [("pictures", part.cpu()) for part in parts], lambda done: None)

    def _share(
        self, path: MorphPath, config: SampleConfig, parts: Sequence[Part], report: Callable[[int], None]
    ) -> list[Any]:
        steps = config.steps
        with self._changed:
            self.path, self.config = path, config
            self._now = now = _Shared(list(parts), deque(range(len(parts))), deque(), {}, {})
        while True:
            with self._changed:
                while not (now.spare or now.own) and len(now.made) < len(parts):
                    self._changed.wait(0.5)
                    self.check_stopped()
                if len(now.made) == len(parts):
                    return [now.made[i] for i in range(len(parts))]
                number = (now.own or now.spare).popleft()
                done = len(now.made) * steps

            def progress(stage: str, at: int, of: int, done: int = done) -> None:
                self.check_stopped()
                if stage == "sample":
                    report(done + at)

            made = make_part(path, config, parts[number], progress)
            if parts[number][0] == "latents":
                made = made[0], 0
            with self._changed:
                now.made[number] = made

    # ---- whoever helps, from other threads

    @property
    def spare(self) -> int:
        """How many parts nobody is at."""
        with self._changed:
            return len(self._now.spare)

    def take(self, token: int) -> Part | None:
        """A part that nobody is at, for whoever calls himself `token`."""
        with self._changed:
            if not self._now.spare:
                return None
            number = self._now.taken[token] = self._now.spare.pop()
            return self._now.parts[number]

    def bring(self, token: int, made: Any) -> None:
        """What was made of the part that was taken; None gives it back."""
        with self._changed:
            number = self._now.taken.pop(token, None)
            if number is None:
                return
            if made is None:
                self._now.own.append(number)
            else:
                self._now.made[number] = made
            self._changed.notify_all()

    def stop(self) -> None:
        """Have the work end at its next step."""
        self._stopped = True

    def check_stopped(self) -> None:
        """Raise `Cancelled` where the work is to end."""
        if self._stopped:
            raise Cancelled("The run was cancelled.")


def make_part(path: MorphPath, config: SampleConfig, part: Part, progress: ProgressCallback | None = None) -> Any:
    """(latents, rows that the network took) or pictures."""
    kind, value = part
    if kind == "pictures":
        return to_bytes(path.decode(value.to(path.latents.device)))
    before = path.backbone.unet_rows
    return path.sample_latents(value, config, progress).cpu(), path.backbone.unet_rows - before
