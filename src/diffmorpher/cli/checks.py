"""What the command line checks before a model is loaded: each mistake raises a `UserError` within a second."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import ConfigError, OutputError
from ..files.films import check_output, writes_over


def check_port(port: int | None) -> None:
    if port is not None and not 1 <= port <= 65535:
        raise ConfigError(f"the port is {port}, but must be a whole number from 1 to 65535.")


def parse_auth(text: str | None) -> tuple[str, str] | None:
    """ "name:password" as a pair; None stays None. The message does not repeat what may be a password."""
    if text is None:
        return None
    user, _, password = text.partition(":")
    if not user or not password:
        raise ConfigError("--auth needs a name and a password with a colon between them, such as ann:secret.")
    return user, password


def check_loras(files: Sequence[str]) -> None:
    """Read them once, as far as that goes without the model; imports torch if there are any."""
    for file in files:
        from ..files.loras import load_lora

        load_lora(file)


def check_outputs(
    out: Path | None, frames: Path | None, path: Path | None, recipe: Path | None, inputs: Mapping[str, Sequence[Path]]
) -> None:
    """Can the film, the folder of frames, the path file and the recipe be written, each in a place of its own?

    inputs: files that must stay, by what they are.
    """
    if out is not None:
        check_output(out)
    if frames is not None:
        if frames.suffix:
            raise OutputError(f"--save-frames {str(frames)!r} is a folder's name, which must not have a suffix here.")
        check_output(frames)
    if path is not None:
        check_file(path)
    if recipe is not None:
        check_file(recipe)
    taken = {file: what for what, files in inputs.items() for file in files}
    asked: set[Path] = set()
    for place in (out, frames, path, recipe):
        if place is not None:
            for file, what in taken.items():
                if writes_over(place, file):
                    how = "is" if place.resolve() == file.resolve() else f"would write over {str(file)!r},"
                    raise OutputError(f"output {str(place)!r} {how} {what}: choose another name.")
            if place.resolve() in asked:
                raise OutputError(f"output {str(place)!r} is asked for twice: choose another name.")
            asked.add(place.resolve())


def check_file(file: Path) -> None:
    """Can a file be written there? Folders on the way may be missing."""
    try:
        if not file.name or file.is_dir():
            raise OutputError(f"output {str(file)!r} is a folder: give a file name.")
        nearest = next(folder for folder in file.parents if os.path.lexists(folder))
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise OutputError(f"output {str(file)!r} cannot be written: {str(nearest)!r} is no writable folder.")
    except OSError as error:
        raise OutputError(f"output {str(file)!r} cannot be written ({error.strerror}): choose another.") from error
