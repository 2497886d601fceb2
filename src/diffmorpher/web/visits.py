"""A visitor of the page: his pictures, and what his last run left."""

from __future__ import annotations

import math
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..files.films import read_settings
from ..recipe import Recipe
from .line import Job

if TYPE_CHECKING:
    from ..result import MorphResult


def video_suffix(result: MorphResult) -> str:
    """Of the file that the page plays: one that keeps transparency where there is any."""
    return ".webm" if result.frames[0].mode == "RGBA" else ".mp4"


@dataclass(frozen=True)
class Picture:
    """A visitor's picture: the name it came with, and the copy in the visitor's folder."""

    name: str
    file: Path


@dataclass
class Film:
    """What a visitor's last run left: the frames, the path to sample more from, the files to download."""

    result: MorphResult
    recipe: Recipe
    name: str
    command: str
    folder: Path
    seconds: float = 0.0
    cut: str = ""  # a sentence on what was cut off the pictures
    made_of: str = ""  # digest of all that the frames depend on
    again: bool = False  # only the file was written again, from the frames of the film before

    @property
    def video(self) -> Path:
        return self.folder / f"{self.name}{video_suffix(self.result)}"

    @property
    def metadata(self) -> dict[str, object]:
        """The settings as anyone reads them from the film."""
        return read_settings(self.video) or {}

    def kept(self) -> KeptFilm:
        """What stays of it when another film was made; the rest is removed."""
        recipe = self.folder / f"{self.name}.toml"
        if self.command:
            self.recipe.write(recipe)
        for file in self.folder.iterdir():
            if file not in (self.video, recipe):
                file.unlink(missing_ok=True) if file.is_file() else shutil.rmtree(file, ignore_errors=True)
        about = f"{len(self.result.frames)} frames, {self.result.length:.1f} s"
        return KeptFilm(self.video, recipe if self.command else None, self.result.frames[0], about)


@dataclass(frozen=True)
class KeptFilm:
    """An earlier film of the visit. poster: its first frame; about: a few words."""

    video: Path
    recipe: Path | None
    poster: Image.Image
    about: str


@dataclass
class Session:
    """One visitor. The folder's name is secret: whoever knows it can read what lies in it."""

    folder: Path
    pictures: list[Picture] = field(default_factory=list)
    jobs: dict[str, Job] = field(default_factory=dict)  # the last one of each kind: "morph", "frame"
    film: Film | None = None
    earlier: list[KeptFilm] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)  # as they stood when a film was last asked for
    values: dict[str, Any] = field(default_factory=dict)  # of the page's fields, then
    uploads: list[tuple[Path, int]] = field(default_factory=list)  # files elsewhere, with their inodes
    until: float = math.inf  # of `time.monotonic`: a program that is not heard of again goes then
    closed: bool = False
    ending: threading.Timer | None = None  # set while nobody looks at the page
    _films: int = 0

    def new_folder(self) -> Path:
        self._films += 1
        folder = self.folder / f"film-{self._films}"
        folder.mkdir(parents=True)
        return folder

    def written(self, write: Callable[[], Path]) -> Path:
        """What `write` writes into the folder; if the visitor leaves meanwhile, it goes too."""
        try:
            return write()
        finally:
            if self.closed:
                shutil.rmtree(self.folder, ignore_errors=True)
