"""What the page does behind its face: visitors and their pictures, one line of jobs, one model, prepared paths.

Nothing here knows of gradio. Jobs run one after another in one thread, whoever asked for them; a visitor reads the state
of his job and may cancel it, which stops it within one step.
"""

from __future__ import annotations

import secrets
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from ..cluster.maker import Model
from ..config import stretches_and_gaps
from ..errors import ConfigError, DiffMorpherError, ImageError, UserError
from ..files.atomic import file_hash
from ..files.pictures import said_cut
from ..files.sound import read_sound
from ..models.catalog import check_model, look_up
from ..progress import ProgressCallback
from ..recipe import Recipe, film_name
from .checks import MAX_FILE_BYTES, check_bytes, check_picture, of_pictures, with_pictures
from .estimate import Speed
from .keys import fit_key, frames_key, path_options
from .line import Job, Line, Work
from .settings import MAX_PICTURES, check_frames, chosen, different_names
from .uploads import Uploads
from .visits import Film, Picture, Session, video_suffix

if TYPE_CHECKING:
    from ..files.loras import Lora
    from ..morpher import Morpher
    from ..path import MorphPath

__all__ = ["Film", "Session", "Studio", "explain", "figures"]

#: Prepared paths that are kept, the last used ones.
KEPT_PATHS = 4
#: Films of a visit that can be watched and downloaded, beside the last one.
KEPT_FILMS = 12
#: Visitors whose page is gone and who may come back.
KEPT_VISITS = 8
#: Seconds for which requests of a visitor who has left may still be under way.
UNDER_WAY = 20.0


class Studio:
    """One process's visitors, model and prepared paths. root: a folder of its own, emptied by `close`."""

    def __init__(
        self,
        root: Path,
        models: set[str] | None = None,
        line: Line | None = None,
        model: Model | None = None,
        keep: float = 0.0,
    ) -> None:
        """models: the only ones that visitors may choose; None for any that can be loaded. line, model: those of others who
        work in this process. keep: how long a visit is kept, in seconds, after its page was left or loaded anew."""
        self.keep = keep
        self.root, self.line, self._models = root, line or Line(), models
        self.model = model or Model()
        self.model.leaving.append(self._let_go)
        self.speed = Speed()
        self.uploads = Uploads(root / "uploads")
        self._sessions: dict[str, Session] = {}
        self._tokens: dict[str, str] = {}  # of browsers' tabs, to the key of the visitor there
        self._left: dict[str, float] = {}  # keys of visitors, and when they left
        self._lock = threading.Lock()
        self._paths: OrderedDict[str, MorphPath] = OrderedDict()

    # ---- visitors

    def session(self, key: str) -> Session:
        """The visitor of that key, who may be new."""
        if key not in self._sessions:
            self._tidy()
        with self._lock:
            if key not in self._sessions:
                folder = self.root / "sessions" / secrets.token_urlsafe(24)
                if key in self._left:  # a request that was under way when he left
                    return Session(folder, closed=True)
                folder.mkdir(parents=True, mode=0o700)
                self._sessions[key] = Session(folder)
            return self._sessions[key]

    def _tidy(self) -> None:
        """Remove what programs left behind, and uploads that broke off."""
        now = time.monotonic()
        for key, session in list(self._sessions.items()):
            if session.until < now:
                self.end(key)
        with self._lock:
            self._left = {key: left for key, left in self._left.items() if left > now - UNDER_WAY}
        self.uploads.tidy()

    def leave(self, key: str) -> None:
        """The visitor's page is gone; what is his goes in a while, unless he comes back. Programs do not."""
        with self._lock:
            session = self._sessions.get(key)
            away = [other for other, each in self._sessions.items() if each.ending is not None]
            stays = session is not None and self.keep > 0 and key in self._tokens.values()
            if session is not None and stays:
                session.ending = threading.Timer(self.keep, self.end, [key])
                session.ending.daemon = True
                session.ending.start()
            if not stays:
                self._left[key] = time.monotonic()
        if not stays:
            self.end(key)
        elif len(away) >= KEPT_VISITS:
            self.end(away[0])

    def come_back(self, key: str, token: str) -> Session:
        """The visitor of that key; whoever had the same token before is he. token: what only his browser knows."""
        with self._lock:
            before = self._tokens.get(token)
            if before is not None and before in self._sessions and before != key and token:
                session = self._sessions.pop(before)
                if session.ending is not None:
                    session.ending.cancel()
                    session.ending = None
                self._sessions[key] = session
            if token:
                self._tokens[token] = key
        return self.session(key)

    def end(self, key: str) -> None:
        """Cancel the visitor's job and remove all files of his."""
        with self._lock:
            session = self._sessions.pop(key, None)
            self._tokens = {token: other for token, other in self._tokens.items() if other != key}
        if session is None:
            return
        session.closed = True
        if session.ending is not None:
            session.ending.cancel()
        for job in session.jobs.values():
            job.cancel()
        shutil.rmtree(session.folder, ignore_errors=True)
        self.uploads.release(session)

    def close(self) -> None:
        """Everything ends; the folder is removed."""
        for key in list(self._sessions):
            self.end(key)
        shutil.rmtree(self.root, ignore_errors=True)

    def add_picture(self, session: Session, upload: Path, held: bool = False) -> Picture:
        """Check a picture and copy it into the visitor's folder; held: its file need not go with him. Raises `ImageError`."""
        if not held:
            self.uploads.hold(session, upload)
        if len(session.pictures) >= MAX_PICTURES:
            raise ImageError(f"There are {MAX_PICTURES} pictures already: remove one first.")
        check_picture(upload)
        shown = "".join(filter(str.isprintable, upload.name))  # no letters that turn the direction of those around them
        name = different_names([*(picture.name for picture in session.pictures), shown])[-1]
        file = session.folder / f"{secrets.token_hex(4)}{upload.suffix}"
        shutil.copyfile(upload, file)
        session.pictures.append(Picture(name, file))
        return session.pictures[-1]

    # ---- the model

    def load(self, model: str, prediction: Literal["epsilon", "v"] | None = None) -> Morpher:
        """The model, loaded once; another one takes its place. To be called by a job alone. Raises `ModelError`."""
        return self.model.load(Recipe(model=model, prediction=prediction))

    def _let_go(self) -> None:
        """Of what holds the model."""
        self._paths.clear()
        for session in list(self._sessions.values()):
            session.film = None

    def check_model(self, model: str) -> None:
        """Raises `ConfigError` for a model that may not be chosen here, `ModelError` for what is none."""
        if self._models is not None and model not in self._models:
            raise ConfigError(f"the model {model!r} cannot be chosen here; take one of {', '.join(self._models)}.")
        check_model(model)

    def recipe(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe of a page's fields, with what its model recommends. Raises `UserError`."""
        recipe = chosen(values)
        self.check_model(recipe.model)
        return chosen(values) if look_up(recipe.model) else recipe

    def warm_up(self, model: str = "mini") -> None:
        """Load the model before anyone waits for it, unless somebody is quicker."""
        self.line.submit(lambda _: self.model.morpher or self.load(model))

    # ---- jobs

    def morph(
        self,
        session: Session,
        recipe: Recipe,
        pictures: Sequence[Picture],
        prompts: Sequence[str],
        *,
        loras: Sequence[Path] = (),
        styles: Sequence[tuple[Path, float]] = (),
        path_file: Path | None = None,
        audio: Path | None = None,
    ) -> Job:
        """Put a film into the line; what cannot work is said at once. The result is a `Film`. Raises `UserError`.

        styles: LoRAs that act on every frame, with their strengths.
        """
        self.check_model(recipe.model)
        if loras and recipe.fit is None:
            raise ConfigError("LoRA files and a film without LoRA contradict each other: leave one out.")
        images: list[Image.Image] = []
        for file in filter(None, (*loras, *(style for style, _ in styles), path_file, audio)):
            check_bytes(file, MAX_FILE_BYTES)
        if styles and path_file:
            raise ConfigError("a path has its styles in it: leave out the style files, or the path.")
        recipe = replace(
            recipe,
            styles=tuple(f"{file.name}:{weight:g}" if weight != 1 else file.name for file, weight in styles),
            style_hashes=tuple(file_hash(file) for file, _ in styles),
        )
        if audio is not None:
            read_sound(audio, 0.1)
            recipe = replace(recipe, audio=audio.name, audio_hash=file_hash(audio))
        recipe.check_sound()
        if path_file is None:
            names = different_names([picture.name for picture in pictures])
            recipe = of_pictures(replace(recipe, loras=tuple(lora.name for lora in loras)), names, prompts)
            recipe, images = with_pictures(recipe, [each.name for each in pictures], [each.file for each in pictures])

        def work(progress: ProgressCallback) -> Film:
            started = time.monotonic()
            progress("load", 0, 1)
            morpher = self.load(recipe.model, recipe.prediction)
            progress("load", 1, 1)
            before, made_of = session.film, frames_key(recipe, images, path_file, loras, audio)
            if path_file is not None:
                path, name = _load_path(path_file, morpher, recipe), path_file.stem
            else:
                acting = [f"{file}:{weight:g}" for file, weight in styles]
                path = self._prepare(morpher, recipe, images, loras, acting, progress)
                name = film_name(recipe.pictures)
            path.settings = recipe.about_film(path.settings)
            count = recipe.frame_count(path.num_images)
            sound: dict[str, Any] = {"audio": str(audio)} if audio else {}
            again = before is not None and before.made_of == made_of
            if before is not None and again:
                result = replace(before.result, path=path)
            else:
                pace = replace(recipe, **sound).pace(count)
                result = morpher.film(path, count, recipe.sample, recipe.schedule, progress, pace=pace)
            result.settings = recipe.about_film(result.settings) | sound
            command = "" if path_file else recipe.command(name + video_suffix(result))
            progress("save", 0, 1)
            film = Film(result, recipe, name, command, session.new_folder(), made_of=made_of, again=again)
            film.cut = said_cut(recipe.pictures, images, result.frames[0].size) if recipe.resize == "crop" else ""
            result.save(film.video)
            progress("save", 1, 1)
            film.seconds = time.monotonic() - started
            if session.closed:
                shutil.rmtree(session.folder, ignore_errors=True)
            elif session.film:
                session.earlier = [*session.earlier, session.film.kept()][-KEPT_FILMS:]
                for folder in set(session.folder.glob("film-*")) - {each.video.parent for each in session.earlier}:
                    if folder != film.folder:
                        shutil.rmtree(folder, ignore_errors=True)
            session.film = film
            if not again:
                self.speed.learn(recipe, result.unet_rows, result.seconds["schedule"] + result.seconds["sample"])
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
        job = session.jobs[kind] = self.line.submit(work)
        if session.closed:
            job.cancel()
        return job

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
        styles: Sequence[str],
        progress: ProgressCallback,
    ) -> MorphPath:
        """The prepared path, found again by the content of everything it depends on."""
        from ..files.loras import load_lora

        loaded: list[Lora] | None = [load_lora(file) for file in loras] or None
        digests = tuple(map(file_hash, loras))
        key = repr((fit_key(replace(recipe, loras=())), digests))
        if key not in self._paths:
            options = path_options(recipe) | {"loras": loaded, "styles": styles, "loop": False}
            self._paths[key] = morpher.prepare(images, steps=recipe.sample.steps, progress=progress, **options)
            while len(self._paths) > KEPT_PATHS:
                self._paths.popitem(last=False)
        self._paths.move_to_end(key)
        path = self._paths[key]
        path.noises_at(recipe.sample.steps, progress)
        about: dict[str, Any] = {"loop": recipe.loop, "pictures": list(recipe.pictures)}
        about |= {"loras": list(recipe.loras), "lora_hashes": list(digests)} if loras else {}
        return replace(path, loop=recipe.loop, settings=path.settings | about, sample_config=morpher.spec.sample)


def _load_path(file: Path, morpher: Morpher, recipe: Recipe) -> MorphPath:
    from ..path import MorphPath

    try:
        path = MorphPath.load(file, morpher)
    except UserError as error:
        raise type(error)(str(error).replace(str(file), file.name)) from error
    count = recipe.frame_count(path.num_images)
    check_frames(count)
    stretches_and_gaps(count, path.num_images, recipe.loop)
    recipe.schedule.check_images(path.num_images, recipe.loop)
    return replace(path, loop=recipe.loop, settings=path.settings | {"loop": recipe.loop})


def figures(film: Film) -> dict[str, Any]:
    """Of the figures that `--json` prints those that concern a client."""
    result = film.result
    return {
        "frames": len(result.frames),
        "alphas": result.alphas,
        "times": result.times,
        "distances": result.distances,
        "ppl": result.ppl,
        "pdv": result.pdv,
        "ghost": result.ghost,
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
