"""Where files are: outputs that cannot work, or would destroy an input, are refused before the work and not after it."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from pathlib import Path

from ..errors import OutputError

PathLike = str | os.PathLike[str]

#: Addresses, whose two slashes `Path` makes one of. A folder may be called "10:30", and a drive "C:".
_ADDRESS = re.compile(r"(https?|s?ftps?|file|s3|gs|ssh|rtmp):/", re.IGNORECASE)
_MOST_LINKS = 40  # on the way from one symbolic link to the next, as Linux has it


def expanded(place: PathLike) -> Path:
    """The path with a `~` at its start as the home folder, which a shell leaves alone in `--out=~/film.mp4`."""
    return Path(os.path.expanduser(place))


def is_address(place: PathLike) -> bool:
    """Whether it names something on another machine, or a file as a browser does."""
    return _ADDRESS.match(str(place)) is not None


def as_file(path: PathLike) -> str:
    """The path for FFmpeg, to which a colon in it makes it an address."""
    return f"file:{os.fspath(path)}"


def landing(path: Path) -> Path:
    """Where what is written to `path` lands: behind symbolic links. Raises `OSError` for one that leads to itself."""
    for _ in range(_MOST_LINKS):
        if not path.is_symlink():
            return path
        path = path.parent / os.readlink(path)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def check_place(out: PathLike, *, folder: bool = False) -> Path:
    """The path `out`, after a look at whether a file (or a folder of files) can be made there. It leaves nothing there.

    Folders on the way may be missing. Raises `OutputError`.
    """
    path, said = Path(out), f"output {str(out)!r}"
    if str(out) == "-":
        raise OutputError(f"{said} is no place: films are not written to standard output; give a file name.")
    if is_address(out):
        raise OutputError(f"{said} is an address: give the name of a file or folder on this machine.")
    try:
        path = landing(path)
        if not folder and path.is_dir():
            raise OutputError(f"{said} is a folder: give a file name in it, or another name.")
        if not folder and os.path.lexists(path) and not path.is_file():
            raise OutputError(f"{said} is no plain file, which could be written anew: give another name.")
        nearest = next(each for each in ([path, *path.parents] if folder else path.parents) if os.path.lexists(each))
        if not nearest.is_dir():
            raise OutputError(f"{said} cannot be created: {str(nearest)!r} is not a folder; choose another.")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise OutputError(f"{said} cannot be written: {str(nearest)!r} is read-only; choose another.")
        _try(nearest, said)
    except OSError as error:
        raise OutputError(f"{said} cannot be written ({error.strerror or error}): choose another place.") from error
    return Path(out)


def _try(folder: Path, said: str) -> None:
    """Make a nameless file there: rights do not say that files can be made, as in /proc."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(
            f"{said} cannot be written: {str(folder)!r} takes no files ({reason}); choose another."
        ) from error


def same_place(one: PathLike, other: PathLike) -> bool:
    """Whether two names mean one file or folder, be it there or not."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    try:
        return os.path.samefile(one, other)  # names that differ in case, where that makes no difference
    except OSError:
        return False
