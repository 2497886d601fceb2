"""Makes films, one at a time, with one model in memory: in this process, or as the worker of an actor on a cluster."""

from __future__ import annotations

import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Cancelled, DiffMorpherError
from ..files.atomic import replacing
from ..files.cache import default_cache
from ..gather import gather
from ..progress import ProgressCallback, say
from ..recipe import Recipe
from .desk import Desk, Part, make_part

if TYPE_CHECKING:
    from ..config import SampleConfig
    from ..morpher import Morpher
    from ..path import MorphPath
    from ..result import MorphResult


class Model:
    """The one model in memory: two may not fit. device: in place of what a recipe says."""

    def __init__(self, device: str | None = None) -> None:
        self.morpher: Morpher | None = None
        self._device = device
        self._of: dict[str, Any] = {}
        #: Called before the model goes, by those who hold what refers to it.
        self.leaving: list[Callable[[], None]] = []

    def load(self, recipe: Recipe) -> Morpher:
        """The recipe's model, loaded once; another one takes its place. Raises `ModelError`."""
        if self.morpher is None or self._of != recipe.loading():
            from ..morpher import Morpher
            from ..progress import quiet_bars

            quiet_bars()
            for let_go in self.leaving:
                let_go()
            self.morpher = None
            how = recipe.loading() | ({"device": self._device} if self._device else {})
            morpher = Morpher.from_pretrained(**how, cache=default_cache())
            self.hold(morpher, recipe)
            return morpher
        return self.morpher

    def hold(self, morpher: Morpher, recipe: Recipe) -> None:
        """Take one that was loaded already for the recipe's."""
        self.morpher, self._of = morpher, recipe.loading()


class Maker:
    """A model, and the films that are made with it.

    ahead: how many make a film's frames. device: in place of what a recipe says.
    """

    def __init__(self, ahead: int = 1, device: str | None = None, model: Model | None = None) -> None:
        self.model, self._ahead = model or Model(device), ahead
        self._desk, self._recipe, self._name = Desk(ahead), Recipe(), ""
        self._progress = ("", 0, 0)
        self._known = -1
        self._learned: tuple[MorphPath, SampleConfig] | None = None

    # ---- films

    def film(self, recipe: Recipe, out: Path) -> MorphResult | str:
        """Make a batch's film and write it: its figures, or why there is none."""
        started = time.perf_counter()
        self._begin(str(out))
        try:
            self._recipe = recipe
            recipe, pictures = gather(recipe)
            morpher = self.model.load(recipe)
            loaded = time.perf_counter()
            result = morpher.make(recipe, pictures, self._note, helpers=self._helpers)
            result.save(out)
        except DiffMorpherError as error:
            return str(error)
        work = sum(seconds for stage, seconds in result.seconds.items() if stage != "load")
        seconds = {"load": loaded - started, "save": max(0.0, time.perf_counter() - loaded - work)}
        return replace(result, frames=[], path=_Loop(result.path.loop), seconds=result.seconds | seconds)  # type: ignore[arg-type]

    def job(self, folder: Path) -> Exception | None:
        """Make the film of the recipe in a job's folder, into it; what went wrong, if anything did."""
        self._begin(folder.name)
        try:
            self.make_job(folder, self._note)
        except Exception as error:
            import traceback

            if not isinstance(error, Cancelled):
                say(traceback.format_exc())
            return error
        return None

    def make_job(self, folder: Path, progress: ProgressCallback) -> None:
        """Make film.mp4 and frames.zip of recipe.toml. Raises what goes wrong."""
        progress("load", 0, 1)
        recipe, pictures = gather(Recipe.read(folder / "recipe.toml"))
        self._recipe = recipe
        result = self.model.load(recipe).make(recipe, pictures, progress, helpers=self._helpers)
        progress("save", 0, 1)
        result.save(folder / "film.mp4")
        with replacing(folder / "frames.zip") as part:
            _zip(result, part)

    def _begin(self, name: str) -> None:
        """Another film is at work, and what is said of the last one comes too late."""
        self._desk, self._name, self._progress = Desk(self._ahead), name, ("", 0, 0)

    @property
    def _helpers(self) -> Desk | None:
        return self._desk if self._ahead > 1 else None

    def _note(self, stage: str, done: int, total: int) -> None:
        self._progress = stage, done, total
        self._desk.check_stopped()

    # ---- what the dispatcher asks of whoever makes a film, from other threads; name: of its task

    def look(self) -> tuple[str, int, int, int]:
        """(stage, done, total) of the film at work, and how many parts of it nobody is at."""
        return (*self._progress, self._desk.spare)

    def stop(self, name: str) -> None:
        """Have it end at its next step."""
        if name == self._name:
            self._desk.stop()

    def shared(self, name: str) -> tuple[Recipe, bytes, SampleConfig] | None:
        """What others must know to make parts of it; None where it is over."""
        desk, recipe = self._desk, self._recipe
        if name != self._name or desk.path is None or desk.config is None:
            return None
        with tempfile.TemporaryDirectory() as folder:
            return recipe, desk.path.save(Path(folder) / "film.morph").read_bytes(), desk.config

    def take(self, name: str, token: int) -> Part | None:
        return self._desk.take(token) if name == self._name else None

    def bring(self, token: int, made: Any) -> None:
        self._desk.bring(token, made)

    def give_back(self, token: int) -> None:
        self._desk.bring(token, None)

    # ---- and of whoever helps

    def knows(self, number: int) -> bool:
        """Whether the film of that number is the one that was learned last."""
        return self._known == number

    def learn(self, number: int, recipe: Recipe, path: bytes, config: SampleConfig) -> None:
        """Be ready to make parts of another's film."""
        from ..path import MorphPath

        morpher = self.model.load(recipe)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "film.morph").write_bytes(path)
            self._learned = MorphPath.load(Path(folder) / "film.morph", morpher), config
        self._known = number

    def make_part(self, kind: str, value: Any) -> Any:
        """Make a part of the film that was learned."""
        assert self._learned
        return make_part(*self._learned, (kind, value))


class _Loop:
    """All that a film's figures ask of its path."""

    def __init__(self, loop: bool) -> None:
        self.loop = loop


def _zip(result: MorphResult, file: Path) -> None:
    """The frames as numbered PNG files, each with the film's settings."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as pack:
        for frame in sorted(result.save(Path(folder) / "frames").iterdir()):
            pack.write(frame, frame.name)
