"""Which outputs would replace an input, or each other."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import OutputError
from .folders import FRAME_NAME
from .places import PathLike, same_place


def writes_over(out: PathLike, file: PathLike) -> bool:
    """Whether writing to `out` replaces that file, which may be a frame in a folder of frames."""
    there = Path(file)
    in_folder = not Path(out).suffix and same_place(there.parent, out) and FRAME_NAME.fullmatch(there.name) is not None
    return same_place(out, file) or in_folder


def first_over(outs: Sequence[PathLike], files: Iterable[PathLike]) -> PathLike | None:
    """The first output that `writes_over` one of the files; quick also where there are thousands of both."""
    reals: set[object] = set()
    frames_in = set()
    for file in files:
        reals |= _identity(file)
        if FRAME_NAME.fullmatch(Path(file).name):
            frames_in |= _identity(Path(file).parent)
    for out in outs:
        mine = _identity(out)
        if mine & reals or (not Path(out).suffix and mine & frames_in):
            return out
    return None


def _identity(place: PathLike) -> set[object]:
    """What a file or folder is known by: its real path, and what the disk calls it."""
    found: set[object] = {os.path.realpath(place)}
    with suppress(OSError):
        about = os.stat(place)
        found.add((about.st_dev, about.st_ino))
    return found


def check_apart(outputs: Sequence[tuple[PathLike, bool]]) -> None:
    """Raise `OutputError` where one of these outputs would replace another, or lie in one that is a file.

    outputs: each with whether it is a folder.
    """
    folders: dict[str, bool] = {}
    for place, is_folder in outputs:
        real = os.path.realpath(place)
        if real in folders or (len(outputs) < 10 and any(same_place(place, other) for other in folders)):
            raise OutputError(f"output {str(place)!r} is asked for twice: choose another name.")
        folders[real] = is_folder
    for place, _ in outputs:
        real = os.path.realpath(place)
        for other in map(str, Path(real).parents):
            if folders.get(other) is False:
                raise OutputError(
                    f"output {str(place)!r} would be in {other!r}, which is to be a file: choose another."
                )
        if folders.get(os.path.dirname(real)) and FRAME_NAME.fullmatch(os.path.basename(real)):
            raise OutputError(f"output {str(place)!r} would be among the frames of another: choose another name.")
