"""A recipe as it is typed: the fewest options that say it."""

from __future__ import annotations

import shlex
from dataclasses import replace
from itertools import combinations
from typing import Any

from .documents import LISTS
from .errors import RecipeError
from .settings import BY_NAME, PRESETS, SETTINGS, VALUE


def command_line(recipe: Any, out: str) -> str:
    """The command line that makes the same film, at `out`. Raises `RecipeError` for what no option can say."""
    words = ["diffmorpher", "morph", *map(_as_path, recipe.pictures)]
    for prompt in recipe.prompts[:1] if len(set(recipe.prompts)) == 1 else recipe.prompts:
        words += ["-p", prompt] if any(recipe.prompts) else []
    for lora in recipe.loras:
        words += ["--lora", _as_path(lora)]
    for style in recipe.styles:
        words += ["--style", _as_path(style)]
    for focus in recipe.focus:
        words += ["--focus", focus]
    words += ["-o", _as_path(out)]
    said = fewest_settings(recipe)
    if said is None:
        raise RecipeError("this film's recipe has settings that no option sets: write it with --save-recipe.")
    for name, value in said.items():
        each = BY_NAME[name]
        words += [each.flag(value)] if isinstance(value, bool) else [each.option, each.said(value)]
    return shlex.join(words)


def fewest_settings(recipe: Any) -> dict[str, Any] | None:
    """The fewest settings, by name, that make this recipe of its pictures, prompts and LoRAs; None where none do."""
    kind = type(recipe)
    plain = kind(loras=recipe.loras, styles=recipe.styles, model=recipe.model, origin=recipe.origin)
    own: dict[str, Any] = {} if recipe.model == kind.model else {"model": recipe.model}
    ways = []
    for preset in (dict.fromkeys(names, True) for n in range(len(PRESETS) + 1) for names in combinations(PRESETS, n)):
        reached, said = plain.changed(**preset), own | preset
        for each in SETTINGS:
            value = each.get(recipe)
            if each.name in PRESETS or each.is_list or value == each.get(reached):
                continue
            if each.sets is not VALUE and value == each.sets:
                value = True
            elif each.sets is not VALUE or value is None:
                continue
            reached, said = each.put(reached, value), said | {each.name: value}
        if "stretch" in said and recipe.seconds is None:  # which alone says how many frames there are
            said.pop("frames", None)
            said |= {} if reached.in_seconds().frames == recipe.frames else {"frames": recipe.frames}
        files = {name: getattr(recipe, name) for name in (*LISTS, "audio_hash") if name not in ("loras", "styles")}
        if replace(reached, **files) == recipe:  # a preset may have taken away the LoRAs
            ways.append(said)
    return min(ways, key=len, default=None)


def _as_path(name: str) -> str:
    return f"./{name}" if name.startswith("-") else name
