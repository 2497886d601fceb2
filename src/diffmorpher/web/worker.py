"""Makes the films of stored jobs: in the page's line, or on a Ray cluster."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from functools import partial

from ..cluster.dispatch import ATTEMPTS, Task, connected
from ..cluster.films import maker_of
from ..cluster.maker import Maker, Model
from ..errors import Cancelled
from ..files.atomic import remove_leftovers
from ..progress import wait
from .jobs import explain
from .line import Job, Line
from .store import Store, StoredJob

#: Seconds between looks for what is old.
TIDY = 60.0


class Worker:
    """Puts stored jobs into a line, until it is stopped. line, model: those of others who work in this process."""

    def __init__(self, store: Store, line: Line | None = None, model: Model | None = None) -> None:
        self._store, self._line = store, line or Line()
        self._maker = Maker(model=model)
        self._stopped = threading.Event()
        self._idle = threading.Condition()
        self._running = False
        self._lock = threading.Lock()
        self._places: dict[str, Job] = {}

    def start(self) -> None:
        """Begin with what waits."""
        self._store.ahead = self._ahead
        self._store.changed = self._follow
        self._queue()
        threading.Thread(target=tidied, args=(self._store, self._stopped), daemon=True).start()

    def stop(self) -> None:
        """End within a step; a job in the middle waits for the next server."""
        self._stopped.set()
        with self._idle:
            self._idle.wait_for(lambda: not self._running, timeout=10)

    def _follow(self, key: str) -> None:
        """A job has come, which takes its place in the line, or was cancelled, and leaves it."""
        job = self._store.get(key)
        if job and job.is_over:
            with self._lock:
                place = self._places.pop(key, None)
            if place:
                place.cancel()
        else:
            self._queue()

    def _queue(self) -> None:
        """Each job that waits has its place, in the order in which the store has them: of two that come at once the second may
        be told of first."""
        with self._lock:
            for key in self._store.waiting():
                if key not in self._places:
                    self._places[key] = self._line.submit(partial(self._run, key), most=float("inf"))

    def _ahead(self, key: str) -> int:
        place = self._places.get(key)
        return place.ahead if place else 0

    def _run(self, key: str, _: object = None) -> None:
        with self._idle:
            self._running = not self._stopped.is_set()
        try:
            if self._running and (job := self._store.begin(key)):
                self._work(job)
        except Exception:  # the disk is full, say, so that nothing can be noted: it waits for the next server
            traceback.print_exc()
        finally:
            with self._lock:
                self._places.pop(key, None)
            with self._idle:
                self._running = False
                self._idle.notify_all()

    def _work(self, job: StoredJob) -> None:
        def progress(stage: str, done: int, total: int) -> None:
            if self._store.progress(job.id, stage, done, total) or self._stopped.is_set():
                raise Cancelled("The run was cancelled.")

        try:
            self._maker.make_job(self._store.folder(job.id), progress)
        except Cancelled:
            if not self._stopped.is_set():  # else it goes on when a server is there again
                self._store.end(job.id, "cancelled")
        except Exception as error:
            traceback.print_exc()
            self._store.end(job.id, "failed", explain(error))
        else:
            self._store.end(job.id, "done")


class RayWorker:
    """Has stored jobs made on a Ray cluster, which sees the store's folder under the same path, until it is stopped.

    A `cluster.dispatch.Source`: a job is begun when an actor is free for it.
    """

    def __init__(self, store: Store, address: str, jobs: int, failed: Callable[[], None]) -> None:
        """failed: is called where the cluster ends."""
        self._store, self._address, self._jobs, self._failed = store, address, jobs, failed
        self._stopped, self._ready = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True, name="diffmorpher ray")
        self.error: Exception | None = None

    def start(self) -> None:
        """Begin with what waits. Raises `ConfigError`, `DiffMorpherError` where there is no such cluster."""
        self._thread.start()
        wait(self._ready)
        if self.error:
            raise self.error
        threading.Thread(target=tidied, args=(self._store, self._stopped), daemon=True).start()

    def stop(self) -> None:
        """End at once; jobs in the middle wait for the next server."""
        self._stopped.set()
        self._thread.join(timeout=30)

    def _serve(self) -> None:
        try:
            with connected(self._address, self._jobs) as cluster:
                self._ready.set()
                for task, error in cluster.run(maker_of(cluster), self):
                    self._note(task.name, error)
        except Exception as error:
            self.error = error
            if self._ready.is_set():
                traceback.print_exc()
                self._failed()
        finally:
            self._ready.set()

    def _note(self, key: str, error: Exception | None) -> None:
        try:
            if error is None:
                self._store.end(key, "done")
            elif isinstance(error, Cancelled):
                self._store.end(key, "cancelled")
            else:
                self._store.end(key, "failed", explain(error))
        except Exception:  # as in `Worker`
            traceback.print_exc()

    # ---- what the dispatcher asks

    def next(self) -> Task | None:
        job = None if self._stopped.is_set() else self._store.next(timeout=0)
        if job is None:
            return None
        return Task(job.id, "job", (self._store.folder(job.id).absolute(),), is_shared=True)

    def is_over(self) -> bool:
        return self._stopped.is_set()

    def died(self, task: Task, often: int) -> bool:
        remove_leftovers(self._store.folder(task.name))
        if self._store.progress(task.name, "load", 0, 1):
            self._store.end(task.name, "cancelled")
            return False
        if often >= ATTEMPTS:
            self._store.end(task.name, "failed", f"it ended {ATTEMPTS} Ray workers.")
            return False
        return True

    def progress(self, task: Task, stage: str, done: int, total: int) -> bool:
        return self._store.progress(task.name, stage, done, total)


def tidied(store: Store, stopped: threading.Event) -> None:
    """Remove what is old, every now and then."""
    while True:
        try:
            store.tidy()
        except Exception:
            traceback.print_exc()
        if stopped.wait(TIDY):
            return
