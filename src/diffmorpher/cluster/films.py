"""The films of a batch on Ray: an actor makes a film, and those with nothing to do help with its frames."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..files.atomic import remove_leftovers
from ..files.places import landing
from ..recipe import Recipe
from .dispatch import ATTEMPTS, Cluster, Task, connected
from .maker import Maker

if TYPE_CHECKING:
    from ..result import MorphResult


def make_films(
    films: Sequence[tuple[Recipe, Path]], address: str, jobs: int
) -> Iterator[tuple[Path, MorphResult | str]]:
    """(output, its figures or why there is none) of each film, as they are done.

    films: recipes whose files were found, and outputs. address: of a running cluster, or "local" to start one here, of `jobs`
    workers; its machines see all files under the same paths. Raises what `connected` raises.
    """
    source = _Films(films)
    cluster = None
    try:
        with connected(address, jobs, films[0][0].device) as cluster:
            for task, result in cluster.run(maker_of(cluster), source):
                yield Path(task.name), result
                yield from source.lost()
        yield from source.lost()
    finally:
        for task in cluster.interrupted if cluster else ():
            source.sweep(task)


def maker_of(cluster: Cluster) -> Callable[[], Maker]:
    """What makes a cluster's workers."""
    return partial(Maker, cluster.slots.count, "cuda" if cluster.slots.on_gpus else None)


class _Films:
    """The films of a batch, as a `cluster.dispatch.Source`."""

    def __init__(self, films: Sequence[tuple[Recipe, Path]]) -> None:
        self._waiting = deque(Task(str(out), "film", (recipe, out), is_shared=True) for recipe, out in films)
        self._lost: list[tuple[Path, str]] = []

    def next(self) -> Task | None:
        return self._waiting.popleft() if self._waiting else None

    def is_over(self) -> bool:
        return not self._waiting

    def died(self, task: Task, often: int) -> bool:
        self.sweep(task)
        if often < ATTEMPTS:
            return True
        self._lost.append((Path(task.name), f"it ended {ATTEMPTS} Ray workers."))
        return False

    def progress(self, task: Task, stage: str, done: int, total: int) -> bool:
        return False

    def lost(self) -> Iterator[tuple[Path, str]]:
        """Films that were given up since the last call."""
        while self._lost:
            yield self._lost.pop(0)

    def sweep(self, task: Task) -> None:
        """Remove what a killed worker had begun to write."""
        folder = landing(Path(task.name)).parent
        if folder.is_dir():
            remove_leftovers(folder)
