"""What a reader must not do with any file: raise what is not this project's own, hang, fill memory, start or write anything."""

from __future__ import annotations

import os
import signal
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffmorpher.errors import DiffMorpherError

MOST_SECONDS = 5.0
MOST_BYTES = 2**30


class Bad(Exception):
    """A reader has done what none may."""


class _Hang(BaseException):
    """Of no type that a reader would catch."""


_STARTS = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.spawn", "pty.spawn",
    "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request", "webbrowser.open",
    "pickle.find_class", "ctypes.dlopen", "os.kill", "shutil.rmtree",
)  # fmt: skip
_CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")

_watched: dict[str, Any] = {"folder": None, "seen": []}
_hooked: list[bool] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    folder = _watched["folder"]
    if folder is None:
        return
    if event in _STARTS:
        _watched["seen"].append(f"{event} {arguments!r:.200}")
    elif event == "exec" and isinstance(arguments[0], types.CodeType):
        # Modules that are imported when they are first needed lie in files; namedtuples and dataclasses of theirs do not.
        name = arguments[0].co_filename
        if not os.path.isfile(name) and not name.startswith("<frozen") and not _importing():
            _watched["seen"].append(f"exec of {name!r}")
    elif event == "open":
        path, mode, flags = arguments
        writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (
            isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if writes and not _inside(path, folder) and path not in (os.devnull, "/dev/null"):
            _watched["seen"].append(f"open {path!r} to write")
    elif event in _CHANGES and not _inside(arguments[0], folder):
        _watched["seen"].append(f"{event} {arguments[0]!r}")


def _importing() -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if "importlib" in frame.f_code.co_filename:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _inside(path: Any, folder: str) -> bool:
    if isinstance(path, int):
        return True  # a file that is open already
    return f"{os.path.realpath(os.fsdecode(path))}{os.sep}".startswith(folder + os.sep)


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """While open, what is started, and written outside `folder`, is listed."""
    if not _hooked:
        sys.addaudithook(_audit)  # for as long as the process lives: there is no way to take one off
        _hooked.append(True)
    seen: list[str] = []
    _watched.update(folder=os.path.realpath(folder), seen=seen)
    try:
        yield seen
    finally:
        _watched["folder"] = None


def peak_memory() -> int:
    """The most bytes that the process had since the last `reset_peak`; 0 where no Linux says."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def reset_peak() -> int:
    """Begin to measure anew; returns what there is now."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def attempt(
    read: Callable[[Path], Any], file: Path, folder: Path, seconds: float = MOST_SECONDS, size: int = MOST_BYTES
) -> bool:
    """Whether the file was read; False where it was refused. Raises `Bad` for anything else that comes of it."""

    def hang(number: int, frame: Any) -> None:
        raise _Hang

    before = reset_peak()
    handler = signal.signal(signal.SIGVTALRM, hang)  # of processor time: a busy neighbour is no hang
    begun = time.process_time()
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    problem = ""
    works = False
    try:
        with watched(folder) as seen, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(file)
        works = True
    except DiffMorpherError as error:
        if not str(error).strip() or "\n" in str(error).strip():
            problem = f"says {str(error)!r:.300}, which is no sentence"
    except _Hang:
        problem = f"works for more than {seconds} s"
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        problem = f"raises {type(error).__name__}: {error!s:.300}"
        raise Bad(problem) from error
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
    if time.process_time() - begun > seconds:
        problem = problem or f"works for {time.process_time() - begun:.1f} s"
    if (grown := peak_memory() - before) > size:
        problem = problem or f"takes {grown / 2**20:.0f} MiB"
    if seen:
        problem = "; ".join(seen[:3])
    if problem:
        raise Bad(problem)
    return works
