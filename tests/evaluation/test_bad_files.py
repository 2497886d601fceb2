"""What people and other programs may have done to the evaluation's files: the project's own error, or it works."""

from __future__ import annotations

import base64
import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from diffmorpher.cli.app import app
from diffmorpher.errors import DataError, OutputError
from diffmorpher.evaluation.datasets import load_dataset
from diffmorpher.evaluation.metrics import FIGURES
from diffmorpher.evaluation.results import as_json, compare, read_results
from diffmorpher.evaluation.study import tally, write_study

#: In place of any value.
VALUES: list[Any] = [
    *(None, True, -1, 10**400, 1e308, float("nan")),
    *("", "equal", "../../etc", "a against b", [], [[]], {}, {"pair": 1}),
]


def changed(value: Any, draw: random.Random) -> Any:
    """One thing in it changed, removed or repeated, at a random depth."""
    value = copy.copy(value)
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.15:
        return draw.choice(VALUES)
    key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    kind = draw.random()
    if kind < 0.15:
        del value[key]
    elif kind < 0.25 and isinstance(value, list):
        value.append(value[key])
    else:
        value[key] = changed(value[key], draw)
    return value


def works_or_is_refused(action: Callable[[], Any]) -> bool:
    try:
        action()
    except (DataError, OutputError) as error:
        assert str(error)
        return False
    return True


def a_run(shift: float = 0.0) -> dict[str, Any]:
    results = [
        {"pair": pair, "method": method, "figures": {name: 1.0 + i + shift for i, name in enumerate(FIGURES)}}
        for pair in ("one", "two")
        for method in ("ddim", "diffmorpher")
    ]
    pairs = {"one": "digest-1", "two": "digest-2"}
    return {"protocol": {"frames": 17, "seed": 0}, "dataset": {"name": "x", "pairs": pairs}, "results": results}


def test_changed_results(tmp_path: Path) -> None:
    draw, counts = random.Random(0), {True: 0, False: 0}
    (tmp_path / "b").mkdir()
    for pair in ("one", "two"):
        for method in ("ddim", "diffmorpher"):
            (tmp_path / "b" / pair / method).mkdir(parents=True)
            (tmp_path / "b" / pair / method / "film.mp4").write_bytes(b"film")
    (tmp_path / "a.json").write_text(json.dumps(a_run()))
    for _ in range(1500):
        (tmp_path / "b" / "results.json").write_text(json.dumps(changed(a_run(0.5), draw)))

        def differ() -> None:
            found = compare(read_results(tmp_path / "a.json"), read_results(tmp_path / "b"))
            json.loads(as_json(found), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))

        counts[works_or_is_refused(differ)] += 1
        counts[
            works_or_is_refused(lambda: write_study(tmp_path / "b", ("ddim", "diffmorpher"), tmp_path / "s.html"))
        ] += 1
    assert counts[True] > 300 and counts[False] > 300, counts


def test_a_results_file_reads_no_film_from_elsewhere(tmp_path: Path) -> None:
    for method in ("ddim", "diffmorpher"):
        (tmp_path / "secret" / method).mkdir(parents=True)
        (tmp_path / "secret" / method / "film.mp4").write_bytes(b"secret")
    (tmp_path / "run").mkdir()
    for pair in ("../secret", str(tmp_path / "secret"), ".."):
        run = a_run() | {"results": [{"pair": pair, "method": method} for method in ("ddim", "diffmorpher")]}
        (tmp_path / "run" / "results.json").write_text(json.dumps(run))
        with pytest.raises(DataError, match="is no results.json"):
            write_study(tmp_path / "run", ("ddim", "diffmorpher"), tmp_path / "s.html")


def test_changed_votes(tmp_path: Path) -> None:
    draw, counts = random.Random(0), {True: 0, False: 0}
    key = [{"pair": f"p{i}", "left": "ddim", "right": "diffmorpher"} for i in range(3)]
    votes = [{"trial": i, "choice": choice, "seconds": 1.0} for i, choice in enumerate(("left", "right", "equal"))]
    file = tmp_path / "votes.json"
    for i in range(3000):
        inner = changed(key, draw) if i % 2 else key
        record = {"study": "x", "key": base64.b64encode(json.dumps(inner).encode()).decode(), "votes": votes}
        file.write_text(json.dumps(record if i % 2 else changed(record, draw)))
        worked = works_or_is_refused(lambda: tally([file]))
        counts[worked] += 1
        if i % 50 == 0:
            done = CliRunner().invoke(app, ["study", "--tally", str(file), "--json"])
            assert (done.exit_code == 0) == worked and isinstance(done.exception, (DataError, type(None)))
    assert counts[True] > 300 and counts[False] > 300, counts


@pytest.mark.parametrize(
    "row",
    [
        {"image_0": "a" * 5000, "image_1": "b.png"},
        {"image_0": "a.png", "image_1": "b.png", "name": "n" * 300},
        {"image_0": "a\0.png", "image_1": "b.png"},
        {"image_0": "a.png", "image_1": "b.png", "name": "\ud800"},
        {"image_0": ["a.png"]},
        ["a.png", "b.png"],
        None,
    ],
)
def test_manifests_that_cannot_be_used(tmp_path: Path, row: Any) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError):
        load_dataset(str(tmp_path / "pairs.jsonl"))


def test_data_sets_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\xfd")
    for data in (tmp_path / "deep.jsonl", tmp_path / "bytes.jsonl", "x" * 5000):
        with pytest.raises(DataError):
            load_dataset(str(data))


def test_results_are_valid_json() -> None:
    assert as_json({"a": [float("nan"), (1.5, float("inf"))], "b": {"c": -float("inf")}}) == (
        '{"a": [null, [1.5, null]], "b": {"c": null}}'
    )
