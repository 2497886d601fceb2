"""Data sets of image pairs: the bundled `mini`, MorphBench as published, any folder laid out like it, any manifest."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from ..files.pictures import SUFFIXES
from ..files.places import is_plain
from ..models.catalog import ASSETS

_IMAGE = re.compile(r"image_(\d+)")
_PROMPT = re.compile(r"prompt_(\d+)")
_MANIFESTS = {".csv", ".jsonl"}
#: What a run writes beside its pairs' folders.
OUTPUTS = ("results.json", "results.csv", "report.html")


@dataclass(frozen=True)
class Pair:
    """Two images or more that are morphed, with a prompt each ("" where there is none)."""

    name: str
    category: str
    images: tuple[Path, ...]
    prompts: tuple[str, ...]

    @property
    def key(self) -> str:
        """Digest of the pictures' bytes and the prompts: the same wherever the files lie and whatever they are called."""
        digest = hashlib.sha256()
        for image, prompt in zip(self.images, self.prompts, strict=True):
            digest.update(hashlib.sha256(image.read_bytes()).digest() + hashlib.sha256(prompt.encode()).digest())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Dataset:
    name: str
    pairs: list[Pair]

    @property
    def has_prompts(self) -> bool:
        return any(any(pair.prompts) for pair in self.pairs)

    def take(self, count: int | None) -> list[Pair]:
        """The first `count` pairs, category by category in turn, so that few pairs are still of all kinds."""
        if count is None:
            return self.pairs
        place: dict[str, int] = {}
        turns: list[int] = []
        for pair in self.pairs:
            place[pair.category] = place.get(pair.category, -1) + 1
            turns.append(place[pair.category])
        order = sorted(range(len(self.pairs)), key=lambda i: (turns[i], i))[:count]
        return [self.pairs[i] for i in sorted(order)]


def load_dataset(data: str) -> Dataset:
    """Read a data set.

    data: "mini", the bundled one; a manifest, .csv or .jsonl, with the columns image_0, image_1, ... (paths beside it) and
    optionally prompt_0, ..., category and name; or a folder of pairs `<name>_0.*`, `<name>_1.*`, directly or in one folder
    for each category, as MorphBench has them (Metamorphosis/, Animation/). A folder may hold prompts.csv (a line each of:
    name, first prompt, second prompt) or prompts.json ({name: [first, second]}).

    Raises `DataError` for what cannot be used.
    """
    if data == "mini":
        return Dataset("mini", _from_manifest(ASSETS / "bench" / "pairs.csv"))
    try:
        return _load(data)
    except (OSError, RecursionError) as error:
        raise DataError(
            f"the data set {data!r} cannot be read ({getattr(error, 'strerror', None) or error})."
        ) from error


def _load(data: str) -> Dataset:
    path = Path(data)
    if path.is_dir():
        pairs = _from_folder(path)
    elif path.suffix.lower() in _MANIFESTS and path.is_file():
        pairs = _from_manifest(path)
    else:
        raise DataError(
            f"the data set {data!r} is not known: give 'mini', a folder of pairs, or a .csv or .jsonl file."
        )
    if not pairs:
        raise DataError(
            f"{data!r} holds no pairs: pictures are called <name>_0.* and <name>_1.*, or listed in a .csv file."
        )
    names = [pair.name for pair in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{data!r} has two pairs called {twice!r}: each needs a name of its own.")
    return Dataset(path.resolve().name if path.is_dir() else path.stem, pairs)


# ---- folders


def _from_folder(folder: Path) -> list[Pair]:
    manifest = next(
        (folder / f"pairs{suffix}" for suffix in sorted(_MANIFESTS) if (folder / f"pairs{suffix}").is_file()), None
    )
    if manifest:
        return _from_manifest(manifest)
    prompts = _read_prompts(folder)
    pairs = _pairs_in(folder, "", prompts)
    for inner in sorted(child for child in folder.iterdir() if child.is_dir()):
        pairs += _pairs_in(inner, inner.name, prompts | _read_prompts(inner))
    return pairs


def _pairs_in(folder: Path, category: str, prompts: Mapping[str, list[str]]) -> list[Pair]:
    halves: dict[str, dict[int, Path]] = {}
    for file in sorted(folder.iterdir()):
        stem, _, number = file.stem.rpartition("_")
        if file.suffix.lower() in SUFFIXES and stem and number in ("0", "1"):
            if int(number) in halves.setdefault(stem, {}):
                raise DataError(f"{str(folder)!r} has two pictures called {file.stem!r}: remove one.")
            halves[stem][int(number)] = file
    pairs = []
    for stem, files in halves.items():
        if len(files) == 1:
            here = next(iter(files.values()))
            raise DataError(f"{str(here)!r} has no partner: {stem}_{1 - next(iter(files))}.* is missing beside it.")
        given = prompts.get(f"{category}/{stem}", prompts.get(stem, ["", ""]))
        name = f"{category}-{stem}" if category else stem
        pairs.append(Pair(name, category or "all", (files[0], files[1]), (given[0], given[1])))
    return pairs


def _read_prompts(folder: Path) -> dict[str, list[str]]:
    """{pair name, or category/name: two prompts}, from prompts.csv or prompts.json; empty where there is neither."""
    prompts: dict[str, list[str]] = {}
    for file in (folder / "prompts.csv", folder / "prompts.json"):
        if not file.is_file():
            continue
        try:
            if file.suffix == ".json":
                rows = [[name, *texts] for name, texts in json.loads(file.read_text("utf-8")).items()]
            else:
                with file.open(newline="", encoding="utf-8-sig") as opened:
                    rows = [row for row in csv.reader(opened) if row]
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"{str(file)!r} cannot be read ({error}): it should give two prompts for each name."
            ) from error
        for row in rows:
            if len(row) != 3 or not all(isinstance(cell, str) for cell in row):
                raise DataError(f"{str(file)!r} has the entry {row!r}: a name and two prompts are needed.")
            prompts[row[0]] = row[1:]
    return prompts


def read_text(file: Path) -> str:
    """The text of a plain file: a pipe may never say anything. Raises `OSError`, `ValueError`."""
    if not is_plain(file):
        raise ValueError("it is no plain file, but a pipe or a device")
    return file.read_text("utf-8")


# ---- manifests


def _from_manifest(file: Path) -> list[Pair]:
    pairs = [_pair(file, line, row) for line, row in enumerate(_rows(file), start=1)]
    return pairs


def _rows(file: Path) -> Iterable[Mapping[str, str]]:
    try:
        if file.suffix.lower() == ".csv":
            with file.open(newline="", encoding="utf-8-sig") as opened:
                return [{k: v or "" for k, v in row.items() if k} for row in csv.DictReader(opened)]
        return [json.loads(line) for line in read_text(file).splitlines() if line.strip()]
    except (ValueError, csv.Error) as error:
        raise DataError(f"the manifest {str(file)!r} cannot be read: {error}.") from error


def _pair(manifest: Path, line: int, row: Mapping[str, str]) -> Pair:
    where = f"row {line} of {str(manifest)!r}"
    if not isinstance(row, dict) or not all(isinstance(value, str) for value in row.values()):
        raise DataError(f"{where} is not a table of texts: give image_0, image_1 and so on.")
    unknown = [k for k in row if k not in ("category", "name") and not _IMAGE.fullmatch(k) and not _PROMPT.fullmatch(k)]
    if unknown:
        raise DataError(
            f"{where} has the column {unknown[0]!r}: known are image_0, ..., prompt_0, ..., category and name."
        )
    count = sum(1 for key, value in row.items() if _IMAGE.fullmatch(key) and value)
    images = tuple(manifest.parent / row.get(f"image_{i}", "") for i in range(count))
    if count < 2 or any(not row.get(f"image_{i}") for i in range(count)):
        raise DataError(f"{where} needs at least image_0 and image_1.")
    if missing := next((image for image in images if not image.is_file()), None):
        raise DataError(f"{where} names {str(missing)!r}, which does not exist.")
    name = row.get("name") or "-".join(image.stem for image in images)
    if not re.fullmatch(r"[\w.() -]+", name) or name.startswith(".") or len(name.encode()) > 200:
        raise DataError(
            f"{where} has the name {name!r:.100}: at most 200 letters, digits, spaces, dots, dashes, as it becomes a folder."
        )
    if name in OUTPUTS:
        raise DataError(f"{where} has the name {name!r}, which is a file's of every run: give another.")
    prompts = tuple(row.get(f"prompt_{i}", "") for i in range(count))
    return Pair(name, row.get("category") or "all", images, prompts)
