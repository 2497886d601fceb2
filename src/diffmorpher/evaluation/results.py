"""A benchmark's results put together: results.json for programs, results.csv for tables, and the figures of both."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..config import is_real
from ..errors import DataError
from ..files.atomic import replacing
from ..files.pictures import fit_image, load_image
from ..path import to_pixels
from .datasets import Dataset, Pair, read_text
from .inception import load_inception
from .metrics import FIGURES, frechet_of_films
from .statistics import bootstrap, paired_difference
from .worker import Settings, finished, read_result

ALL = "all"


def collect(
    dataset: Dataset, pairs: Sequence[Pair], settings: Settings, out: Path, command: str, inception: Path | None = None
) -> dict[str, Any]:
    """Everything that is in `out` for these pairs and settings, as results.json holds it; written there, with results.csv.

    inception: weights for FID, which is left out without them.
    Results that are missing, of other settings or failed are counted and listed, and are in no mean.
    """
    wanted = [(pair, method) for pair in pairs for method in settings.methods]
    done = [read_result(out, *at) for at in wanted if finished(out, *at, settings)]
    results = [result for result in done if result]
    there = {(result["pair"], result["method"]) for result in results}
    failed = [
        {"pair": pair.name, "method": method, "error": result["error"]}
        for pair, method in wanted
        if (result := read_result(out, pair, method)) and result["status"] == "failed"
    ]
    missing = [[pair.name, method] for pair, method in wanted if (pair.name, method) not in there]
    everything = {
        "dataset": {
            "name": dataset.name,
            "pairs": {pair.name: pair.key for pair in pairs},
            "of": len(dataset.pairs),
            "has_prompts": dataset.has_prompts,
        },
        "methods": list(settings.methods),
        "protocol": settings.protocol,
        "is_protocol": settings.is_protocol,
        "model": settings.model,
        "command": command,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": machine(),
        "versions": {
            name: version(name) for name in ("diffmorpher", "torch", "diffusers", "transformers", "stlpips-pytorch")
        },
        "figures": {name: text for name, (text, _) in FIGURES.items()},
        "table": table(results, settings.methods),
        "frechet": frechet(results, settings.methods, out),
        "fid": fid(results, settings.methods, pairs, out, inception) if inception else None,
        "missing": missing,
        "failed": failed,
        "results": results,
    }
    with replacing(out / "results.json") as part:
        part.write_text(as_json(everything, indent=1) + "\n", "utf-8")
    _write_csv(results, out / "results.csv")
    return everything


def table(results: Sequence[dict[str, Any]], methods: Sequence[str]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """{category, "all" last: {method: {figure: [mean, low, high]}}}; "unet_rows" is a figure here too.

    A figure that some row of a method does not have, as it was made before there was that figure, is left out.
    """
    categories = [*dict.fromkeys(result["category"] for result in results), ALL]
    made: dict[str, dict[str, dict[str, list[float]]]] = {}
    for category in categories:
        made[category] = {}
        for method in methods:
            rows = [r for r in results if r["method"] == method and category in (ALL, r["category"])]
            if rows:
                there = [name for name in FIGURES if all(is_real(row["figures"].get(name)) for row in rows)]
                figures = {name: list(bootstrap([row["figures"][name] for row in rows])) for name in there}
                figures["unet_rows"] = list(bootstrap([row["unet_rows"] for row in rows]))
                made[category][method] = figures
    return made if len(categories) != 2 else {ALL: made[ALL]}


def frechet(results: Sequence[dict[str, Any]], methods: Sequence[str], out: Path) -> dict[str, float]:
    """The Frechet distance of each method over the whole set, on the perceptual network's features (not FID)."""
    distances = {}
    for method in methods:
        inputs: dict[str, torch.Tensor] = {}
        films = []
        for row in (row for row in results if row["method"] == method):
            features = load_file(out / row["pair"] / method / "features.safetensors")
            films.append(features["frames"])
            inputs |= {f"{row['pair']}/{i}": feature for i, feature in enumerate(features["inputs"])}
        if len(films) > 1:
            distances[method] = frechet_of_films(torch.stack(list(inputs.values())), films)
    return distances


def fid(
    results: Sequence[dict[str, Any]], methods: Sequence[str], pairs: Sequence[Pair], out: Path, inception: Path
) -> dict[str, Any]:
    """{"weights": digest, "values": {method: FID}} over the whole set, by the paper's protocol (`frechet_of_films`).

    The inputs are taken at the size of the frames. A film's features are kept beside it.
    """
    network, digest = load_inception(inception)

    def features(files: Sequence[Path], size: tuple[int, int] | None) -> torch.Tensor:
        pictures = [load_image(file) for file in files]
        return torch.cat([network(to_pixels([fit_image(p, size) if size else p])) for p in pictures])

    def of_film(folder: Path) -> torch.Tensor:
        kept = folder / f"inception-{digest}.safetensors"
        if not kept.exists():
            with replacing(kept) as part:
                save_file({"frames": features(sorted(folder.glob("[0-9]*.png")), None)}, part)
        return load_file(kept)["frames"]

    values = {}
    inputs: dict[str, torch.Tensor] = {}
    by_name = {pair.name: pair for pair in pairs}
    for method in methods:
        films = {row["pair"]: of_film(out / row["pair"] / method) for row in results if row["method"] == method}
        for name in films.keys() - inputs.keys():
            size = load_image(out / name / method / "000.png").size
            inputs[name] = features(by_name[name].images, size)
        if len(films) > 1:
            values[method] = frechet_of_films(torch.cat([inputs[name] for name in films]), list(films.values()))
    return {"weights": digest, "values": values}


def compare(a: dict[str, Any], b: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """{method: {figure: [mean of b - a, low, high, pairs]}} over the pairs that both runs have, pair by pair.

    Raises `DataError` when the runs differ in protocol, or share no pair and method.
    """
    if a["protocol"] != b["protocol"]:
        unlike = [name for name in a["protocol"] if a["protocol"][name] != b["protocol"].get(name)]
        raise DataError(f"the two runs differ in {', '.join(unlike)}: only runs of one protocol can be compared.")
    keys = [_by_key(run) for run in (a, b)]
    both = [name for name in FIGURES if all(name in values for key in keys for values in key.values())]
    shared = [key for key in keys[0] if key in keys[1]]
    if not shared:
        raise DataError("the two runs have no pair and method in common.")
    differences: dict[str, dict[str, list[float]]] = {}
    for method in dict.fromkeys(key[2] for key in shared):
        here = [key for key in shared if key[2] == method]
        differences[method] = {
            figure: [
                *paired_difference([keys[0][key][figure] for key in here], [keys[1][key][figure] for key in here]),
                len(here),
            ]
            for figure in both
        }
    return differences


def _by_key(run: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, float]]:
    """The figures of a run by (pair, its content's key, method). Raises `DataError`."""
    found = {}
    for result in run["results"]:
        pair, values = result["pair"], result.get("figures")
        content = run["dataset"]["pairs"].get(pair)
        older = isinstance(values, dict) and "ghost" not in values  # made before there was that figure
        wanted = [figure for figure in FIGURES if not (older and figure == "ghost")]
        known = isinstance(values, dict) and all(is_real(values.get(f)) and abs(values[f]) < 1e9 for f in wanted)
        if not isinstance(content, str) or not known:
            raise DataError(f"the results of the pair {pair!r} are incomplete or damaged: run the benchmark again.")
        found[pair, content, result["method"]] = values
    return found


def as_json(value: Any, indent: int | None = None) -> str:
    """As valid JSON: NaN and infinity, which it does not have, are null."""

    def valid(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: valid(each) for key, each in part.items()}
        if isinstance(part, (list, tuple)):
            return [valid(each) for each in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(valid(value), indent=indent, allow_nan=False)


def read_results(file: Path) -> dict[str, Any]:
    """A results.json, or the folder that holds it. Raises `DataError`."""
    path = file / "results.json" if file.is_dir() else file
    try:
        loaded: dict[str, Any] = json.loads(read_text(path))
        if not isinstance(loaded["protocol"], dict) or not isinstance(loaded["dataset"]["pairs"], dict):
            raise TypeError
        for result in loaded["results"]:
            if not all(isinstance(result[key], str) and _is_name(result[key]) for key in ("pair", "method")):
                raise ValueError(result)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{str(path)!r} is no results.json of 'diffmorpher bench': give one, or its folder.") from error
    return loaded


def _is_name(text: str) -> bool:
    """Whether it can be a folder's, and of no folder elsewhere."""
    return bool(text) and not text.startswith(".") and not set(text) & set("/\\\0") and text.isprintable()


def machine() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"system": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count(), "gpus": gpus}


def _write_csv(results: Sequence[dict[str, Any]], file: Path) -> None:
    columns = [*FIGURES, "end_distance_0", "end_distance_1", "end_psnr_0", "end_psnr_1"]
    with replacing(file) as part, part.open("w", newline="", encoding="utf-8") as opened:
        rows = csv.writer(opened, lineterminator="\n")
        rows.writerow(["pair", "category", "method", *columns, "unet_rows", "seconds_prepare", "seconds_frames"])
        for r in results:
            numbers = [*(r["figures"].get(column, "") for column in columns), r["unet_rows"], *r["seconds"].values()]
            rows.writerow([r["pair"], r["category"], r["method"], *numbers])
