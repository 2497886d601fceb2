"""What the page adds to the table of settings: which of them it shows, its limits, and how it reads what browsers send."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from ..errors import ConfigError
from ..recipe import Recipe
from ..settings import BY_NAME, PRESETS, VALUE, Setting, parse_numbers, parse_size

#: What one visitor may ask of a machine that others wait for. The command line has no such limits.
MAX_PICTURES, MAX_SIDE = 8, 1024
MOST = {"frames": 240, "fps": 60, "hold": 10, "guidance": 15, "steps": 200, "lora_steps": 2000, "lora_rank": 128}
LEAST_FPS = 1
MAX_PROMPT = 500  # characters

#: The settings on the page and of the service, in its order; a later one stands last, as programs may give them by place.
#: "preset" names one of `PRESETS`, or none. Not `vae`: it would have the server read any file a visitor names.
NAMES = (
    *(
        "model",
        "frames",
        "fps",
        "loop",
        "ping_pong",
        "reverse",
        "seconds",
        "hold",
        "stretch",
        "ease",
        "quality",
        "transparent",
        "beat",
    ),
    *("size", "resize", "focus", "seed", "no_lora", "lora_steps", "lora_rank"),
    *("lora_lr", "fix_lora", "steps", "attention_lambda", "adain", "reschedule", "guidance", "preset"),
    "prediction",
)
_PLAIN = Recipe()


def chosen(values: Mapping[str, Any]) -> Recipe:
    """The recipe, but for its pictures, that a page or a client asks for: numbers may come as text or as 4.0.

    What is empty, or stands at the default, is left to the preset and the model. Raises `ConfigError`.
    """
    typed: dict[str, Any] = {}
    for name in NAMES:
        value = values.get(name)
        if name == "preset":
            if value and value not in [*PRESETS]:  # which need not be hashable
                raise ConfigError(f"preset is {value!r:.40}, but must be one of {', '.join(PRESETS)}, or empty.")
            typed |= {value: True} if value else {}
        elif value is not None and value != "":
            read = _read(BY_NAME[name], value)
            if read is not None and read != shown(BY_NAME[name], _PLAIN):
                typed[name] = read
    recipe = _PLAIN.changed(**typed)
    for name, most in MOST.items():
        value = typed.get(name)
        _at_most(BY_NAME[name].label, max(value, default=None) if isinstance(value, tuple) else value, most)
    check_frames(recipe.frames)
    if isinstance(recipe.size, tuple):
        _at_most("side of the size", max(recipe.size), MAX_SIDE)
    if recipe.fps < LEAST_FPS:
        raise ConfigError(f"fps is {recipe.fps:g}, but must be at least {LEAST_FPS} on this page.")
    return recipe


def check_frames(count: int) -> None:
    """Raises `ConfigError` for a film that is too long for this page, however its length was said."""
    _at_most(BY_NAME["frames"].label, count, MOST["frames"])


def shown(each: Setting, recipe: Recipe) -> Any:
    """A recipe's value as the page's field shows it: empty for what is the model's own."""
    value = each.get(recipe)
    if each.sets is not VALUE:
        return value == each.sets
    if each.is_model_own and value == each.get(Recipe(model=recipe.model)):
        return ""
    if value is None:
        return ""
    if each.is_list:
        return "; ".join(value)
    return each.said(value) if isinstance(value, tuple) else value


def fields_of(recipe: Recipe) -> tuple[dict[str, Any], list[str]]:
    """What stands in the page's fields for a recipe, by name; and the settings that it has and the page has no field for."""
    typed = recipe.typed()
    if typed is None:
        typed, missing = {}, ["settings that only a file has"]
    else:
        missing = [BY_NAME[name].option for name in typed if name not in (*NAMES, *PRESETS, "audio")]
    preset = next((name for name in PRESETS if name in typed), "")
    values = {name: shown(BY_NAME[name], _PLAIN) for name in NAMES if name != "preset"} | {"preset": preset}
    said = {name: shown(BY_NAME[name], recipe) or BY_NAME[name].get(recipe) for name in typed if name in NAMES}
    return values | said | {"focus": shown(BY_NAME["focus"], recipe)}, missing


#: Settings of which each picture, or each way from one to the next, may have its own value: what stands between the values, and
#: what an empty one means.
EACH = {"hold": (",", "0"), "stretch": (",", "1"), "focus": (";", "center")}


def one_each(name: str, text: Any, count: int) -> list[str]:
    """The values of such a field, one for each of `count`, "" where nothing is said: a single one stands for all."""
    between, plain = EACH[name]
    values = [value.strip() for value in str(text or "")[:400].split(between)]
    values = values * count if len(values) == 1 and name != "stretch" else values
    return ["" if value == plain and name != "stretch" else value for value in [*values, *[""] * count][:count]]


def long_enough(name: str, text: Any, count: int) -> str:
    """The field with a value more where pictures have come; what was said for pictures still to come stays."""
    said = str(text or "")
    given = len(said.split(EACH[name][0])) if said.strip() else 0
    few = given and given < count and (given > 1 or name == "stretch")
    return together(name, one_each(name, said, count)) if few else said


def together(name: str, values: Sequence[str]) -> str:
    """The field of such values, as short as it can be said."""
    between, plain = EACH[name]
    values = [str(value or "").strip().replace(between, "") for value in values]
    if not any(values):
        return ""
    full = [value or plain for value in values]
    return full[0] if len(set(full)) == 1 and name != "stretch" else between.join(full)


def weighted(files: Sequence[Path], weights: Any) -> list[tuple[Path, float]]:
    """Each file with its strength. weights: text of one for all or one each, or nothing for 1. Raises `ConfigError`."""
    given = parse_numbers(str(weights or "").strip()[:400] or "1", "the strength")
    if len(given) not in (1, len(files)):
        raise ConfigError(f"{len(given)} strengths were given for {len(files)} styles: give one for all, or one each.")
    return [*zip(files, given * len(files) if len(given) == 1 else given, strict=True)] if files else []


def different_names(names: Sequence[str]) -> list[str]:
    """The same names, but the second photo.png becomes photo-2.png, so that a command can tell them apart."""
    unique: list[str] = []
    for name in names:
        path, n, new = PurePath(name), 1, name
        while new in unique:
            n += 1
            new = f"{path.stem}-{n}{path.suffix}"
        unique.append(new)
    return unique


def _at_most(name: str, value: float | None, most: int) -> None:
    if value is not None and value > most:
        raise ConfigError(f"{name} is {value:g}, but can be at most {most} on this page; the command line takes more.")


def _read(each: Setting, value: Any) -> Any:
    """What was sent as what the setting takes; its own checks come later."""
    limits = each.limits
    if each.is_list:
        parts = value if isinstance(value, (list, tuple)) else str(value)[:400].split(";")
        return [str(part).replace(" ", "") for part in parts]
    if each.is_switch:
        if not isinstance(value, bool):
            raise ConfigError(f"{each.label} is {value!r:.40}, but must be true or false.")
        return value
    if each.name == "size":
        return parse_size(str(value)[:400].strip().lower().replace("×", "x") or None)
    if limits is not None and limits.many:
        texts = [str(part) for part in value] if isinstance(value, (list, tuple)) else [str(value)[:400]]
        return parse_numbers(",".join(texts), limits.label)
    if limits is None or limits.choices:
        return str(value).strip()[:400]
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ConfigError(f"{limits.label} is {str(value)[:40]!r}, but must be a number.")
    if limits.kind is float:
        return number
    if number != int(number):
        raise ConfigError(f"{limits.label} is {value!r}, but must be a whole number.")
    try:
        return int(value)  # exact, unlike a float, also as text
    except ValueError:
        return int(number)  # "4.0"
