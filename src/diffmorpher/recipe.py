"""`Recipe`: everything that determines a film.

The command line builds a recipe of what was typed, the page of what was chosen; every film carries its own in its metadata,
from which it can be made again. The names of its settings, their help and limits are in `settings.py`.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import combinations
from pathlib import Path, PurePath
from typing import Any, Literal, cast

from .config import FPS, NUM_FRAMES, FitConfig, SampleConfig, ScheduleConfig, stretches_and_gaps
from .errors import ConfigError, RecipeError
from .files.recipes import read_document, write_document
from .models.catalog import CATALOG, ModelSpec, bare_name
from .settings import BY_NAME, CONFIGS, LIMITS, PRESETS, SETTINGS, VALUE, check_size, parse_size

#: Of the form in which recipes are stored: raise it when an older program would misread a newer recipe.
VERSION = 1
#: What a film's metadata holds beside its recipe: what was found out in the making.
_FACTS = ("diffmorpher", "images", "alphas")
_RECOMMENDED: Any = "recommended"


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a film, complete: what is not given is what suits the model, or else the paper's.

    pictures: two files or more. prompts: one for all, one each, or none. loras: one file each, in place of fitting.
    picture_hashes, lora_hashes: of their contents, where they are known; what is found is then checked.
    size: (width, height); None for the model's. fit: None for no LoRA at all (or with `loras`). device, dtype: None for the
    best here. prediction: None for what the model says. origin: the file that it was read from, beside which pictures are
    looked for.
    Raises `ConfigError` for a value that cannot be.
    """

    pictures: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()
    picture_hashes: tuple[str, ...] = ()
    lora_hashes: tuple[str, ...] = ()
    model: str = "mini"
    size: tuple[int, int] | None = None
    resize: Literal["crop", "pad"] = "crop"
    loop: bool = False
    seed: int = 0
    fit: FitConfig | None = _RECOMMENDED
    sample: SampleConfig = _RECOMMENDED
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    frames: int = NUM_FRAMES
    fps: float = FPS
    ping_pong: bool = False
    device: str | None = None
    dtype: str | None = None
    low_memory: bool = False
    tf32: bool = False
    prediction: Literal["epsilon", "v"] | None = None
    origin: Path | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in _LISTS:
            object.__setattr__(self, name, _texts(getattr(self, name)))
        if self.size is not None:
            object.__setattr__(self, "size", check_size(self.size))
        own = CATALOG.get(self.model, ModelSpec(self.model, ""))
        if self.loras:
            object.__setattr__(self, "fit", None)
        elif isinstance(self.fit, str):
            object.__setattr__(self, "fit", own.fit)
        if isinstance(self.sample, str):
            object.__setattr__(self, "sample", own.sample)
        for name, limits in LIMITS[""].items():
            limits.check(getattr(self, name))
        for name, config in CONFIGS.items():
            if not isinstance(getattr(self, name), config) and (name, getattr(self, name)) != ("fit", None):
                raise ConfigError(f"{name} is {getattr(self, name)!r}, but must be a {config.__name__}.")

    def check(self) -> None:
        """Raise `ConfigError` where the numbers of things do not go together."""
        images, prompts, loras = len(self.pictures), len(self.prompts), len(self.loras)
        if images < 2:
            raise ConfigError("a morph needs at least two images: give another one.")
        if prompts not in (0, 1, images):
            raise ConfigError(f"{prompts} prompts were given for {images} images: give one for all, one each, or none.")
        if loras not in (0, images):
            raise ConfigError(f"{loras} LoRA files were given for {images} images: give one for each.")
        for name, files in (("picture_hashes", images), ("lora_hashes", loras)):
            if len(getattr(self, name)) not in (0, files):
                raise ConfigError(
                    f"{name} are {len(getattr(self, name))} for {files} files: give one for each, or none."
                )
        stretches_and_gaps(self.frames, images, self.loop)
        self.sample.check_images(images)

    # ---- changing it

    def changed(self, **typed: Any) -> Recipe:
        """The recipe with other settings, by their names in the table. None changes nothing.

        With another model, what was the old one's recommendation becomes the new one's, and what it predicts is not kept.
        Presets come before all else.
        """
        _check_keys(typed, list(BY_NAME), "changed()")
        typed = {name: value for name, value in typed.items() if value is not None and BY_NAME[name].says(value)}
        for name in {"model", "lora"} & typed.keys() if self.origin else ():  # they are seen from here, not from there
            places = [typed[name]] if name == "model" else typed[name]
            seen = [os.path.abspath(each) if each not in CATALOG and os.path.exists(each) else each for each in places]
            typed[name] = seen[0] if name == "model" else seen
        recipe = self._for_model(typed.pop("model", self.model))
        for name, preset in PRESETS.items():
            if typed.pop(name, False):
                recipe = preset(recipe)
        for name, value in typed.items():
            recipe = BY_NAME[name].put(recipe, value)
        if "lora" in typed or "no_lora" in typed:  # other files, or none
            recipe = replace(recipe, lora_hashes=(), loras=recipe.loras if "lora" in typed else ())
        return recipe

    def _for_model(self, model: str) -> Recipe:
        if model == self.model:
            return self
        old, new = Recipe(model=self.model), Recipe(model=model)

        def moved(section: str) -> Any:
            mine, was, now = (getattr(recipe, section) for recipe in (self, old, new))
            if mine is None:
                return None
            same = {f.name: getattr(now, f.name) for f in fields(mine) if getattr(mine, f.name) == getattr(was, f.name)}
            return replace(mine, **same)

        same = bare_name(model) == bare_name(self.model)  # in another place
        prediction = self.prediction if same else None
        return replace(self, model=model, prediction=prediction, fit=moved("fit"), sample=moved("sample"))

    # ---- as a file

    def document(self) -> dict[str, Any]:
        """As it is stored: what is None is left out, no LoRA at all is `fit = false`, files go by their names alone."""
        fps = int(self.fps) if self.fps == int(self.fps) else self.fps
        stored: dict[str, Any] = {"recipe": VERSION, "fps": fps, "model": bare_name(self.model)}
        stored |= {name: [PurePath(file).name for file in getattr(self, name)] for name in ("pictures", "loras")}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in CONFIGS:
                stored[f.name] = False if value is None else asdict(value)
            elif f.name not in stored and f.name != "origin" and value not in (None, ()):
                stored[f.name] = list(value) if isinstance(value, tuple) else value
        if self.loras:
            del stored["fit"]
        else:
            del stored["loras"]
        return stored

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> Recipe:
        """The recipe of a film, a contact sheet or a folder of frames, or of a .toml. Raises `RecipeError`."""
        found = read_recipes(file)
        if len(found) != 1:
            raise RecipeError(f"{str(file)!r} holds {len(found)} recipes, where one is wanted.")
        return found[0][0]

    def write(self, file: str | os.PathLike[str]) -> Path:
        """Write it as TOML; pictures and LoRA files by their places as seen from there. Raises `OutputError`."""
        folder = Path(file).absolute().parent.resolve()
        document = {
            key: {name: each for name, each in value.items() if each is not None} if isinstance(value, dict) else value
            for key, value in self.document().items()
        }
        for name in ("pictures", "loras"):
            if getattr(self, name):
                document[name] = [_seen_from(folder, path, self.origin) for path in getattr(self, name)]
        document["model"] = self.model if self.model in CATALOG else _seen_from(folder, self.model, self.origin)
        return write_document(file, document)

    def command(self, out: str | None = None) -> str:
        """The command line that makes the same film. Raises `RecipeError` for what no option can say."""
        words = ["diffmorpher", "morph", *map(_as_path, self.pictures)]
        for prompt in self.prompts[:1] if len(set(self.prompts)) == 1 else self.prompts:
            words += ["-p", prompt] if any(self.prompts) else []
        for lora in self.loras:
            words += ["--lora", _as_path(lora)]
        words += ["-o", _as_path(out or film_name(self.pictures) + ".mp4")]
        said = self.typed()
        if said is None:
            raise RecipeError("this film's recipe has settings that no option sets: write it with --save-recipe.")
        for name, value in said.items():
            each = BY_NAME[name]
            words += [each.flag(value)] if isinstance(value, bool) else [each.option, each.said(value)]
        return shlex.join(words)

    def typed(self) -> dict[str, Any] | None:
        """The fewest settings, by name, that make this recipe of its pictures, prompts and LoRAs; None where none do."""
        plain = Recipe(loras=self.loras, model=self.model)
        own = {} if self.model == Recipe.model else {"model": self.model}
        ways = []
        for preset in (
            dict.fromkeys(names, True) for n in range(len(PRESETS) + 1) for names in combinations(PRESETS, n)
        ):
            reached, said = plain.changed(**preset), own | preset
            for each in SETTINGS:
                value = each.get(self)
                if each.name in PRESETS or each.is_list or value == each.get(reached):
                    continue
                if each.sets is not VALUE and value == each.sets:
                    value = True
                elif each.sets is not VALUE or value is None:
                    continue
                reached, said = each.put(reached, value), said | {each.name: value}
            lists = {name: getattr(self, name) for name in _LISTS if name != "loras"}  # which a preset may take away
            if replace(reached, **lists) == self:
                ways.append(said)
        return min(ways, key=len, default=None)


_LISTS = ("pictures", "prompts", "loras", "picture_hashes", "lora_hashes")


def _texts(value: Any) -> tuple[str, ...]:
    """One text or path is a list of one, not of its letters. Raises `ConfigError`."""
    try:
        return tuple(map(os.fspath, [value] if isinstance(value, (str, os.PathLike)) else value))
    except TypeError as error:
        raise ConfigError(f"a recipe's lists hold texts and paths, not {value!r}.") from error


def _seen_from(folder: Path, file: str, origin: Path | None) -> str:
    place = Path(os.path.expanduser(file))
    if origin is not None and not os.path.exists(place):
        place = origin.parent / place
    return os.path.relpath(place.parent.resolve() / place.name, folder) if os.path.exists(place) else str(file)


def _as_path(name: str) -> str:
    return f"./{name}" if name.startswith("-") else name


def film_name(names: Sequence[str]) -> str:
    """What to call the film of these pictures: "cat-dog" for cat.png and dog.jpg."""
    return "-".join([PurePath(name).stem for name in names][:3])[:60] or "morph"


# ---- reading


def read_recipes(file: str | os.PathLike[str]) -> list[tuple[Recipe, str | None]]:
    """The recipes in a file, each with its output where the file is a batch. Raises `RecipeError`, naming the key."""
    path = Path(os.path.expanduser(file))
    documents = read_document(path)
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
            document = {key: _of_text(key, value) for key, value in document.items()}
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
    _check_keys(document, names, where)
    if "loras" in document and document.get("fit", True) is not True:
        raise RecipeError(f"{where}: loras and fit contradict each other: leave one out.")
    try:
        start = Recipe(model=_checked("model", document.pop("model", "mini"), str))
        values: dict[str, Any] = {}
        for key, value in document.items():
            values[key] = _section(key, value, start, where) if key in CONFIGS else _plain(key, value)
        return replace(start, **values, origin=origin)
    except RecipeError:
        raise
    except ConfigError as error:
        raise RecipeError(f"{where}: {error}") from error


def _check_keys(given: Mapping[str, Any], known: Collection[str], where: str, section: str = "") -> None:
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            guess = f"did you mean {section}{close[0]}?" if close else f"there are {', '.join(known)}."
            raise RecipeError(f"{where}: the key {section + key!r} is not known; {guess}")


def _section(key: str, value: Any, start: Recipe, where: str) -> Any:
    if isinstance(value, bool) and key == "fit":
        return start.fit if value else None
    if not isinstance(value, dict):
        raise ConfigError(f"{key} is {value!r}, but must be a table of settings{' or false' if key == 'fit' else ''}.")
    _check_keys(value, list(LIMITS[key]), where, f"{key}.")
    for name, each in value.items():
        try:
            LIMITS[key][name].check(each)
        except ConfigError as error:
            raise ConfigError(f"{key}.{name}: {error}") from error
    return replace(cast(Any, getattr(start, key)), **value)


def _plain(key: str, value: Any) -> Any:
    if key in _LISTS:
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise ConfigError(f"{key} is {value!r}, but must be a list of texts.")
        return tuple(value)
    if key == "size":
        return parse_size(value) if isinstance(value, str) else check_size(_checked("size", value, list))
    return _checked(key, value, str) if key in ("device", "dtype") else value  # the rest have limits


def _checked(key: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ConfigError(f"{key} is {value!r}, but must be a {'text' if kind is str else 'list'}.")
    return value


def _of_text(key: str, value: Any, section: str = "") -> Any:
    """A table's cell as what its setting takes; what it cannot be is left for the checks to name."""
    if isinstance(value, dict):
        return {name: _of_text(name, each, key) for name, each in value.items()}
    limits = LIMITS.get(section, {}).get(key)
    if not isinstance(value, str) or (limits is None and key != "fit"):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        return int(value) if re.fullmatch(r"-?\d+", value) else float(value)
    except ValueError:
        return value
