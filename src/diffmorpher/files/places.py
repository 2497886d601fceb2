"""Where files are: outputs that cannot work, or would destroy an input, are refused before the work and not after it."""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
from pathlib import Path

from ..errors import OutputError

PathLike = str | os.PathLike[str]

#: Addresses, whose two slashes `Path` makes one of. A folder may be called "10:30", and a drive "C:".
_ADDRESS = re.compile(r"(https?|s?ftps?|file|s3|gs|ssh|rtmp):/", re.IGNORECASE)
#: Of one name, and of a whole path with room for what is written in a folder, on the systems there are.
MOST_BYTES, MOST_BYTES_IN_ALL = 255, 4000
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
        _check_lengths(path, said)
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
        with tempfile.TemporaryFile(dir=folder) as made:
            mode = os.fstat(made.fileno()).st_mode
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(
            f"{said} cannot be written: {str(folder)!r} takes no files ({reason}); choose another."
        ) from error
    if not mode & stat.S_IWUSR and getattr(os, "geteuid", int)() != 0:
        raise OutputError(f"{said} cannot be written: new files get no right to be written; set another umask.")


def _check_lengths(path: Path, said: str) -> None:
    """Names and the path as a whole must be such as the system can have: what is not there yet says nothing of that."""
    longest = max(len(os.fsencode(part)) for part in path.parts or ("",))
    if longest > MOST_BYTES or len(os.fsencode(path.absolute())) > MOST_BYTES_IN_ALL:
        raise OutputError(f"{said:.120} is too long: a name can have {MOST_BYTES} bytes, and all {MOST_BYTES_IN_ALL}.")


def is_plain(path: PathLike) -> bool:
    """Whether something that is there can be read as a file, and not as a pipe, which may never say anything."""
    return not os.path.exists(path) or os.path.isfile(path)


def same_place(one: PathLike, other: PathLike) -> bool:
    """Whether two names mean one file or folder, be it there or not."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    try:
        return os.path.samefile(one, other)  # names that differ in case, where that makes no difference
    except OSError:
        return False
