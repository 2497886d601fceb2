"""Finding the files of a recipe, and looking whether they are the ones it was written for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

from PIL import Image

from .errors import ImageError, RecipeError
from .files.atomic import file_hash
from .files.focus import settled_focus
from .files.pictures import image_hash, load_image
from .files.sound import read_sound
from .recipe import Recipe
from .settings import split_weight


def gather(recipe: Recipe, given: Sequence[str | os.PathLike[str]] = ()) -> tuple[Recipe, list[Image.Image]]:
    """The recipe with its files where they are, their hashes and a prompt each; its pictures, no two neighbours the same.

    given: the pictures, in place of those looked for. A file of a recipe that was read is looked for as it is named there,
    beside it and in the working folder; where its hash is known it must be that file. So is a model that is a folder or a file.
    Raises `RecipeError`, `ImageError`.
    """
    names = [os.fspath(file) for file in given] or list(recipe.pictures)
    if given and recipe.picture_hashes and len(given) != len(recipe.picture_hashes):
        raise RecipeError(f"{len(given)} pictures were given for a recipe of {len(recipe.picture_hashes)}: give each.")
    replace(recipe, pictures=tuple(names)).check()
    called = recipe.pictures if len(recipe.pictures) == len(names) else names
    files, pictures = [], []
    for i, name in enumerate(names):
        wanted = recipe.picture_hashes[i] if recipe.picture_hashes else None
        places = [Path(os.path.expanduser(name))] if given else _places(recipe, name)
        match, others = None, []
        for place in places:
            picture = load_image(place, recipe.transparent)
            if wanted in (None, image_hash(picture)):
                match = place, picture
                break
            others.append(place)
        if match is None:
            raise RecipeError(
                f"pictures: {str(others[0])!r} is another picture than the {Path(called[i]).name!r} that "
                f"{recipe.origin or 'the recipe'} was made of: give the right one. (To use another, write the recipe down "
                "and take picture_hashes out of it.)"
            )
        files.append(str(match[0]))
        pictures.append(match[1])
    hashes = [image_hash(picture) for picture in pictures]
    if same := same_neighbours(hashes, recipe.loop):
        one, other = (files[i] for i in same)
        raise ImageError(
            f"{one!r} and {other!r} are the same picture, so there is nothing to morph: give two that differ."
        )
    loras, lora_hashes = _lora_files(recipe, "loras", recipe.lora_hashes)
    styles, style_hashes = _lora_files(recipe, "styles", recipe.style_hashes)
    prompts = (recipe.prompts or ("",)) * (1 if len(recipe.prompts) > 1 else len(files))
    found = replace(
        recipe, prompts=prompts, pictures=tuple(files), picture_hashes=tuple(hashes), model=recipe.model_place()
    )
    found = replace(found, vae=recipe.loading()["vae"])
    found = replace(found, focus=settled_focus(recipe.focus, pictures))
    found = replace(found, loras=loras, lora_hashes=lora_hashes, styles=styles, style_hashes=style_hashes)
    return replace(found, **_sound(recipe)), pictures


def same_neighbours(hashes: Sequence[str], loop: bool) -> tuple[int, int] | None:
    """The first two neighbours that are the same picture, by their numbers; in a loop the last and the first are neighbours."""
    for i in range(len(hashes) if loop else len(hashes) - 1):
        j = (i + 1) % len(hashes)
        if hashes[i] == hashes[j]:
            return i, j
    return None


def _lora_files(recipe: Recipe, key: str, hashes: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Where the LoRAs or styles are, with their weights, and their hashes."""
    files, digests = [], []
    for text, wanted in zip(getattr(recipe, key), hashes or repeat(None), strict=bool(hashes)):
        name, weight = split_weight(text)
        places = _places(recipe, name, key)
        for file in places:
            if not os.path.isfile(file):
                raise RecipeError(f"the LoRA {str(file)!r} does not exist or is a folder: check the path.")
        found = {file: file_hash(file) for file in places}
        match = next((file for file in places if wanted in (None, found[file])), None)
        if match is None:
            raise RecipeError(
                f"{key}: {str(places[0])!r} is another file than {recipe.origin or 'the recipe'} was made with: "
                "give that one."
            )
        files.append(f"{match}{weight}")
        digests.append(found[match])
    return tuple(files), tuple(digests)


def _sound(recipe: Recipe) -> dict[str, Any]:
    """The sound's file and hash, after a look whether it is one."""
    if recipe.audio is None:
        return {}
    places = _places(recipe, recipe.audio, "audio")
    for file in places:
        read_sound(file, 0.1)
    match = next((file for file in places if recipe.audio_hash in (None, file_hash(file))), None)
    if match is None:
        raise RecipeError(
            f"audio: {str(places[0])!r} is another file than {recipe.origin or 'the recipe'} was made with: give that one."
        )
    return {"audio": str(match), "audio_hash": file_hash(match)}


def _places(recipe: Recipe, name: str, key: str = "pictures") -> list[Path]:
    """Where a file of that name is: one place at least, which may be empty for a name that was typed."""
    place = Path(os.path.expanduser(name))
    if recipe.origin is None or place.is_absolute():
        return [place]
    there = [folder / place for folder in (recipe.origin.parent, Path()) if os.path.exists(folder / place)]
    if not there:
        hint = f"; give them: morph --from {recipe.origin} {' '.join(recipe.pictures)}" if key == "pictures" else ""
        raise RecipeError(f"{key}: {name!r} is neither beside {recipe.origin} nor in the working folder{hint}.")
    return there
