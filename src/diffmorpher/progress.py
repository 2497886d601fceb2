"""Progress callbacks, and lines for whoever started the program.

Standard output is left to results (`--json`, `info`, `--help`), so that it can be piped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from rich.console import Console

#: `progress(stage, done, total)`; stages are "fit", "invert", "schedule", "sample". Raise `Cancelled` in it to stop the run.
ProgressCallback = Callable[[str, int, int], None]


class Stopwatch:
    """A progress callback that passes everything on and remembers when each stage ended."""

    def __init__(self, progress: ProgressCallback | None = None) -> None:
        self._progress = progress
        self._began = time.perf_counter()
        self._ended: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        self._ended[stage] = time.perf_counter()
        if self._progress:
            self._progress(stage, done, total)

    def seconds(self, *stages: str) -> dict[str, float]:
        """The wall time of stages that follow each other; what did not happen took none, the last one ends now."""
        ends = [self._ended.get(stage, self._began) for stage in stages[:-1]] + [time.perf_counter()]
        return {stage: end - start for stage, start, end in zip(stages, [self._began, *ends], ends, strict=False)}


#: Text is shown as it is: brackets and colons in a file name are neither markup nor emoji.
console = Console(stderr=True, markup=False, emoji=False, highlight=False)


def say(text: str) -> None:
    """One line, however many the text had, with control characters escaped."""
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    console.print(line, soft_wrap=True)


#: Seconds for which the main thread may wait at once. The system may hand a signal to any thread, but Python handles it in the
#: main one, which is not woken for that: a wait without an end could not be stopped.
AWAKE = 0.5


def wait(event: threading.Event) -> None:
    """For the event, as long as it takes, with an ear for signals (see `AWAKE`)."""
    while not event.wait(AWAKE):
        pass


def quiet_bars() -> None:
    """No bars from diffusers and transformers while a model is loaded; imports both."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
