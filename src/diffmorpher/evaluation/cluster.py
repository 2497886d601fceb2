"""The benchmark on Ray: one actor for each GPU or CPU slot, pairs handed out as actors come free."""

from __future__ import annotations

import importlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DiffMorpherError
from .bench import Settings, Worker
from .datasets import Pair

#: A pair that has cost so many actors their lives is given up.
ATTEMPTS = 3


def run_on_ray(
    pairs: Sequence[Pair], settings: Settings, out: Path, address: str, jobs: int
) -> Iterator[tuple[str, str]]:
    """As `run_bench`. A dead actor's pair is given to another one, and the actor is replaced.

    address: of a running cluster, or "local" to start one here. On a cluster `out` and the data set must lie on a disk that
    every machine sees. Raises `ConfigError` where Ray is not installed, `DiffMorpherError` where a pair keeps killing actors.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError("--ray needs Ray: pip install 'diffmorpher[ray]'.") from error

    local = address == "local"
    started = not ray.is_initialized()
    if started:
        options: dict[str, Any] = {"num_cpus": jobs} if local else {"address": address}
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False, **options)
    try:
        yield from _dispatch(ray, pairs, settings, out)
    finally:
        if started:
            ray.shutdown()


def _dispatch(ray: Any, pairs: Sequence[Pair], settings: Settings, out: Path) -> Iterator[tuple[str, str]]:
    gpus = int(ray.cluster_resources().get("GPU", 0))
    slots = min(len(pairs), gpus or int(ray.cluster_resources()["CPU"]))
    threads = max(1, (os.cpu_count() or 1) // slots)
    actor_class = ray.remote(num_gpus=1 if gpus else 0, num_cpus=0 if gpus else 1)(_Actor)

    def start() -> Any:
        return actor_class.remote(settings, out.absolute(), threads)

    waiting = deque((pair, 1) for pair in pairs)
    at_work: dict[Any, tuple[Any, Pair, int]] = {}

    def hand_out(actor: Any) -> None:
        if waiting:
            pair, attempt = waiting.popleft()
            at_work[actor.run_pair.remote(pair)] = (actor, pair, attempt)

    for _ in range(slots):
        hand_out(start())
    while at_work:
        (done,), _ = ray.wait(list(at_work), num_returns=1)
        actor, pair, attempt = at_work.pop(done)
        try:
            ray.get(done)
        except ray.exceptions.RayActorError as error:
            if attempt == ATTEMPTS:
                raise DiffMorpherError(f"the pair {pair.name!r} ended {ATTEMPTS} Ray workers: {error}.") from error
            waiting.appendleft((pair, attempt + 1))
            actor = start()
        else:
            yield from ((pair.name, method) for method in settings.methods)
        hand_out(actor)


class _Actor:
    """A worker's place on the cluster; Ray shows it only the GPU that it may use."""

    def __init__(self, settings: Settings, out: Path, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.worker = Worker(settings, out)

    def run_pair(self, pair: Pair) -> None:
        for _ in self.worker.run_pair(pair):
            pass

    def process(self) -> int:
        return os.getpid()
