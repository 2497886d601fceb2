"""What is checked before a film is put into the line: one set for whoever asks, on the page or over HTTP. Limits of numbers
are in `settings.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from ..errors import ConfigError, ImageError
from ..files.pictures import READ_FORMATS, image_hash, load_image
from ..gather import same_neighbours
from ..recipe import Recipe
from .settings import MAX_PICTURES, MAX_PROMPT, check_frames

#: Limits of a picture, and of a path, LoRA or sound file.
MAX_PICTURE_BYTES, MAX_PICTURE_PIXELS, MAX_FILE_BYTES = 25 * 2**20, 50_000_000, 256 * 2**20


def of_pictures(recipe: Recipe, names: Sequence[str], prompts: Sequence[str]) -> Recipe:
    """The recipe of pictures that were not looked into yet. Raises `ConfigError` where their numbers do not go together."""
    if len(names) > MAX_PICTURES:
        raise ConfigError(f"{len(names)} pictures were given: give at most {MAX_PICTURES}.")
    texts = tuple(" ".join(prompt.split())[:MAX_PROMPT] for prompt in prompts)
    recipe = replace(recipe, pictures=tuple(names), prompts=texts)
    recipe.check()
    check_frames(recipe.frame_count(len(names)))
    return recipe


def with_pictures(recipe: Recipe, names: Sequence[str], files: Sequence[Path]) -> tuple[Recipe, list[Image.Image]]:
    """The recipe with what its pictures hold, and these. Raises `ImageError` for two in a row that are the same."""
    images = [load_image(file, recipe.transparent) for file in files]
    hashes = tuple(map(image_hash, images))
    if same := same_neighbours(hashes, recipe.loop):
        one, other = (names[i] for i in same)
        raise ImageError(f"{one!r} and {other!r} are the same picture: give two that differ.")
    return replace(recipe, picture_hashes=hashes), images


def check_picture(file: Path) -> None:
    """Raises `ImageError` for what cannot be morphed, naming the picture as whoever sent it knows it."""
    try:
        check_bytes(file, MAX_PICTURE_BYTES)
        try:
            with Image.open(file, formats=READ_FORMATS) as image:
                pixels = image.width * image.height
        except Exception:
            pixels = 0  # load_image says why
        if pixels > MAX_PICTURE_PIXELS:
            raise ImageError(f"Picture {file.name!r} has {pixels / 1e6:.0f} megapixels: at most 50 can be used here.")
        load_image(file)
    except ImageError as error:
        raise ImageError(str(error).replace(repr(str(file)), repr(file.name))) from error


def check_bytes(file: Path, most: int) -> None:
    """Raises `ImageError` for a file that is too large, or gone."""
    if not file.is_file():
        raise ImageError(f"{file.name!r} is not here any more: add it again.")
    if file.stat().st_size > most:
        raise ImageError(
            f"{file.name!r} has {file.stat().st_size / 2**20:.0f} MB: at most {most // 2**20} MB are taken."
        )
