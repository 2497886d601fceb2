"""What the page's prepared paths and films depend on, so that what was made already is not made again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..files.atomic import file_hash
from ..recipe import Recipe
from ..settings import split_weight


def path_options(recipe: Recipe) -> dict[str, Any]:
    """A recipe's part in `Morpher.prepare`."""
    return {name: value for name, value in recipe.options().items() if name not in ("sample", "schedule")}


def fit_key(recipe: Recipe) -> str:
    """Of everything that a prepared path depends on."""
    loras = tuple((file_hash(file), weight) for file, weight in map(split_weight, recipe.loras))
    options = path_options(recipe) | {"loras": loras, "loop": None}
    parts = (recipe.model, recipe.prediction, sorted(options.items()), recipe.style_hashes, recipe.picture_hashes)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def frames_key(
    recipe: Recipe, images: Sequence[Image.Image], path_file: Path | None, loras: Sequence[Path], audio: Path | None
) -> str:
    """Of all that a film's frames depend on: what is left out says how they are played."""
    count = (recipe.frames, recipe.seconds, recipe.fps) if path_file else recipe.frame_count(len(images))
    beat = (recipe.fps, recipe.reverse, file_hash(audio)) if audio is not None and recipe.beat else None
    files = [file_hash(file) for file in (*loras, *filter(None, [path_file]))]
    return repr((fit_key(replace(recipe, loras=())), files, recipe.sample, recipe.schedule, recipe.loop, count, beat))
