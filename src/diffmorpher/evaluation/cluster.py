"""The benchmark on Ray: one actor for each GPU or CPU slot, pairs handed out as actors come free."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import socket
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DiffMorpherError
from .datasets import Pair
from .worker import Settings, Worker

#: A pair that has cost so many actors their lives is recorded as failed; so many actors that die while they load end the run.
ATTEMPTS = 3


def run_on_ray(
    pairs: Sequence[Pair], settings: Settings, out: Path, address: str, jobs: int
) -> Iterator[tuple[str, str]]:
    """As `run_bench`. A dead actor's pair is given to another one, and the actor is replaced.

    address: of a running cluster, or "local" to start one here, of `jobs` workers. On a cluster the data set, the model and
    `out` must lie on a disk that every machine sees, under the same path. Raises `ConfigError` where Ray is not installed or
    not reached, what `Worker` raises where the model cannot be loaded, and `DiffMorpherError` where workers do not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError("--ray needs Ray: pip install 'diffmorpher[ray]'.") from error

    local = address == "local"
    started = not ray.is_initialized()
    if started:
        _connect(ray, address, jobs)
    at_work: dict[Any, tuple[Any, Pair | None]] = {}
    try:
        gpus, slots = _slots(ray, settings, min(len(pairs), jobs) if local else len(pairs))
        if gpus:  # Ray shows an actor no GPU but its own
            settings = replace(settings, device="cuda")
        actor_class = ray.remote(num_gpus=int(gpus), num_cpus=int(not gpus))(_Actor)
        threads = max(1, (os.cpu_count() or 1) // slots)
        arguments = (settings, out.absolute(), threads, Path.cwd())
        yield from _dispatch(ray, lambda: actor_class.remote(*arguments), slots, pairs, settings, out, at_work)
    finally:
        for actor, _ in at_work.values():
            ray.kill(actor)
        if at_work:
            ray.wait(list(at_work), num_returns=len(at_work), timeout=10)  # until they are dead, and write no more
        if started:
            ray.shutdown()
        for _, pair in at_work.values():
            _sweep(out, pair)


def _connect(ray: Any, address: str, jobs: int) -> None:
    common: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if address == "local":
        ray.init(address="local", num_cpus=jobs, include_dashboard=False, **common)
        return
    try:
        if match := re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address):
            socket.create_connection((match[1], int(match[2])), timeout=10).close()  # Ray itself tries for minutes
        ray.init(address=address, **common)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:  # ConnectionError is an OSError
        raise ConfigError(
            f"no Ray cluster is reached at {address!r}: start one with 'ray start --head', or give --ray no address."
        ) from error


def _slots(ray: Any, settings: Settings, most: int) -> tuple[bool, int]:
    """(whether the actors take GPUs, how many of them there is room for, at most `most`)."""
    there = ray.cluster_resources()
    gpus = int(there.get("GPU", 0)) if settings.device is None or settings.device.startswith("cuda") else 0
    room = gpus or int(there.get("CPU", 0))
    if not room:
        raise DiffMorpherError("the Ray cluster has neither a GPU nor a CPU to give.")
    return gpus > 0, min(room, most)


def _dispatch(
    ray: Any,
    hire: Any,
    slots: int,
    pairs: Sequence[Pair],
    settings: Settings,
    out: Path,
    at_work: dict[Any, tuple[Any, Pair | None]],
) -> Iterator[tuple[str, str]]:
    """at_work: what is under way, {Ray's reference: (actor, its pair; None while it loads)}, for the caller to clear up."""
    waiting = deque(pairs)
    deaths: Counter[str] = Counter()
    stillborn = 0

    def start() -> None:
        actor = hire()
        # An actor gets its first pair when it has loaded: on a cluster that others use, a place may never come free.
        at_work[actor.load.remote()] = (actor, None)

    for _ in range(slots):
        start()
    unfinished = len(pairs)
    while unfinished:
        (done,), _ = ray.wait(list(at_work), num_returns=1)
        actor, pair = at_work[done]
        try:
            ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None  # what the worker itself lets through ends every run, here as without Ray
        except ray.exceptions.RayError as error:  # also OutOfMemoryError, which is no RayActorError
            ray.kill(actor)
            del at_work[done]
            if pair is None:
                stillborn += 1
                if stillborn == ATTEMPTS:
                    raise DiffMorpherError(f"Ray's workers end while they load: {_first_line(error)}.") from error
            else:
                _sweep(out, pair)
                deaths[pair.name] += 1
                waiting.appendleft(pair)
            start()
            continue
        del at_work[done]
        if pair is None:
            stillborn = 0
        else:
            unfinished -= 1
        if waiting:
            following = waiting.popleft()
            if deaths[following.name] < ATTEMPTS:
                task = actor.run_pair.remote(following)
            else:
                task = actor.give_up.remote(following, f"it ended {ATTEMPTS} Ray workers")
            at_work[task] = (actor, following)
        if pair is not None:
            yield from ((pair.name, method) for method in settings.methods)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")


def _sweep(out: Path, pair: Pair | None) -> None:
    """Remove what a killed worker had begun to write."""
    for part in (out / pair.name).glob(".diffmorpher-*.part") if pair else ():
        shutil.rmtree(part, ignore_errors=True)


class _Actor:
    """A worker's place on the cluster; Ray shows it only the GPU that it may use."""

    def __init__(self, settings: Settings, out: Path, threads: int, folder: Path) -> None:
        self.settings, self.out, self.threads, self.folder = settings, out, threads, folder

    def load(self) -> None:
        """Apart from `__init__`, whose exceptions Ray turns into texts."""
        import torch

        with suppress(OSError):  # relative paths, of pictures and of the model, mean what they mean to the driver
            os.chdir(self.folder)
        torch.set_num_threads(self.threads)
        self.worker = Worker(self.settings, self.out)

    def run_pair(self, pair: Pair) -> None:
        for _ in self.worker.run_pair(pair):
            pass

    def give_up(self, pair: Pair, reason: str) -> None:
        self.worker.give_up(pair, reason)
