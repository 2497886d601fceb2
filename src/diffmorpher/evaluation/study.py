"""A study by eye: a page that shows two methods' films of a pair side by side, blind, and the tally of its votes."""

from __future__ import annotations

import base64
import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files.atomic import cannot_write, replacing
from ..models.catalog import ASSETS
from .datasets import read_text
from .results import read_results
from .statistics import binomial_interval

#: Between the two methods in the name of a comparison.
AGAINST = " against "
#: What a tally says beside the methods' votes.
COUNTED = ("votes", "equal", "share", "low", "high")


def write_study(run: Path, methods: tuple[str, str], out: Path, seed: int = 0) -> Path:
    """Write a page, films inside, that asks which of two methods is better for each pair that both have.

    run: the folder of `diffmorpher bench`, or the results.json in it. The order of the pairs, and which film stands on the
    left, are drawn with `seed`; the page shows no name. Raises `DataError`.
    """
    results = read_results(run)
    folder = run if run.is_dir() else run.parent
    have = {(r["pair"], r["method"]) for r in results["results"]}
    names = dict.fromkeys(r["method"] for r in results["results"])
    for method in methods:
        if method not in names:
            there = ", ".join(names)
            raise DataError(f"{str(run)!r} has no films of the method {method!r}; it has {there}.")
    if methods[0] == methods[1]:
        raise DataError(f"the two methods of a study are both {methods[0]!r}: give two that differ.")
    pairs = [
        pair for pair in dict.fromkeys(r["pair"] for r in results["results"]) if {(pair, m) for m in methods} <= have
    ]
    if not pairs:
        raise DataError(f"no pair in {str(run)!r} has films of both methods.")

    draw = random.Random(seed)
    draw.shuffle(pairs)
    films: list[str] = []
    trials, key = [], []
    for pair in pairs:
        sides = list(methods)
        draw.shuffle(sides)
        trials.append({"left": len(films), "right": len(films) + 1})
        key.append({"pair": pair, "left": sides[0], "right": sides[1]})
        films += [_film(folder / pair / side / "film.mp4") for side in sides]
    identity = hashlib.sha256(json.dumps([key, films]).encode()).hexdigest()[:12]
    # Which film is whose is in the page, for the tally, but not in words that a voter reads by accident.
    hidden = base64.b64encode(json.dumps(key).encode()).decode()
    study = {"id": identity, "trials": trials, "key": hidden, "films": films}
    page = (ASSETS / "study.html").read_text("utf-8").replace("__STUDY__", json.dumps(study))
    try:
        with replacing(out) as part:
            part.write_text(page, "utf-8")
    except OSError as error:
        raise cannot_write(f"the page {str(out)!r}", error) from error
    return out


def tally(files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """{"a against b": {"votes", "a", "b", "equal", "share", "low", "high"}} of saved votes, over all files together.

    share: how many of the votes that saw a difference preferred a, with Wilson's 95 % interval; None where there are
    none. Raises `DataError` for what is no file of votes, and for one that is given twice.
    """
    counts: dict[str, dict[str, int]] = {}
    seen: dict[str, Path] = {}
    for file in files:
        record, key = _read_votes(file)
        digest = json.dumps(record, sort_keys=True)
        if digest in seen:
            raise DataError(f"{str(file)!r} has the same votes as {str(seen[digest])!r}: count each once.")
        seen[digest] = file
        for vote in record["votes"]:
            sides = key[vote["trial"]]
            first, second = sorted((sides["left"], sides["right"]))
            count = counts.setdefault(f"{first}{AGAINST}{second}", {first: 0, second: 0, "equal": 0})
            count[sides.get(vote["choice"], "equal")] += 1
    return {name: _summary(count) for name, count in sorted(counts.items())}


def _film(file: Path) -> str:
    try:
        return base64.b64encode(file.read_bytes()).decode()
    except OSError as error:
        raise DataError(
            f"the film {str(file)!r} cannot be read: remove its folder and run the benchmark again."
        ) from error


def _summary(count: dict[str, int]) -> dict[str, Any]:
    first, second = (name for name in count if name not in COUNTED)
    decided = count[first] + count[second]
    low, high = binomial_interval(count[first], decided) if decided else (None, None)
    share = count[first] / decided if decided else None
    return {"votes": sum(count.values()), **count, "share": share, "low": low, "high": high}


def _read_votes(file: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    try:
        record = json.loads(read_text(file))
        key = json.loads(base64.b64decode(record["key"]))
        trials = [vote["trial"] for vote in record["votes"]]
        if len(set(trials)) != len(trials) or not all(type(trial) is int and 0 <= trial < len(key) for trial in trials):
            raise ValueError(f"the trials {trials} are not some of {len(key)}, each once")
        for vote in record["votes"]:
            left, right = (key[vote["trial"]][side] for side in ("left", "right"))
            for method in (left, right):
                if not isinstance(method, str) or method in COUNTED or AGAINST.strip() in method.split():
                    raise ValueError(method)
            if left == right or vote["choice"] not in ("left", "right", "equal"):
                raise ValueError(vote)
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise DataError(f"{str(file)!r} is no file of votes that a study's page saved.") from error
    return record, key
