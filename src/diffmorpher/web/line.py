"""The line of jobs behind the page and the HTTP service, one at a time, each to be cancelled within one step.

Where one process is both, they have one line, so that films are made in the order in which they were asked for.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ..errors import Cancelled, DiffMorpherError

#: Jobs of the page's that may wait.
LONGEST_LINE = 20

#: `work(progress)`; progress(stage, done, total) raises `Cancelled` once the job is cancelled.
Work = Callable[[Callable[[str, int, int], None]], Any]


class Job:
    """One piece of work in the line, and what is known of its progress."""

    def __init__(self, line: Line, work: Work) -> None:
        self._line, self._work = line, work
        self._cancelled = threading.Event()
        self.done = threading.Event()
        self.result: Any = None
        self.error: Exception | None = None
        #: stage -> [done, total, when it began, when it last moved]
        self.stages: dict[str, list[float]] = {}

    @property
    def ahead(self) -> int:
        """How many jobs come first; 0 while this one is at work, or is over."""
        return self._line.ahead(self)

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Leave the line, or stop at the next step."""
        self._cancelled.set()
        self._line.drop(self)

    def progress(self, stage: str, done: int, total: int) -> None:
        """The library's progress callback."""
        if self.cancelled:
            raise Cancelled("The run was cancelled.")
        now = time.monotonic()
        began = self.stages[stage][2] if stage in self.stages else self._last_moved(now)
        self.stages[stage] = [done, total, began, now]

    def _last_moved(self, now: float) -> float:
        return max((moved for *_, moved in self.stages.values()), default=now)

    def run(self) -> None:
        try:
            self.result = self._work(self.progress)
        except Exception as error:
            self.error = error
        finally:
            self._work = _nothing  # lets go of the pictures
            self.done.set()


def _nothing(_: Any) -> None:
    return None


class Line:
    """Jobs one at a time, in the order they came, in one thread."""

    def __init__(self) -> None:
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._serve, daemon=True, name="diffmorpher jobs").start()

    def submit(self, work: Work, most: float = LONGEST_LINE) -> Job:
        """Raises `DiffMorpherError` if so many wait already."""
        job = Job(self, work)
        with self._changed:
            if len(self._waiting) >= most:
                raise DiffMorpherError("Too many people are waiting: try again in a few minutes.")
            self._waiting.append(job)
            self._changed.notify()
        return job

    def ahead(self, job: Job) -> int:
        with self._changed:
            if job not in self._waiting:
                return 0
            return self._waiting.index(job) + (self._running is not None)

    def drop(self, job: Job) -> None:
        with self._changed:
            if job not in self._waiting:
                return
            self._waiting.remove(job)
        job.error = Cancelled("The run was cancelled.")
        job.done.set()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._running = None
                while not self._waiting:
                    self._changed.wait()
                self._running = self._waiting.popleft()
            self._running.run()
