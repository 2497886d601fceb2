"""Folders of frames: `frame_0000.png`, `frame_0001.png`, ...; frames of others are never replaced or removed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..errors import OutputError
from .atomic import exchanged, temporary
from .places import landing

#: Key of the settings in PNG files, and by that the mark that a frame is this program's own. Elsewhere the settings are a
#: video's or gif's `comment`, or a webp's EXIF ImageDescription.
PNG_KEY = "diffmorpher"
FRAME_NAME = re.compile(r"frame_\d{4,}\.png")


def save_folder(pictures: Iterable[Image.Image], path: Path, settings: str | None) -> None:
    """Write frames as they come, with their settings, and put them in the place of an earlier film's; nothing else is touched.

    Raises `OutputError` for frames of others, `OSError`; the folder is then as it was.
    """
    path = landing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Inside a folder that stays, as that may be a mount of its own, across which nothing can be moved.
    with temporary(path if _must_stay(path) else path.parent, is_folder=True) as part:
        for i, picture in enumerate(pictures):
            write_png(picture, part / f"frame_{i:04d}.png", settings)
        with suppress(OSError):  # it is there already, perhaps since another run has made it
            os.replace(part, path)
            return
        check_frames_are_ours(path)
        if not _must_stay(path):
            shutil.copymode(path, part)
            if exchanged(part, path):
                return
        _replace_frames(path, part)


def _must_stay(folder: Path) -> bool:
    """Whether a folder holds more than frames, or cannot be moved: then its frames change one by one."""
    if not folder.is_dir():
        return False
    others = any(not FRAME_NAME.fullmatch(name) for name in os.listdir(folder))
    return others or os.path.ismount(folder) or not os.access(folder.parent, os.W_OK | os.X_OK)


def _replace_frames(folder: Path, part: Path) -> None:
    """Move the frames in `part` to the folder, in place of those there; these are back if it fails."""
    old, new = frame_files(folder), frame_files(part)
    aside = part / "old"
    aside.mkdir()
    moves = [(file, aside / file.name) for file in old] + [(file, folder / file.name) for file in new]
    done: list[tuple[Path, Path]] = []
    try:
        for move in moves:
            done.append(move)
            os.replace(*move)
    except BaseException:
        for source, target in reversed(done):
            if target.exists():
                os.replace(target, source)
        raise


def check_frames_are_ours(folder: Path) -> None:
    """Raise `OutputError` for frames that this program did not write, which a film in that folder would replace."""
    if not folder.is_dir():
        return
    for file in frame_files(folder):
        if not _is_ours(file):
            raise OutputError(
                f"Output {str(folder)!r} holds {file.name}, which is no frame of this program and would be lost: "
                "give another folder."
            )


def _is_ours(frame: Path) -> bool:
    """Whether a frame carries this program's mark, its key for settings."""
    try:
        with Image.open(frame, formats=["PNG"]) as image:
            return not frame.is_symlink() and image.format == "PNG" and PNG_KEY in image.info
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def frame_files(folder: Path) -> list[Path]:
    """The frames in a folder, whoever made them, in order."""
    return sorted(file for file in folder.iterdir() if FRAME_NAME.fullmatch(file.name))


def write_png(picture: Image.Image, file: Path, settings: str | None) -> None:
    """Write a picture with settings, a JSON text."""
    picture.save(file, format="PNG", pnginfo=png_info(settings))


def png_info(settings: str | None) -> PngInfo:
    """Settings, a JSON text, as a PNG file holds them."""
    info = PngInfo()
    info.add_text(PNG_KEY, "null" if settings is None else settings)  # also the mark that a frame is ours
    return info
