"""A recipe's values as they stand in a file: TOML, a table's cells, a film's metadata."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from .config import shown
from .errors import ConfigError, RecipeError
from .settings import LIMITS, check_size, parse_numbers, parse_size, split_weight

#: The keys of lists of texts.
LISTS = ("pictures", "prompts", "loras", "styles", "focus", "picture_hashes", "lora_hashes", "style_hashes")


# ---- written


def as_stored(config: Any) -> dict[str, Any]:
    """As it comes back from a file."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}


def texts(value: Any) -> tuple[str, ...]:
    """One text or path is a list of one, not of its letters. Raises `ConfigError`."""
    try:
        return tuple(map(os.fspath, [value] if isinstance(value, (str, os.PathLike)) else value))
    except TypeError as error:
        raise ConfigError(f"a recipe's lists hold texts and paths, not {value!r}.") from error


def seen_from(folder: Path, file: str, origin: Path | None) -> str:
    """A file's place relative to a folder; as it is where it is not found, also not beside the recipe's own file."""
    file, weight = (file, "") if os.path.exists(file) else split_weight(file)
    place = Path(os.path.expanduser(file))
    if origin is not None and not os.path.exists(place):
        place = origin.parent / place
    return (os.path.relpath(place.parent.resolve() / place.name, folder) if os.path.exists(place) else file) + weight


# ---- read


def check_keys(given: Mapping[str, Any], known: Collection[str], where: str, table: str = "") -> None:
    """Raise `RecipeError` for a key that is not known, with the nearest that is."""
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            guess = f"did you mean {table}{close[0]}?" if close else f"there are {', '.join(known)}."
            raise RecipeError(f"{where}: the key {table + key!r} is not known; {guess}")


def section(key: str, value: Any, start: Any, where: str) -> Any:
    """The settings of a table, such as `[fit]`, on top of the recipe `start`'s. Raises `ConfigError`, `RecipeError`."""
    if isinstance(value, bool) and key == "fit":
        return start.fit if value else None
    if not isinstance(value, dict):
        raise ConfigError(
            f"{key} is {shown(value)}, but must be a table of settings{' or false' if key == 'fit' else ''}."
        )
    check_keys(value, list(LIMITS[key]), where, f"{key}.")
    for name, each in value.items():
        try:
            LIMITS[key][name].check(each)
        except ConfigError as error:
            raise ConfigError(f"{key}.{name}: {error}") from error
    return replace(cast(Any, getattr(start, key)), **value)


def plain(key: str, value: Any) -> Any:
    """A value outside the tables, as the recipe's field takes it. Raises `ConfigError` where its own checks would not."""
    if key in LISTS:
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise ConfigError(f"{key} is {shown(value)}, but must be a list of texts.")
        return tuple(value)
    if key == "size":
        return parse_size(value) if isinstance(value, str) else check_size(checked("size", value, list))
    return (
        checked(key, value, str) if key in ("device", "dtype", "vae", "audio", "audio_hash") else value
    )  # the rest have limits


def check_names(recipe: Any) -> None:
    """Raise `ConfigError` where a recipe's model or a file of it is no text that can be a name."""
    for key in ("model", "vae", "audio", "device", "dtype"):
        value = getattr(recipe, key)
        if (value is not None or key == "model") and (not isinstance(value, str) or value == "" or "\0" in value):
            raise ConfigError(f"{key} is {shown(value)}, but must be a name.")


def checked(key: str, value: Any, kind: type) -> Any:
    """The value, if it is a text or a list as it should be. Raises `ConfigError`."""
    if not isinstance(value, kind):
        raise ConfigError(f"{key} is {shown(value)}, but must be a {'text' if kind is str else 'list'}.")
    return value


def of_text(key: str, value: Any, table: str = "") -> Any:
    """A table's cell as what its setting takes; what it cannot be is left for the checks to name."""
    if isinstance(value, dict):
        return {name: of_text(name, each, key) for name, each in value.items()}
    limits = LIMITS.get(table, {}).get(key)
    if not isinstance(value, str) or (limits is None and key != "fit"):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    if limits is not None and limits.many:
        return parse_numbers(value, limits.label)
    try:
        return int(value) if re.fullmatch(r"-?\d+", value) else float(value)
    except ValueError:
        return value
