"""`Recipe`: everything that determines a film.

The command line builds a recipe of what was typed, the page of what was chosen; every film carries its own in its metadata,
from which it can be made again. The names of its settings, their help and limits are in `settings.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PurePath
from typing import Any, Literal

from .commands import command_line, fewest_settings
from .config import (
    FPS,
    NUM_FRAMES,
    FitConfig,
    SampleConfig,
    ScheduleConfig,
    check_prompts,
    numbers,
    stretches_and_gaps,
)
from .documents import LISTS, as_stored, check_keys, check_names, checked, of_text, plain, section, seen_from, texts
from .errors import ConfigError, RecipeError
from .files.playback import Playback, Quality
from .files.recipes import read_document, toml_path, write_document
from .files.sound import beat
from .models.catalog import CATALOG, ModelSpec, bare_name, spec_of
from .settings import BY_NAME, CONFIGS, LIMITS, PRESETS, check_size, parse_focus, parse_weighted

#: Of the form in which recipes are stored: raise it when an older program would misread a newer recipe.
VERSION = 1
#: What a film's metadata holds beside its recipe: what was found out in the making.
_FACTS = ("diffmorpher", "images", "alphas")
_RECOMMENDED: Any = "recommended"


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a film, complete: what is not given is what suits the model, or else the paper's.

    What suits a model that the catalog does not have is what suits its family; of a hub id that is not in the cache yet no
    family is known (`models.catalog.look_up` fetches what says it).

    pictures: two files or more. prompts: one for all, one each, or none. loras: one file for all or one each, in place of
    fitting. styles: LoRAs that act on every frame; of both, "FILE:WEIGHT" is at that strength. picture_hashes, lora_hashes,
    style_hashes: of their contents, where they are known; what is found is then checked.
    size: (width, height), or a shape of `SHAPES`; None for the model's. focus: one for all, one each, or none. fit: None for no
    LoRA at all (or with `loras`). device, dtype: None for the best here. seconds: the film's length, in place of frames.
    hold ... quality: as in `Playback`. transparent: frames keep the pictures' transparency.
    audio: a file whose sound a video gets; beat: the frames follow it. prediction, vae: None for
    what the model says, and its own. origin: the file that it was read from, beside which pictures are looked for.
    Raises `ConfigError` for a value that cannot be.
    """

    pictures: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()
    picture_hashes: tuple[str, ...] = ()
    lora_hashes: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()
    style_hashes: tuple[str, ...] = ()
    model: str = "mini"
    size: tuple[int, int] | str | None = None
    resize: Literal["crop", "pad", "blur"] = "crop"
    focus: tuple[str, ...] = ()
    loop: bool = False
    seed: int = 0
    fit: FitConfig | None = _RECOMMENDED
    sample: SampleConfig = _RECOMMENDED
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    frames: int = NUM_FRAMES
    seconds: float | None = None
    fps: float = FPS
    hold: tuple[float, ...] = ()
    reverse: bool = False
    ping_pong: bool = False
    transparent: bool = False
    quality: Quality = "good"
    audio: str | None = None
    audio_hash: str | None = None
    beat: bool = False
    device: str | None = None
    dtype: str | None = None
    low_memory: bool = False
    tf32: bool = False
    prediction: Literal["epsilon", "v"] | None = None
    vae: str | None = None
    origin: Path | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_names(self)
        for name in LISTS:
            object.__setattr__(self, name, texts(getattr(self, name)))
        object.__setattr__(self, "hold", numbers(self.hold))
        for each in self.focus:
            parse_focus(each)
        for each in (*self.loras, *self.styles):
            parse_weighted(each)
        if self.size is not None:
            object.__setattr__(self, "size", check_size(self.size))
        if self.seconds is not None:
            object.__setattr__(self, "frames", NUM_FRAMES)  # which then says nothing
        if self.loras:
            object.__setattr__(self, "fit", None)
        if isinstance(self.fit, str) or isinstance(self.sample, str):
            own = self.suits()
            for name in ("fit", "sample"):
                if isinstance(getattr(self, name), str):
                    object.__setattr__(self, name, getattr(own, name))
        for name, limits in LIMITS[""].items():
            limits.check(getattr(self, name))
        for name, config in CONFIGS.items():
            if not isinstance(getattr(self, name), config) and (name, getattr(self, name)) != ("fit", None):
                raise ConfigError(f"{name} is {getattr(self, name)!r}, but must be a {config.__name__}.")

    def suits(self) -> ModelSpec:
        """What suits its model."""
        return spec_of(self.model_place())

    def check(self) -> None:
        """Raise `ConfigError` where the numbers of things do not go together."""
        check_prompts(self.prompts)
        images, prompts, loras = len(self.pictures), len(self.prompts), len(self.loras)
        if images < 2:
            raise ConfigError("a morph needs at least two images: give another one.")
        if prompts not in (0, 1, images):
            raise ConfigError(f"{prompts} prompts were given for {images} images: give one for all, one each, or none.")
        if len(self.focus) not in (0, 1, images):
            raise ConfigError(
                f"{len(self.focus)} focuses were given for {images} images: give one for all, one each, or none."
            )
        if loras not in (0, 1, images):
            raise ConfigError(f"{loras} LoRA files were given for {images} images: give one for all, or one for each.")
        for name, files in (("picture_hashes", images), ("lora_hashes", loras), ("style_hashes", len(self.styles))):
            if len(getattr(self, name)) not in (0, files):
                raise ConfigError(
                    f"{name} are {len(getattr(self, name))} for {files} files: give one for each, or none."
                )
        self.check_sound()
        self.playback.check_images(images)
        self.schedule.check_images(images, self.loop)
        stretches_and_gaps(self.frame_count(images), images, self.loop)
        self.sample.check_images(images)

    def model_place(self) -> str:
        """The model: one that lies beside the recipe by that name, else what is written there."""
        return self.model if self.model in CATALOG else self._place(self.model)

    def _place(self, name: str) -> str:
        beside = None if self.origin is None else self.origin.parent / name
        return str(beside) if beside is not None and os.path.exists(beside) else name

    def loading(self) -> dict[str, Any]:
        """What `Morpher.from_pretrained` loads its model with."""
        names = ("device", "dtype", "low_memory", "tf32", "prediction")
        vae = None if self.vae is None else self._place(self.vae)
        return {"model": self.model, **{name: getattr(self, name) for name in names}, "vae": vae}

    def check_sound(self) -> None:
        """Raise `ConfigError` where a film cannot follow the beat."""
        if self.beat and self.audio is None:
            raise ConfigError("a film that follows the beat needs a sound: give one.")
        if self.beat and (self.schedule.ease != "linear" or any(self.hold)):
            raise ConfigError("a film that follows the beat has no easing and no holds: leave out the beat, or these.")

    @property
    def playback(self) -> Playback:
        """How its frames are played."""
        return Playback(self.fps, self.hold, self.reverse, self.ping_pong, self.quality)

    def options(self) -> dict[str, Any]:
        """What a `Morpher` is called with, beside the pictures, their number of frames and their pace."""
        names = ("fit", "sample", "schedule", "size", "resize", "focus", "styles", "transparent", "loop", "seed")
        return {name: getattr(self, name) for name in names} | {
            name: getattr(self, name) or None for name in ("prompts", "loras")
        }

    def frame_count(self, images: int) -> int:
        """How many frames are made of so many pictures. Raises `ConfigError` where `seconds` allow too few or too many."""
        if self.seconds is None:
            return self.frames
        count = self.playback.frames_in(self.seconds, images, self.loop)
        LIMITS[""]["frames"].check(count)
        return count

    def pace(self, frames: int) -> list[float] | None:
        """How much of the way each gap of so many frames covers where the film follows its sound, else None."""
        if not self.beat or self.audio is None:
            return None
        pace = beat(self.audio, frames if self.loop else frames - 1, self.fps)
        return pace[::-1] if self.reverse else pace

    # ---- changing it

    def changed(self, **typed: Any) -> Recipe:
        """The recipe with other settings, by their names in the table. None changes nothing.

        With another model, what was the old one's recommendation becomes the new one's; what it predicts and its VAE go.
        Presets come before all else.
        """
        check_keys(typed, list(BY_NAME), "changed()")
        typed = {name: value for name, value in typed.items() if value is not None and BY_NAME[name].says(value)}
        for name in (
            {"model", "vae", "lora", "style", "audio"} & typed.keys() if self.origin else ()
        ):  # seen from here, not from there
            many = isinstance(typed[name], (list, tuple))
            seen = [
                os.path.abspath(each) if each not in CATALOG and os.path.exists(parse_weighted(each)[0]) else each
                for each in (typed[name] if many else [typed[name]])
            ]
            typed[name] = seen if many else seen[0]
        recipe = self._for_model(typed.pop("model", self.model))
        for name, preset in PRESETS.items():
            if typed.pop(name, False):
                recipe = preset(recipe)
        for name, value in typed.items():
            recipe = BY_NAME[name].put(recipe, value)
        if "lora" in typed or "no_lora" in typed:  # other files, or none
            recipe = replace(recipe, lora_hashes=(), loras=recipe.loras if "lora" in typed else ())
        if "style" in typed:
            recipe = replace(recipe, style_hashes=())
        if "audio" in typed:
            recipe = replace(recipe, audio_hash=None)
        return recipe.in_seconds() if "stretch" in typed and "frames" not in typed else recipe

    def in_seconds(self) -> Recipe:
        """With as many frames as its stretches take when they are seconds; with a length in seconds they are shares of it."""
        stretch = self.schedule.stretch
        if self.seconds is not None or not stretch:
            return self
        return replace(self, frames=max(2, round(sum(stretch) * self.fps) + (0 if self.loop else 1)))

    def _for_model(self, model: str) -> Recipe:
        if bare_name(model) == bare_name(self.model):  # the same one, perhaps in another place
            return replace(self, model=model)
        old, new = Recipe(model=self.model, origin=self.origin), Recipe(model=model)

        def moved(section: str) -> Any:
            mine, was, now = (getattr(recipe, section) for recipe in (self, old, new))
            if mine is None:
                return None
            same = {f.name: getattr(now, f.name) for f in fields(mine) if getattr(mine, f.name) == getattr(was, f.name)}
            return replace(mine, **same)

        return replace(self, model=model, prediction=None, vae=None, fit=moved("fit"), sample=moved("sample"))

    # ---- as a file

    def document(self) -> dict[str, Any]:
        """As it is stored: what is None is left out, no LoRA at all is `fit = false`, files go by their names alone."""
        fps = int(self.fps) if self.fps == int(self.fps) else self.fps
        stored: dict[str, Any] = {"recipe": VERSION, "fps": fps, "model": bare_name(self.model)}
        stored |= {
            name: [PurePath(file).name for file in getattr(self, name)] for name in ("pictures", "loras", "styles")
        }
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in CONFIGS:
                stored[f.name] = False if value is None else as_stored(value)
            elif f.name not in stored and f.name != "origin" and value not in (None, ()):
                stored[f.name] = list(value) if isinstance(value, tuple) else value
        if not self.styles:
            del stored["styles"]
        for name in ("audio", "vae"):
            if stored.get(name) is not None:
                stored[name] = PurePath(stored[name]).name
        del stored["fit" if self.loras else "loras"]
        if self.seconds is not None:
            del stored["frames"]
        return stored

    def about_film(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that a film was made with, and what the recipe says of it beyond them."""
        about = {name: value for name, value in self.document().items() if name in _BEYOND and value != []}
        return {name: value for name, value in settings.items() if name != "frames" or self.seconds is None} | about

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> Recipe:
        """The recipe of a film, a contact sheet or a folder of frames, or of a .toml. Raises `RecipeError`."""
        found = read_recipes(file)
        if len(found) != 1:
            raise RecipeError(f"{str(file)!r} holds {len(found)} recipes, where one is wanted.")
        return found[0][0]

    def write(self, file: str | os.PathLike[str]) -> Path:
        """Write it as TOML; pictures and LoRA files by their places as seen from there. Raises `OutputError`."""
        folder = toml_path(file).absolute().parent.resolve()
        document = {
            key: {name: each for name, each in value.items() if each is not None} if isinstance(value, dict) else value
            for key, value in self.document().items()
        }
        for name in ("pictures", "loras", "styles"):
            if getattr(self, name):
                document[name] = [seen_from(folder, path, self.origin) for path in getattr(self, name)]
        for name in ("audio", "vae"):
            if getattr(self, name) is not None:
                document[name] = seen_from(folder, getattr(self, name), self.origin)
        document["model"] = self.model if self.model in CATALOG else seen_from(folder, self.model, self.origin)
        return write_document(file, document)

    def command(self, out: str | None = None) -> str:
        """The command line that makes the same film. Raises `RecipeError` for what no option can say."""
        return command_line(self, out or film_name(self.pictures) + ".mp4")

    def typed(self) -> dict[str, Any] | None:
        """The fewest settings, by name, that make this recipe of its pictures, prompts and LoRAs; None where none do."""
        return fewest_settings(self)


#: What a recipe says of a film that has no part in making its frames.
_BEYOND = (
    "pictures",
    "picture_hashes",
    "loras",
    "lora_hashes",
    "styles",
    "style_hashes",
    "seconds",
    "fps",
    "hold",
    "reverse",
    "ping_pong",
    "quality",
    "audio",
    "audio_hash",
    "beat",
)


def film_name(names: Sequence[str]) -> str:
    """What to call the film of these pictures: "cat-dog" for cat.png and dog.jpg."""
    return "-".join([PurePath(name).stem for name in names][:3])[:60] or "morph"


# ---- reading


def read_recipes(file: str | os.PathLike[str]) -> list[tuple[Recipe, str | None]]:
    """The recipes in a file, each with its output where the file is a batch. Raises `RecipeError`, naming the key."""
    documents = read_document(file)
    path = Path(os.path.expanduser(file))
    if not documents:
        raise RecipeError(f"{str(file)!r} holds no film.")
    found = []
    for number, document in enumerate(documents, start=1):
        where = str(file) if len(documents) == 1 else f"{file}, film {number}"
        outputs: dict[str, Any] = {}
        if path.suffix.lower() in (".toml", ".csv"):  # a film made by others does not say where ours goes
            outputs = {key: document.pop(key) for key in ("name", "out") if key in document}
            for key, value in outputs.items():
                if value is not None and not isinstance(value, str):
                    raise RecipeError(f"{where}: {key} is {value!r}, but must be a text.")
        if path.suffix.lower() == ".csv":
            document.pop("category", None)
            document = {key: of_text(key, value) for key, value in document.items()}
        recipe = _recipe(document, where, path)
        out = outputs.get("out") or f"{outputs.get('name') or film_name(recipe.pictures)}.mp4"
        found.append((recipe, out if outputs else None))
    return found


def _recipe(document: Mapping[str, Any], where: str, origin: Path) -> Recipe:
    document = dict(document)
    version = document.pop("recipe", None)
    if version is None and "diffmorpher" in document:
        raise RecipeError(
            f"{where} was made by diffmorpher {document['diffmorpher']} before films carried their recipe: it cannot be "
            "made again from this file."
        )
    if version is not None and (
        not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= VERSION
    ):
        raise RecipeError(
            f"{where}: recipe is {version!r}, which is no version that this diffmorpher knows (up to {VERSION}): update it."
        )
    if "diffmorpher" in document:
        document = {key: value for key, value in document.items() if key not in _FACTS}
    names = [f.name for f in fields(Recipe) if f.name != "origin"]
    check_keys(document, names, where)
    if "loras" in document and document.get("fit", True) is not True:
        raise RecipeError(f"{where}: loras and fit contradict each other: leave one out.")
    if {"frames", "seconds"} <= document.keys():
        raise RecipeError(f"{where}: frames and seconds contradict each other: leave one out.")
    try:
        start = Recipe(model=checked("model", document.pop("model", "mini"), str), origin=origin)
        values: dict[str, Any] = {}
        for key, value in document.items():
            values[key] = section(key, value, start, where) if key in CONFIGS else plain(key, value)
        recipe = replace(start, **values)
        return recipe if "frames" in values else recipe.in_seconds()
    except RecipeError:
        raise
    except ConfigError as error:
        raise RecipeError(f"{where}: {error}") from error
