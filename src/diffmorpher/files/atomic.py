"""Writing so that a file is there whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import WriteError
from .places import landing

try:
    import fcntl
except ImportError:  # Windows, where an open file could not be moved either: leftovers stay
    fcntl = None  # type: ignore[assignment]

_PART = re.compile(r"\.diffmorpher-[0-9a-f]{8}\.part")
#: Errors of a place that is full: on a disk, of a quota, of the largest file that is allowed (`ulimit -f`).
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HERE, _SWAP = -100, 2  # AT_FDCWD of Linux; RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS


def file_hash(file: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def temporary(folder: Path, *, is_folder: bool = False) -> Iterator[Path]:
    """An empty file, or folder, of a free name in `folder`; what still bears that name at the end is removed.

    It is locked as long as its process lives: what a killed one left behind is known by that, and removed by the next.
    """
    remove_leftovers(folder)
    path, lock = _new(folder, is_folder)
    try:
        yield path
    finally:
        _remove(path)
        if lock is not None:
            os.close(lock)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write to, which takes `path`'s place if the block ends well. Parent folders are made.

    Where `path` is a symbolic link, what it leads to is written.
    """
    path = landing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary(path.parent) as part:
        rights = stat.S_IMODE(part.stat().st_mode)
        yield part
        if stat.S_IMODE(part.stat().st_mode) != rights:  # safetensors puts a file of its own there
            part.chmod(rights)
        os.replace(part, path)


def exchanged(one: Path, other: Path) -> bool:
    """Whether two folders have taken each other's place, in one step that nothing can interrupt; else all is as it was."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        names = os.fsencode(one), os.fsencode(other)
        if sys.platform == "darwin":
            return libc.renamex_np(*names, _SWAP) == 0
        return libc.renameat2(_HERE, names[0], _HERE, names[1], _SWAP) == 0
    except (OSError, AttributeError, TypeError):  # a system that has no such call
        return False


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed have left there half-written; what others are at work on stays."""
    for name in os.listdir(folder) if fcntl else ():
        if _PART.fullmatch(name):
            with suppress(OSError):
                _remove_unlocked(folder / name)


def cannot_write(what: str, error: Exception) -> WriteError:
    """The error for what could not be written, with the true reason and what helps.

    what: begins the sentence, such as "Output 'a.mp4'".
    """
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"os error (\d+)", str(error))):  # safetensors says it in words alone
        number = int(found[1])
    reason = os.strerror(number) if number in _FULL else getattr(error, "strerror", None) or str(error)
    advice = "free some space or choose another place" if number in _FULL else "choose another place"
    return WriteError(f"{what} cannot be written ({reason or type(error).__name__}): {advice}.")


def _new(folder: Path, is_folder: bool) -> tuple[Path, int | None]:
    """A new name, and an open file that holds its lock."""
    while True:
        path = folder / f".diffmorpher-{secrets.token_hex(4)}.part"
        if is_folder:
            path.mkdir()
        else:
            path.touch(exist_ok=False)
        if fcntl is None:
            return path, None
        with suppress(FileNotFoundError):  # another process may take it for a leftover before it is locked
            try:
                lock = os.open(path, os.O_RDONLY)
            except PermissionError:  # umask 777
                path.rmdir() if is_folder else path.unlink()
                raise
            _locked(lock, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(lock), os.stat(path)):
                return path, lock
            os.close(lock)


def _locked(file: int, how: int) -> bool:
    """Whether an open file could be locked, until it is closed or its process ends."""
    try:
        fcntl.flock(file, how)
    except OSError:  # another's, or a file system that has no locks: then nothing is ever taken for a leftover
        return False
    return True


def _remove_unlocked(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        if _locked(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
            _remove(path)
    finally:
        os.close(file)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
