"""Recipes as they lie on a disk: in a film's metadata, in a TOML file, or many of them in a TOML file or a table.

Only the form is known here; what the keys mean, and what may stand behind them, is known by `recipe.py`.
"""

from __future__ import annotations

import csv
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from ..errors import ImageError, OutputError, RecipeError
from .atomic import cannot_write, replacing
from .films import FORMATS, read_settings
from .places import is_plain

#: Of a TOML file of recipes, and of a key in it.
MAX_BYTES, MOST_DOTS = 4 * 2**20, 64
_TEXTS_AND_COMMENTS = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|' r"'''.*?'{3,5}|" r'"(?:[^"\\\n]|\\.)*"|' r"'[^'\n]*'|#[^\n]*", re.DOTALL
)
_BETWEEN_KEYS = re.compile(r"[=,\[\]{}\n]")


def read_document(file: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The recipes in a file: that of a film, a contact sheet, a folder of frames or a .toml, or all of a batch.

    A batch is a .toml with `[[film]]` tables, whose other keys hold for every film, or a .csv with a line for each film:
    columns image_0, image_1 ..., prompt_0 ..., name or out, and keys such as frames or fit.steps; its values are texts.
    Films of a batch have an `out`, which may be None.
    Raises `RecipeError` for what holds none.
    """
    if not isinstance(file, (str, os.PathLike)):
        raise RecipeError(f"a recipe is read from a path, not from {file!r:.100}.")
    path = Path(os.path.expanduser(file))
    if not os.path.exists(path):
        raise RecipeError(f"the recipe {str(file)!r} does not exist: check the path.")
    if not path.is_dir() and not is_plain(path):
        raise RecipeError(
            f"the recipe {str(file)!r} is no plain file, but a pipe or a device: save it as a file first."
        )
    suffix = path.suffix.lower()
    try:
        if suffix == ".toml" and not path.is_dir():
            return _films(path, tomllib.loads(_checked(path)))
        if suffix == ".csv" and not path.is_dir():
            with path.open(newline="", encoding="utf-8-sig") as opened:
                return [_row(row) for row in csv.DictReader(opened) if any(row.values())]
    except (OSError, ValueError, csv.Error, RecursionError) as error:  # TOMLDecodeError is a ValueError
        raise RecipeError(f"the recipe {str(file)!r} cannot be read: {str(error).rstrip('.')}.") from error
    if not path.is_dir() and suffix not in FORMATS:
        raise RecipeError(
            f"{str(file)!r} is no recipe: give a film ({', '.join(FORMATS)}), a folder of frames, a .toml or a .csv."
        )
    try:
        settings = read_settings(path)
    except ImageError as error:
        raise RecipeError(str(error)) from error
    if settings is None:
        raise RecipeError(
            f"{str(file)!r} holds no recipe: diffmorpher did not make it, or something removed its metadata."
        )
    return [settings]


def _checked(path: Path) -> str:
    """The text of a TOML file that can be parsed in a moment. Raises `ValueError`.

    Python's parser takes time with the square of a dotted key's parts, and for each table with all that came before.
    """
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES >> 20} MiB")
    text = path.read_text("utf-8-sig")
    for part in _BETWEEN_KEYS.split(_TEXTS_AND_COMMENTS.sub('""', text)):
        if part.count(".") > MOST_DOTS:
            raise ValueError(f"it has a key of more than {MOST_DOTS} parts: {part.strip():.40}...")
    return text


def toml_path(file: Any) -> Path:
    """Where a recipe is written. Raises `OutputError` for what is no path, or of another format."""
    if not isinstance(file, (str, os.PathLike)):
        raise OutputError(f"a recipe is written to a path, not to {file!r:.100}.")
    path = Path(file)
    if path.suffix.lower() != ".toml":
        raise OutputError(f"the recipe {str(file)!r} must end in .toml: it is written in no other format.")
    return path


def write_document(file: str | os.PathLike[str], document: Mapping[str, Any]) -> Path:
    """Write one recipe as TOML. Raises `OutputError`."""
    path = toml_path(file)
    try:
        with replacing(path) as part:
            part.write_text(tomli_w.dumps(document), "utf-8")
    except (OSError, ValueError) as error:  # names that are no UTF-8
        raise cannot_write(f"the recipe {str(file)!r}", error) from error
    return path


def _films(path: Path, document: dict[str, Any]) -> list[dict[str, Any]]:
    films = document.pop("film", None)
    if films is None:
        return [document]
    if not isinstance(films, list) or not films or not all(isinstance(film, dict) for film in films):
        raise RecipeError(f"{str(path)!r}: film is no list of tables; begin each film with [[film]].")
    return [_merged(document, film) for film in films]


def _merged(common: Mapping[str, Any], film: Mapping[str, Any]) -> dict[str, Any]:
    """The film's keys before the common ones, also within the tables that both have; `out`, if only None, marks a batch."""
    tables = [key for key in common if isinstance(common[key], dict) and isinstance(film.get(key), dict)]
    return {"out": None, **common, **film} | {key: common[key] | film[key] for key in tables}


def _row(row: Mapping[str | None, Any]) -> dict[str, Any]:
    """A line of a table; empty cells say nothing."""
    document: dict[str, Any] = {"out": None}
    lists: dict[str, dict[int, str]] = {"image": {}, "prompt": {}, "lora": {}}
    for column, text in row.items():
        if column is None:
            raise RecipeError(f"a line has more cells than there are columns: {text!r}.")
        name, _, number = column.strip().rpartition("_")
        if name in lists and number.isdigit():
            lists[name][int(number)] = text or ""
        elif (text or "").strip():
            section, _, key = column.strip().rpartition(".")
            place = document.setdefault(section, {}) if section else document
            if not isinstance(place, dict) or isinstance(place.get(key), dict):
                raise RecipeError(f"a column {section or key} and columns {section or key}.* contradict each other")
            place[key] = text.strip()
    for name, key in (("image", "pictures"), ("prompt", "prompts"), ("lora", "loras")):
        values = [text.strip() for _, text in sorted(lists[name].items())]
        while values and not values[-1]:
            values.pop()  # of a film with fewer pictures than others
        if values:
            document[key] = values
    return document
