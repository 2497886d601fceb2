"""Jobs that outlive the server: a table in SQLite, and a folder of files for each. A job ends once, whatever happens between.

A job waits, runs, and is done, failed or cancelled. One that was running when the server ended waits again, in its old place.
"""

from __future__ import annotations

import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from ..errors import ConfigError, DiffMorpherError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: Jobs that may wait; hours that files of an ended one are kept; times that one is begun, for it may be what ends the server.
LONGEST, KEPT_HOURS, MAX_TRIES = 1000, 24.0, 3
#: States in which nothing more happens.
ENDED = ("done", "failed", "cancelled")

_TABLE = """
create table if not exists jobs (
    number integer primary key autoincrement,
    id text unique not null,
    state text not null default 'waiting',
    name text not null,
    stage text not null default '',
    step integer not null default 0,
    steps integer not null default 0,
    error text not null default '',
    tries integer not null default 0,
    stop integer not null default 0,
    created real not null,
    ended real
);
create index if not exists by_state on jobs (state, number);
"""


class Full(DiffMorpherError):
    """Too many jobs wait."""


@dataclass(frozen=True)
class StoredJob:
    """A job as the table has it. number: its place; name: what its film is called; step of steps: progress in its stage.

    stop: somebody asked for its end. created, ended: seconds since 1970. ahead: jobs that come first.
    """

    number: int
    id: str
    state: str
    name: str
    stage: str
    step: int
    steps: int
    error: str
    tries: int
    stop: int
    created: float
    ended: float | None
    ahead: int = 0

    @property
    def is_over(self) -> bool:
        return self.state in ENDED

    def described(self) -> dict[str, Any]:
        """What others may see of it."""
        hidden = ("number", "tries", "stop")
        return {name: value for name, value in asdict(self).items() if name not in hidden}


def alone(root: Path) -> IO[bytes]:
    """A file that is locked as long as it is open and its process lives. Raises `ConfigError` where another has it."""
    file = (root / "lock").open("ab")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ConfigError(f"another server is at work in {str(root)!r}: stop it, or give another folder.") from error
    except OSError:  # a file system that has no locks
        pass
    return file


class Store:
    """The jobs under one folder, for one process at a time. What an earlier one left undone waits again.

    Raises `ConfigError` where another is at work there, or the folder holds something else.
    """

    def __init__(self, root: Path, longest: int = LONGEST) -> None:
        self.root, self._longest = root, longest
        self._lock, self._changed = threading.RLock(), threading.Condition()
        #: How many jobs come before one that waits, where others than these are in the line too.
        self.ahead: Callable[[str], int] | None = None
        #: Is told of jobs that come and that are cancelled.
        self.changed: Callable[[str], None] = lambda key: None
        try:
            (root / "jobs").mkdir(parents=True, exist_ok=True)
            self._alone = alone(root)
        except OSError as error:
            raise ConfigError(
                f"{str(error.filename or root)!r} cannot be used for jobs ({error.strerror}): give another folder."
            ) from error
        try:
            self._base = sqlite3.connect(root / "jobs.sqlite", check_same_thread=False, isolation_level=None)
            self._base.row_factory = sqlite3.Row
            self._base.execute("pragma journal_mode = wal")
            self._base.executescript(_TABLE)
            self._recover()
        except sqlite3.DatabaseError as error:
            self._alone.close()
            raise ConfigError(
                f"{str(root / 'jobs.sqlite')!r} is no table of jobs ({error}): move it away, or give another folder."
            ) from error

    def _recover(self) -> None:
        many = f"the server ended {MAX_TRIES} times while it was at work on this"
        with self._lock:
            self._write("update jobs set state = 'cancelled', ended = ? where state = 'running' and stop", time.time())
            self._write(
                "update jobs set state = 'failed', error = ?, ended = ? where state = 'running' and tries >= ?",
                many, time.time(), MAX_TRIES,
            )  # fmt: skip
            self._write("update jobs set state = 'waiting' where state = 'running'")
            known = {row["id"] for row in self._base.execute("select id from jobs")}
        for folder in (self.root / "jobs").iterdir():
            if folder.name not in known:  # the server ended before the job was in the table
                shutil.rmtree(folder, ignore_errors=True)

    def _write(self, statement: str, *values: Any) -> int:
        with self._lock:
            return self._base.execute(statement, values).rowcount

    def close(self) -> None:
        """Let go of the files."""
        with self._lock:
            self._base.close()
        self._alone.close()

    # ---- whoever asks

    def add(self, name: str, fill: Callable[[Path], None]) -> StoredJob:
        """A new job at the end of the line. fill: puts its files into its folder, before it can be begun. Raises `Full`."""
        with self._lock:
            waiting = self._base.execute("select count(*) from jobs where state = 'waiting'").fetchone()[0]
        if waiting >= self._longest:
            raise Full("too many films are waiting to be made: try again later.")
        key = secrets.token_urlsafe(12)
        folder = self.folder(key)
        folder.mkdir()
        try:
            fill(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._write("insert into jobs (id, name, created) values (?, ?, ?)", key, name, time.time())
        with self._changed:
            self._changed.notify_all()
        self.changed(key)
        found = self.get(key)
        assert found is not None
        return found

    def folder(self, key: str) -> Path:
        """Where the job's files are."""
        return self.root / "jobs" / key

    def get(self, key: str) -> StoredJob | None:
        """The job of that id, if there is one."""
        found = self._jobs("where id = ?", key)
        return found[0] if found else None

    def last(self, limit: int = 100, state: str | None = None) -> list[StoredJob]:
        """The last jobs, the newest first."""
        where, values = ("where state = ?", [state]) if state else ("", [])
        return self._jobs(f"{where} order by number desc limit ?", *values, limit)

    def waiting(self) -> list[str]:
        """Of jobs that wait, the first in the line first."""
        with self._lock:
            return [
                row["id"] for row in self._base.execute("select id from jobs where state = 'waiting' order by number")
            ]

    def _jobs(self, rest: str, *values: Any) -> list[StoredJob]:
        ahead = (
            "case state when 'waiting' then "
            "(select count(*) from jobs as o where o.state in ('waiting', 'running') and o.number < jobs.number) else 0 end"
        )
        with self._lock:
            rows = self._base.execute(f"select *, {ahead} as ahead from jobs {rest}", values).fetchall()
        jobs = [StoredJob(**row) for row in rows]
        if self.ahead is None:
            return jobs
        return [replace(job, ahead=self.ahead(job.id)) if job.state == "waiting" else job for job in jobs]

    def cancel(self, key: str) -> None:
        """Take it out of the line, or have it stop at its next step; what is over stays as it is."""
        with self._lock:
            self._write("update jobs set stop = 1 where id = ? and state = 'running'", key)
            self._write(
                "update jobs set state = 'cancelled', ended = ? where id = ? and state = 'waiting'", time.time(), key
            )
        self.changed(key)

    # ---- whoever works

    def next(self, timeout: float) -> StoredJob | None:
        """Begin the first job in the line; None where there is none for so many seconds."""
        with self._changed:
            job = self._begin()
            if job is None:
                self._changed.wait(timeout)
                job = self._begin()
            return job

    def _begin(self) -> StoredJob | None:
        with self._lock:
            first = self._base.execute("select id from jobs where state = 'waiting' order by number limit 1").fetchone()
            return self.begin(first["id"]) if first else None

    def begin(self, key: str) -> StoredJob | None:
        """Begin a job, unless it does not wait any more."""
        begun = "update jobs set state = 'running', tries = tries + 1 where id = ? and state = 'waiting'"
        return self.get(key) if self._write(begun, key) else None

    def progress(self, key: str, stage: str, step: int, steps: int) -> bool:
        """Note how far it is; whether it is to stop."""
        with self._lock:
            self._write("update jobs set stage = ?, step = ?, steps = ? where id = ?", stage, step, steps, key)
            return bool(self._base.execute("select stop from jobs where id = ?", (key,)).fetchone()[0])

    def end(self, key: str, state: str, error: str = "") -> None:
        """It is over: done, failed or cancelled. Raises `ValueError` where it was over already."""
        changed = self._write(
            "update jobs set state = ?, error = ?, ended = ? where id = ? and state = 'running'", state, error, time.time(), key
        )  # fmt: skip
        if changed != 1:
            raise ValueError(f"the job {key!r} is not running, so it cannot end.")

    def tidy(self, hours: float = KEPT_HOURS) -> None:
        """Forget jobs that were over so long ago, and remove their files."""
        with self._lock:
            old = self._jobs("where ended < ?", time.time() - 3600 * hours)
            for job in old:
                self._write("delete from jobs where number = ?", job.number)
        for job in old:
            shutil.rmtree(self.folder(job.id), ignore_errors=True)
