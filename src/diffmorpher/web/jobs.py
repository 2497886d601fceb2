"""What the page does behind its face: visitors and their pictures, one line of jobs, one model, prepared paths.

Nothing here knows of gradio. Jobs run one after another in one thread, whoever asked for them; a visitor reads the state
of his job and may cancel it, which stops it within one step.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..config import stretches_and_gaps
from ..errors import ConfigError, DiffMorpherError, ImageError, UserError
from ..files.films import read_settings
from ..files.pictures import image_hash, load_image
from ..gather import same_neighbours
from ..models.catalog import check_model
from ..progress import ProgressCallback
from ..recipe import Recipe, film_name
from .line import Job, Line, Work
from .settings import MAX_PICTURES, MAX_PROMPT, different_names

if TYPE_CHECKING:
    from ..files.loras import Lora
    from ..morpher import Morpher
    from ..path import MorphPath
    from ..result import MorphResult

#: Limits of a picture on the page, and of a path or LoRA file.
MAX_PICTURE_BYTES, MAX_PICTURE_PIXELS, MAX_FILE_BYTES = 25 * 2**20, 50_000_000, 256 * 2**20
#: Prepared paths that are kept, the last used ones.
KEPT_PATHS = 4


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

    @property
    def video(self) -> Path:
        return self.folder / f"{self.name}.mp4"

    @property
    def metadata(self) -> dict[str, object]:
        """The settings as anyone reads them from the film."""
        return read_settings(self.video) or {}


@dataclass
class Session:
    """One visitor. The folder's name is secret: whoever knows it can read what lies in it."""

    folder: Path
    pictures: list[Picture] = field(default_factory=list)
    jobs: dict[str, Job] = field(default_factory=dict)  # the last one of each kind: "morph", "frame"
    film: Film | None = None
    uploads: list[Path] = field(default_factory=list)
    closed: bool = False
    _films: int = 0

    def new_folder(self) -> Path:
        self._films += 1
        folder = self.folder / f"film-{self._films}"
        folder.mkdir(parents=True)
        return folder


class Studio:
    """One process's visitors, model and prepared paths. root: a folder of its own, emptied by `close`."""

    def __init__(self, root: Path, models: set[str] | None = None) -> None:
        """models: the only ones that visitors may choose; None for any that can be loaded."""
        self.root, self.line, self._models = root, Line(), models
        self.own = Session(root)  # holds what must stay
        self._sessions: dict[str, Session] = {}
        self._uploads: Counter[Path] = Counter()  # files of the upload folder, by how many visitors hold them
        self._lock = threading.Lock()
        self._morpher: Morpher | None = None
        self._model = ""
        self._paths: OrderedDict[str, MorphPath] = OrderedDict()

    # ---- visitors

    def session(self, key: str) -> Session:
        """The visitor of that key, who may be new."""
        with self._lock:
            if key not in self._sessions:
                folder = self.root / "sessions" / secrets.token_urlsafe(24)
                folder.mkdir(parents=True, mode=0o700)
                self._sessions[key] = Session(folder)
            return self._sessions[key]

    def end(self, key: str) -> None:
        """Cancel the visitor's job and remove all files of his."""
        with self._lock:
            session = self._sessions.pop(key, None)
        if session is None:
            return
        session.closed = True
        for job in session.jobs.values():
            job.cancel()
        shutil.rmtree(session.folder, ignore_errors=True)
        for file in session.uploads:
            self._release(file)

    def close(self) -> None:
        """Everything ends; the folder is removed."""
        for key in list(self._sessions):
            self.end(key)
        shutil.rmtree(self.root, ignore_errors=True)

    def hold(self, session: Session, file: Path) -> None:
        """A file outside the visitor's folder that must go when he goes. Equal files of several visitors are one file."""
        with self._lock:
            session.uploads.append(file)
            self._uploads[file] += 1

    def _release(self, file: Path) -> None:
        with self._lock:
            self._uploads[file] -= 1
            if self._uploads[file] > 0:
                return
            del self._uploads[file]
        file.unlink(missing_ok=True)

    def add_picture(self, session: Session, upload: Path, ours: bool = False) -> Picture:
        """Check a picture and copy it into the visitor's folder; ours: not an upload. Raises `ImageError`."""
        if not ours:
            self.hold(session, upload)
        if len(session.pictures) >= MAX_PICTURES:
            raise ImageError(f"There are {MAX_PICTURES} pictures already: remove one first.")
        check_picture(upload)
        name = different_names([*(picture.name for picture in session.pictures), upload.name])[-1]
        file = session.folder / f"{secrets.token_hex(4)}{upload.suffix}"
        shutil.copyfile(upload, file)
        session.pictures.append(Picture(name, file))
        return session.pictures[-1]

    # ---- the model

    def load(self, model: str) -> Morpher:
        """The model, loaded once; another one takes its place. To be called by a job alone. Raises `ModelError`."""
        if self._morpher is None or self._model != model:
            from ..morpher import Morpher
            from ..progress import quiet_bars

            quiet_bars()
            self._paths.clear()
            for session in list(self._sessions.values()):
                if session.film is not None:
                    session.film = None  # its path holds the old model, and two may not fit into memory
            self._morpher = None
            self._morpher, self._model = Morpher.from_pretrained(model), model
        return self._morpher

    def check_model(self, model: str) -> None:
        """Raises `ConfigError` for a model that may not be chosen here, `ModelError` for what is none."""
        if self._models is not None and model not in self._models:
            raise ConfigError(f"the model {model!r} cannot be chosen here; take one of {', '.join(self._models)}.")
        check_model(model)

    def warm_up(self, model: str = "mini") -> None:
        """Load the model before anyone waits for it, unless somebody is quicker."""
        self.line.submit(lambda _: self._morpher or self.load(model))

    # ---- jobs

    def morph(
        self,
        session: Session,
        recipe: Recipe,
        pictures: Sequence[Picture],
        prompts: Sequence[str],
        *,
        loras: Sequence[Path] = (),
        path_file: Path | None = None,
    ) -> Job:
        """Put a film into the line; what cannot work is said at once. The result is a `Film`. Raises `UserError`."""
        self.check_model(recipe.model)
        if loras and recipe.fit is None:
            raise ConfigError("LoRA files and a film without LoRA contradict each other: leave one out.")
        images: list[Image.Image] = []
        if path_file is None:
            names = different_names([picture.name for picture in pictures])
            recipe = replace(
                recipe,
                pictures=tuple(names),
                prompts=tuple(" ".join(prompt.split())[:MAX_PROMPT] for prompt in prompts),
                loras=tuple(lora.name for lora in loras),
            )
            recipe.check()
            images = [load_image(picture.file) for picture in pictures]
            hashes = tuple(image_hash(image) for image in images)
            if same := same_neighbours(hashes, recipe.loop):
                one, other = (pictures[i].name for i in same)
                raise ImageError(f"{one!r} and {other!r} are the same picture: give two that differ.")
            recipe = replace(recipe, picture_hashes=hashes)
        for file in (*loras, *([path_file] if path_file else [])):
            _check_bytes(file, MAX_FILE_BYTES)

        def work(progress: ProgressCallback) -> Film:
            started = time.monotonic()
            progress("load", 0, 1)
            morpher = self.load(recipe.model)
            progress("load", 1, 1)
            if path_file is not None:
                path, name, command = _load_path(path_file, morpher, recipe), path_file.stem, ""
            else:
                path = self._prepare(morpher, recipe, images, loras, progress)
                name, command = film_name(recipe.pictures), recipe.command()
            path.settings |= {"fps": recipe.fps, "ping_pong": recipe.ping_pong}
            result = morpher.film(path, recipe.frames, recipe.sample, recipe.schedule, progress)
            progress("save", 0, 1)
            film = Film(result, recipe, name, command, session.new_folder())
            result.save(film.video)
            progress("save", 1, 1)
            film.seconds = time.monotonic() - started
            if session.closed:
                shutil.rmtree(session.folder, ignore_errors=True)
            elif session.film:
                shutil.rmtree(session.film.folder, ignore_errors=True)
            session.film = film
            return film

        return self._start(session, "morph", work)

    def frame_at(self, session: Session, alpha: float) -> Job:
        """Put one frame of the visitor's own film into the line. The result is a picture. Raises `UserError`."""
        film = self._film(session)

        def work(progress: ProgressCallback) -> Image.Image:
            path = film.result.path
            return path.sample([alpha], film.recipe.sample, progress=progress)[0]

        return self._start(session, "frame", work)

    def _start(self, session: Session, kind: str, work: Work) -> Job:
        if kind in session.jobs:
            session.jobs[kind].cancel()  # a visitor has one job of a kind, the last one asked for
        session.jobs[kind] = self.line.submit(work)
        return session.jobs[kind]

    def _film(self, session: Session) -> Film:
        if session.film is None:
            raise UserError("This film can no longer be sampled, as another model was loaded since: press Morph again.")
        return session.film

    def _prepare(
        self,
        morpher: Morpher,
        recipe: Recipe,
        images: Sequence[Image.Image],
        loras: Sequence[Path],
        progress: ProgressCallback,
    ) -> MorphPath:
        """The prepared path, found again by the content of everything it depends on."""
        from ..files.loras import load_lora

        loaded: list[Lora] | None = [load_lora(file) for file in loras] or None
        digests = tuple(hashlib.sha256(file.read_bytes()).hexdigest() for file in loras)
        parts = (recipe.model, recipe.fit, recipe.size, recipe.resize, recipe.seed)
        key = repr((parts, recipe.picture_hashes, recipe.prompts, digests))
        if key not in self._paths:
            self._paths[key] = morpher.prepare(
                images,
                recipe.prompts,
                loaded,
                recipe.fit,
                recipe.seed,
                size=recipe.size,
                resize=recipe.resize,
                steps=recipe.sample.steps,
                progress=progress,
            )
            while len(self._paths) > KEPT_PATHS:
                self._paths.popitem(last=False)
        self._paths.move_to_end(key)
        path = self._paths[key]
        path.noises_at(recipe.sample.steps, progress)
        about: dict[str, Any] = {"loop": recipe.loop, "pictures": list(recipe.pictures)}
        about |= {"loras": list(recipe.loras), "lora_hashes": list(digests)} if loras else {}
        return replace(path, loop=recipe.loop, settings=path.settings | about, sample_config=morpher.spec.sample)


def check_picture(file: Path) -> None:
    """Raises `ImageError` for what cannot be morphed, naming the picture as the visitor knows it."""
    try:
        _check_bytes(file, MAX_PICTURE_BYTES)
        try:
            with Image.open(file) as image:
                pixels = image.width * image.height
        except Exception:
            pixels = 0  # load_image says why
        if pixels > MAX_PICTURE_PIXELS:
            raise ImageError(f"Picture {file.name!r} has {pixels / 1e6:.0f} megapixels: at most 50 can be used here.")
        load_image(file)
    except ImageError as error:
        raise ImageError(str(error).replace(repr(str(file)), repr(file.name))) from error


def _check_bytes(file: Path, most: int) -> None:
    if file.stat().st_size > most:
        raise ImageError(
            f"{file.name!r} has {file.stat().st_size / 2**20:.0f} MB: at most {most // 2**20} MB are taken."
        )


def _load_path(file: Path, morpher: Morpher, recipe: Recipe) -> MorphPath:
    from ..path import MorphPath

    try:
        path = MorphPath.load(file, morpher)
    except UserError as error:
        raise type(error)(str(error).replace(str(file), file.name)) from error
    stretches_and_gaps(recipe.frames, path.num_images, recipe.loop)
    return replace(path, loop=recipe.loop, settings=path.settings | {"loop": recipe.loop})


def figures(film: Film) -> dict[str, Any]:
    """Of the figures that `--json` prints those that concern a client."""
    result = film.result
    return {
        "frames": len(result.frames),
        "alphas": result.alphas,
        "distances": result.distances,
        "ppl": result.ppl,
        "pdv": result.pdv,
        "settings": film.metadata,
    }


def explain(error: Exception) -> str:
    """One sentence for the visitor; what is not meant for him stays in the log."""
    if isinstance(error, DiffMorpherError):
        text = str(error)
    elif isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate" in str(error):
        text = "The machine ran out of memory: try a smaller size or fewer pictures."
    else:
        text = f"Something went wrong ({type(error).__name__}); the terminal in which the page was started says more."
    return text[:1].upper() + text[1:]
