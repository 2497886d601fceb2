"""Work on Ray: one actor for each GPU or CPU slot, tasks handed out as actors come free, a dead actor's task to another.

The benchmark, batches and the HTTP service each say what there is to do (`Source`) and what does it (`make`); the rest is here.
"""

from __future__ import annotations

import importlib
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..errors import ConfigError, DiffMorpherError

#: A task that has cost so many actors their lives is given up; so many actors that die while they load end the run.
ATTEMPTS = 3
#: Seconds between looks at what there is to do, and at films under way.
LOOK = 0.1


@dataclass(frozen=True)
class Task:
    """A call of the worker's: its method and arguments. name: of what comes of it, different for each.

    is_shared: the worker has a `desk` (`cluster.desk`), from which others may take parts of it.
    """

    name: str
    method: str
    arguments: tuple[Any, ...] = ()
    is_shared: bool = False


class Source(Protocol):
    """What there is to do, and who wants to know of it."""

    def next(self) -> Task | None:
        """The next task, for an actor that is free; None: nothing now."""

    def is_over(self) -> bool:
        """Whether nothing more will come."""

    def died(self, task: Task, often: int) -> bool:
        """An actor died over it; whether another one shall try, or the task is given up."""

    def progress(self, task: Task, stage: str, done: int, total: int) -> bool:
        """How far a shared task is; whether it shall stop."""


@dataclass(frozen=True)
class Slots:
    """Places for actors. on_gpus: each is a GPU, the only one that its actor sees. threads: of each actor's."""

    on_gpus: bool
    count: int

    @property
    def threads(self) -> int:
        return max(1, (os.cpu_count() or 1) // self.count)


@contextmanager
def connected(address: str, jobs: int, device: str | None = None, most: int | None = None) -> Iterator[Cluster]:
    """A Ray cluster, left when the block ends; what runs there then is ended.

    address: of a running one, or "local" to start one here, of `jobs` workers. device: as `Morpher.from_pretrained` takes it;
    on a CPU no GPU is asked for. most: actors that there is work for. Raises `ConfigError` where Ray is not installed or not
    reached, `DiffMorpherError` where it has no place.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError("--ray needs Ray: pip install 'diffmorpher[ray]'.") from error
    started = not ray.is_initialized()
    if started:
        _connect(ray, address, jobs)
    cluster: Cluster | None = None
    try:
        there = ray.cluster_resources()
        gpus = int(there.get("GPU", 0)) if device is None or device.startswith("cuda") else 0
        room = gpus or int(there.get("CPU", 0))
        if not room:
            raise DiffMorpherError("the Ray cluster has neither a GPU nor a CPU to give.")
        wanted = [room, *([jobs] if address == "local" else []), *([] if most is None else [most])]
        cluster = Cluster(ray, Slots(gpus > 0, min(wanted)))
        yield cluster
    finally:
        if cluster:
            cluster.end()
        if started:
            ray.shutdown()


def _connect(ray: Any, address: str, jobs: int) -> None:
    common: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if address == "local":
        ray.init(address="local", num_cpus=jobs, include_dashboard=False, **common)
        return
    why = "start one with 'ray start --head', or give --ray no address."
    try:
        if match := re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address):
            socket.create_connection((match[1], int(match[2])), timeout=10).close()  # Ray itself tries for minutes
            why = (
                "what answers there must be a Ray of the same release; if it asks for a token, set RAY_AUTH_MODE=token in the "
                "environment, and have its ~/.ray/auth_token here."
            )
        ray.init(address=address, **common)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:  # ConnectionError is an OSError
        raise ConfigError(f"no Ray cluster is reached at {address!r}: {why}") from error


@dataclass
class _Call:
    """What an actor is at: a task, or, for `lead`, a part of that one's task; neither while it loads.

    number: no other call has it. path: Ray's reference to what those who help with a shared task must know of it.
    """

    actor: Any
    task: Task | None = None
    lead: _Call | None = None
    number: int = 0
    path: Any = None
    looking: Any = None
    looked: float = 0.0


@dataclass
class Cluster:
    """A cluster that is reached, and the actors on it."""

    ray: Any
    slots: Slots
    _at_work: dict[Any, _Call] = field(default_factory=dict)  # by Ray's reference of the call
    _idle: list[Any] = field(default_factory=list)
    _calls: int = 0
    interrupted: list[Task] = field(default_factory=list)  # tasks that were under way at the end

    def run(self, make: Callable[[], Any], source: Source) -> Iterator[tuple[Task, Any]]:
        """Do what the source says, each task once: (task, what its method returned) as they are done.

        make: gives a worker, in the actor. What a worker raises ends the run. Raises `DiffMorpherError` where workers do not
        start.
        """
        ray, slots = self.ray, self.slots
        options = {"num_gpus": int(slots.on_gpus), "num_cpus": int(not slots.on_gpus), "max_concurrency": 4}
        actor_class = ray.remote(**options)(_Actor)
        again: list[Task] = []
        deaths: Counter[str] = Counter()
        stillborn = 0

        def start() -> None:
            # An actor gets its first task when it has loaded: on a cluster that others use, a place may never come free.
            actor = actor_class.remote(make, slots.threads, Path.cwd())
            self._at_work[actor.load.remote()] = self._call(actor)

        for _ in range(slots.count):
            start()
        while True:
            while self._idle and (task := again.pop(0) if again else source.next()):
                actor = self._idle.pop()
                self._at_work[actor.call.remote(task.method, *task.arguments)] = self._call(actor, task)
            self._look_after(source)
            tasks = [call for call in self._at_work.values() if call.task]
            if not tasks and not again and source.is_over():
                return
            if not self._at_work:
                time.sleep(LOOK)
                continue
            for done in ray.wait(list(self._at_work), num_returns=1, timeout=LOOK)[0]:
                call = self._at_work.pop(done)
                try:
                    result = ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None  # what a worker itself lets through ends every run, here as without Ray
                except ray.exceptions.RayError as error:  # also OutOfMemoryError, which is no RayActorError
                    ray.kill(call.actor)
                    if call.task:
                        deaths[call.task.name] += 1
                        if source.died(call.task, deaths[call.task.name]):
                            again.insert(0, call.task)
                    elif call.lead:
                        self._tell(call.lead, "give_back", call.number)
                    else:
                        stillborn += 1
                        if stillborn == ATTEMPTS:
                            reason = str(error).strip().splitlines()[0].rstrip(".")
                            raise DiffMorpherError(f"Ray's workers end while they load: {reason}.") from error
                    start()
                    continue
                self._idle.append(call.actor)
                if call.task:
                    yield call.task, result
                elif call.lead is None:
                    stillborn = 0

    def _look_after(self, source: Source) -> None:
        """Note how far shared tasks are, stop those that shall, and give parts of them to actors with nothing to do."""
        ray, now = self.ray, time.monotonic()
        for call in [call for call in self._at_work.values() if call.task and call.task.is_shared]:
            if call.looking is None and now - call.looked >= LOOK:
                call.looking, call.looked = call.actor.call.remote("look"), now
            if call.looking is None or not ray.wait([call.looking], timeout=0)[0]:
                continue
            try:
                stage, done, total, spare = ray.get(call.looking)
            except ray.exceptions.RayError:  # what became of it is seen by the task itself
                continue
            finally:
                call.looking = None
            assert call.task
            if stage and source.progress(call.task, stage, done, total):
                self._tell(call, "stop", call.task.name)
                continue
            if spare and call.path is None:
                call.path = call.actor.call.remote("shared", call.task.name)
            for _ in range(min(spare, len(self._idle))):
                helper = self._call(self._idle.pop(), lead=call)
                part = call.actor.call.remote("take", call.task.name, helper.number)
                made = helper.actor.help.remote(call.number, [call.path, part])
                call.actor.call.remote("bring", helper.number, made)
                self._at_work[made] = helper

    def _call(self, actor: Any, task: Task | None = None, lead: _Call | None = None) -> _Call:
        self._calls += 1
        return _Call(actor, task, lead, self._calls)

    def _tell(self, call: _Call, method: str, *arguments: Any) -> None:
        call.actor.call.remote(method, *arguments)

    def end(self) -> None:
        """End all actors; returns when they are dead, and write no more."""
        self.interrupted = [call.task for call in self._at_work.values() if call.task]
        for call in self._at_work.values():
            self.ray.kill(call.actor)
        for actor in self._idle:
            self.ray.kill(actor)
        if self._at_work:
            self.ray.wait(list(self._at_work), num_returns=len(self._at_work), timeout=10)


class _Actor:
    """A worker's place on the cluster; Ray shows it only the GPU that it may use."""

    def __init__(self, make: Callable[[], Any], threads: int, folder: Path) -> None:
        self.make, self.threads, self.folder = make, threads, folder

    def load(self) -> None:
        """Apart from `__init__`, whose exceptions Ray turns into texts."""
        import torch

        with suppress(OSError):  # relative paths, of pictures and of the model, mean what they mean to the driver
            os.chdir(self.folder)
        torch.set_num_threads(self.threads)
        self.worker = self.make()

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self.worker, method)(*arguments)

    def help(self, number: int, references: list[Any]) -> Any:
        """Make a part of another actor's task; None where there is none to be had, or it cannot be made here.

        number: of the task, whose path is fetched once. references: of the path and the part, which may never come.
        """
        ray: Any = importlib.import_module("ray")
        path, part = references
        try:
            taken = ray.get(part)
            if taken is None:
                return None
            if not self.worker.knows(number):
                self.worker.learn(number, *ray.get(path))
            return self.worker.make_part(*taken)
        except Exception:  # then whoever asked makes it, and sees why not
            return None
