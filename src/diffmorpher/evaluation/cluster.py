"""The benchmark on Ray: each actor holds the model, and makes all methods of a pair."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..cluster.dispatch import ATTEMPTS, Task, connected
from ..files.atomic import remove_leftovers
from .datasets import Pair
from .worker import Settings, Worker


def run_on_ray(
    pairs: Sequence[Pair], settings: Settings, out: Path, address: str, jobs: int
) -> Iterator[tuple[str, str]]:
    """As `run_bench`. A pair that ends `ATTEMPTS` actors is recorded as failed.

    address: of a running cluster, or "local" to start one here, of `jobs` workers. On a cluster the data set, the model and
    `out` must lie on a disk that every machine sees, under the same path. Raises what `cluster.dispatch.connected` and
    `Worker` raise.
    """
    source = _Pairs(pairs, out)
    cluster = None
    try:
        with connected(address, jobs, settings.device, most=len(pairs)) as cluster:
            if cluster.slots.on_gpus:  # Ray shows an actor no GPU but its own
                settings = replace(settings, device="cuda")
            for task, _ in cluster.run(partial(Worker, settings, out.absolute()), source):
                yield from ((task.name, method) for method in settings.methods)
    finally:
        for task in cluster.interrupted if cluster else ():
            source.sweep(task)


class _Pairs:
    """The pairs of a run, as a `cluster.dispatch.Source`."""

    def __init__(self, pairs: Sequence[Pair], out: Path) -> None:
        self._waiting = deque(Task(pair.name, "make_pair", (pair,)) for pair in pairs)
        self._out = out

    def next(self) -> Task | None:
        return self._waiting.popleft() if self._waiting else None

    def is_over(self) -> bool:
        return not self._waiting

    def died(self, task: Task, often: int) -> bool:
        self.sweep(task)
        if often == ATTEMPTS:  # some worker must live to write it down
            why = f"it ended {ATTEMPTS} Ray workers"
            self._waiting.appendleft(Task(task.name, "give_up", (task.arguments[0], why)))
        return often != ATTEMPTS

    def progress(self, task: Task, stage: str, done: int, total: int) -> bool:
        return False

    def sweep(self, task: Task) -> None:
        """Remove what a killed worker had begun to write."""
        if (self._out / task.name).is_dir():
            remove_leftovers(self._out / task.name)
