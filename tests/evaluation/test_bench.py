"""`diffmorpher bench` and `compare` as a user runs them, with a real model saved in a folder."""

from __future__ import annotations

import ctypes
import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from conftest import tiny_pipeline
from diffmorpher.cli import app
from diffmorpher.cli.options import complete
from diffmorpher.cluster.slots import choose_jobs
from diffmorpher.config import SampleConfig
from diffmorpher.errors import ConfigError, DataError
from diffmorpher.evaluation.bench import parse_shard
from diffmorpher.evaluation.datasets import load_dataset
from diffmorpher.evaluation.inception import Inception
from diffmorpher.evaluation.report import _table, best_methods
from diffmorpher.evaluation.results import compare, read_results, table
from diffmorpher.evaluation.worker import Settings, result_key
from diffmorpher.models.catalog import CATALOG

SMALL = ("--frames", "4", "--steps", "2", "--lora-steps", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pairs in two categories."""
    folder = tmp_path_factory.mktemp("pairs")
    for i, name in enumerate(("A/one", "A/two", "B/three")):
        for k in (0, 1):
            file = folder / f"{name}_{k}.png"
            file.parent.mkdir(exist_ok=True)
            Image.effect_noise((32, 32), 30 + 20 * i + 70 * k).convert("RGB").save(file)
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return os.environ | {
        "DIFFMORPHER_CACHE": str(tmp_path_factory.mktemp("cache")),
        "DIFFMORPHER_CACHE_GB": "1",
        "OMP_NUM_THREADS": "1",
    }


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "diffmorpher", *map(str, arguments)]


def run(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in this process, which has imported already what takes a new one seconds."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        for name in ("DIFFMORPHER_CACHE", "DIFFMORPHER_CACHE_GB"):
            patch.setenv(name, environment[name])
        patch.setattr(sys, "argv", ["diffmorpher", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            app.main()
    return subprocess.CompletedProcess(command(*arguments), int(end.value.code or 0), out.getvalue(), err.getvalue())


def test_bench_then_again_then_report(pairs: Path, model: Path, environment: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("bench", pairs, "--methods", "dissolve,ddim,lora", "--out", out, "--model", model, *SMALL)
    done = run(environment, *arguments)
    assert done.returncode == 0, done.stderr
    results = read_results(out)
    assert len(results["results"]) == 9 and not results["missing"] and not results["is_protocol"]
    for result in results["results"]:
        folder = out / result["pair"] / result["method"]
        assert len(list(folder.glob("00*.png"))) == 4 and (folder / "film.mp4").stat().st_size > 500
        assert result["status"] == "done" and len(result["figures"]["distances"]) == 3
    assert set(results["table"]) == {"A", "B", "all"} and set(results["frechet"]) == {"dissolve", "ddim", "lora"}
    dissolve = results["table"]["all"]["dissolve"]
    assert dissolve["end_psnr"] == [100, 100, 100] and dissolve["unet_rows"][0] == 0
    lines = (out / "results.csv").read_text().splitlines()
    assert len(lines) == 10 and lines[0].startswith("pair,category,method,ppl,pdv")
    assert not list(out.rglob("*.part"))

    page = (out / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "").replace("https://", "http") or "src='http" not in page
    assert page.count("class='strip'") == 9 and "not the protocol's" in page and "has no prompts" in page

    # What is finished is not made again, and a new method is only added.
    stamps = {file: file.stat().st_mtime_ns for file in out.rglob("result.json")}
    done = run(environment, *arguments[:3], "dissolve,ddim,lora,warp", *arguments[4:])
    assert done.returncode == 0, done.stderr
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps
    assert len(read_results(out)["results"]) == 12

    # Other settings are other results.
    done = run(environment, *arguments, "--seed", "1")
    assert done.returncode == 0 and "holds results made with seed 0, which these replace" in done.stderr, done.stderr
    assert all(file.stat().st_mtime_ns != stamps[file] for file in stamps if "lora" in str(file))


def test_another_size_and_dtype(pairs: Path, model: Path, environment: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("bench", pairs, "--methods", "ddim", "--pairs", "1", "--out", out, "--model", model, *SMALL)
    done = run(environment, *arguments, "--size", "48x32", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    (result,) = read_results(out)["results"]
    assert result["dtype"] == "bfloat16" and result["protocol"]["size"] == "48x32"
    with Image.open(out / result["pair"] / "ddim" / "003.png") as frame:
        assert frame.size == (48, 32)


def test_a_failed_pair_does_not_stop_the_rest(
    pairs: Path, model: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken_0.png"
    broken.write_bytes(b"no picture")
    manifest = tmp_path / "pairs.csv"
    one, two = pairs / "A" / "one_0.png", pairs / "A" / "one_1.png"
    for name in ("one", "two"):
        (tmp_path / f"{name}.png").write_bytes((one if name == "one" else two).read_bytes())
    manifest.write_text("name,image_0,image_1\nbad,broken_0.png,one.png\ngood,one.png,two.png\n")
    arguments = ("bench", manifest, "--methods", "dissolve", "--out", tmp_path / "out", "--model", model, *SMALL)
    done = run(environment, *arguments)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "1 of 2 results failed" in done.stderr and "is not a picture" in done.stderr
    results = read_results(tmp_path / "out")
    assert [r["pair"] for r in results["results"]] == ["good"]
    assert results["missing"] == [["bad", "dissolve"]] and "broken_0.png" in results["failed"][0]["error"]
    broken.write_bytes(two.read_bytes())  # mended: the rerun makes what is missing
    assert run(environment, *arguments).returncode == 0


def test_stopping_loses_only_the_work_at_hand(
    pairs: Path, model: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ("bench", pairs, "--methods", "dissolve,lora", "--out", out, "--model", model)
    slow = ("--frames", "4", "--steps", "40", "--lora-steps", "30", "--device", "cpu")
    process = subprocess.Popen(command(*arguments, *slow), env=environment, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not list(out.glob("*/dissolve/result.json")) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said, said
    finished = list(out.rglob("result.json"))
    assert 1 <= len(finished) < 6
    assert not [file for file in out.rglob("*") if file.name.endswith(".part")]
    assert len(read_results(out)["results"]) == len(finished)  # what there is has been put together
    stamps = {file: file.stat().st_mtime_ns for file in finished}
    done = run(environment, *arguments, *slow)
    assert done.returncode == 0, done.stderr
    assert {file: file.stat().st_mtime_ns for file in finished} == stamps
    assert len(list(out.rglob("result.json"))) == 6


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not let us choose the thread")
def test_a_signal_that_the_system_hands_to_another_thread_stops_all_processes(
    pairs: Path, model: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    arguments = ("bench", pairs, "--methods", "dissolve,lora", "--out", tmp_path, "--model", model, "--jobs", "2")
    slow = ("--frames", "4", "--steps", "400", "--lora-steps", "300", "--device", "cpu")
    with subprocess.Popen(command(*arguments, *slow), env=environment, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 120
        while not list(tmp_path.glob("*/dissolve/result.json")) and time.monotonic() < until:
            time.sleep(0.05)
        other = next(int(name) for name in os.listdir(f"/proc/{process.pid}/task") if int(name) != process.pid)
        assert ctypes.CDLL(None).tgkill(process.pid, other, signal.SIGTERM) == 0
        _, said = process.communicate(timeout=20)  # to the end of all who can write there
        assert not [file for file in tmp_path.rglob("*") if file.name.endswith(".part")]
        assert process.returncode == 143 and said.endswith("diffmorpher: stopped\n"), said


def test_shards_and_processes_make_the_same_whole(
    pairs: Path, model: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    def results(out: Path) -> dict[Any, Any]:
        return {(r["pair"], r["method"]): (r["key"], r["figures"]) for r in read_results(out)["results"]}

    common = ("bench", pairs, "--methods", "ddim", "--model", model, *SMALL)
    for shard in ("1/2", "2/2"):
        done = run(environment, *common, "--out", tmp_path / "shards", "--shard", shard)
        assert done.returncode == 0, done.stderr
    done = run(environment, *common, "--out", tmp_path / "jobs", "--jobs", "2")
    assert done.returncode == 0, done.stderr
    sharded, parallel = results(tmp_path / "shards"), results(tmp_path / "jobs")
    assert len(sharded) == 3 and sharded.keys() == parallel.keys()
    for at, (key, figures) in sharded.items():
        assert parallel[at][0] == key and parallel[at][1]["ppl"] == pytest.approx(figures["ppl"], rel=1e-4)


def test_compare(pairs: Path, model: Path, environment: dict[str, str], tmp_path: Path) -> None:
    common = ("bench", pairs, "--methods", "ddim", "--model", model, *SMALL)
    for name, more in (("a", ()), ("b", ("--pairs", "2")), ("c", ("--steps", "3"))):
        done = run(environment, *common, "--out", tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
    done = run(environment, "compare", tmp_path / "a", tmp_path / "b" / "results.json", "--json")
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout)
    assert differences["ddim"]["ppl"] == [0, 0, 0, 2]  # the same two pairs, to the bit
    done = run(environment, "compare", tmp_path / "a", tmp_path / "c")
    assert done.returncode == 2 and "differ in steps" in done.stderr
    done = run(environment, "compare", tmp_path / "a", tmp_path / "nothing.json")
    assert done.returncode == 2 and "is no results.json" in done.stderr


def test_fid_when_weights_are_given(pairs: Path, model: Path, environment: dict[str, str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(Inception().state_dict(), tmp_path / "inception.pth")
    common = ("bench", pairs, "--methods", "dissolve,warp", "--model", model, "--out", tmp_path / "out", *SMALL)
    done = run(environment, *common)
    assert done.returncode == 0, done.stderr
    assert read_results(tmp_path / "out")["fid"] is None
    assert "FID is left out" in (tmp_path / "out" / "report.html").read_text()
    done = run(environment, *common, "--inception", tmp_path / "inception.pth")  # of frames that are there already
    assert done.returncode == 0, done.stderr
    results = read_results(tmp_path / "out")
    assert set(results["fid"]["values"]) == {"dissolve", "warp"} and min(results["fid"]["values"].values()) > 0
    assert "FID is left out" not in (tmp_path / "out" / "report.html").read_text()
    done = run(environment, *common, "--inception", tmp_path / "none.pth")
    assert done.returncode == 2 and "cannot be read" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "disolve"), "did you mean 'dissolve'"),
        (("--methods", "dissolve", "--shard", "3/2"), "not of the form i/n"),
        (("--methods", "dissolve", "--jobs", "many"), 'must be "auto" or a whole number'),
        (("--methods", "dissolve", "--pairs", "0"), "at least 1"),
        (("--methods", "dissolve", "--frames", "2"), "at least 3"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: tuple[str, ...], message: str, environment: dict[str, str], tmp_path: Path
) -> None:
    done = run(environment, "bench", "mini", "--out", tmp_path / "out", *arguments)
    assert done.returncode == 2 and message in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


# ---- parts


def test_rays_address_may_be_left_out() -> None:
    assert complete(["bench", "mini", "--ray", "--pairs", "2"]) == ["bench", "mini", "--ray", "local", "--pairs", "2"]
    assert complete(["bench", "mini", "--ray"])[-1] == "local"
    assert complete(["bench", "--ray", "10.0.0.1:6379"])[-1] == "10.0.0.1:6379" and complete(["info"]) == ["info"]


def test_a_key_changes_with_everything_that_matters(pairs: Path, model: Path) -> None:
    pair, other = load_dataset(str(pairs)).pairs[:2]
    settings = Settings(("ddim",), model=str(model))
    keys = {
        result_key(pair, "ddim", settings),
        result_key(other, "ddim", settings),
        result_key(pair, "lora", settings),
        result_key(pair, "ddim", Settings(("ddim",), steps=7, model=str(model))),
        result_key(pair, "ddim", Settings(("ddim",), seed=1, model=str(model))),
        result_key(pair, "ddim", Settings(("ddim",), model="mini")),
        result_key(pair, "ddim", Settings(("ddim",), model=str(model), dtype="bfloat16")),
        result_key(pair, "ddim", Settings(("ddim",), model=str(model), size="64x32")),
    }
    assert len(keys) == 8
    assert result_key(pair, "ddim", Settings(("lora", "ddim"), model=str(model))) in keys  # company does not


def test_a_new_recommendation_is_another_result(pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = load_dataset(str(pairs)).pairs[0]
    methods = ("ddim", "diffmorpher-fast")
    before = [result_key(pair, method, Settings(methods)) for method in methods]
    other = replace(CATALOG["mini"], sample=SampleConfig(steps=7))
    monkeypatch.setitem(CATALOG, "mini", other)
    after = [result_key(pair, method, Settings(methods)) for method in methods]
    assert before[0] == after[0] and before[1] != after[1]


def test_shards_and_jobs() -> None:
    assert parse_shard(None) == (1, 1) and parse_shard("2/8") == (2, 8)
    for bad in ("0/2", "x", "1/0", "2"):
        with pytest.raises(ConfigError):
            parse_shard(bad)
    assert choose_jobs("3", "cpu") == 3 and choose_jobs("auto", "cpu") == 1


def test_only_the_protocols_settings_are_the_protocol() -> None:
    assert Settings(("ddim", "lora")).is_protocol
    assert not Settings(("ddim",), frames=5).is_protocol and not Settings(("ddim",), seed=1).is_protocol
    assert not Settings(("ddim",), size=(64, 64)).is_protocol


def result(pair: str, method: str, ppl: float) -> dict[str, Any]:
    figures = dict.fromkeys(("pdv", "end_distance", "end_psnr", "directness", "roughness", "ghost"), 1.0) | {"ppl": ppl}
    return {"pair": pair, "category": pair[0], "method": method, "figures": figures, "unet_rows": 5}


def test_table_and_best() -> None:
    results = [result("a1", "x", 1.0), result("a2", "x", 3.0), result("b1", "x", 5.0), result("b1", "y", 2.0)]
    made = table(results, ["x", "y"])
    assert list(made) == ["a", "b", "all"] and "y" not in made["a"]
    assert made["a"]["x"]["ppl"][0] == 2.0 and made["all"]["x"]["ppl"][0] == 3.0
    low, high = made["all"]["x"]["ppl"][1:]
    assert 1.0 <= low < 3.0 < high <= 5.0
    assert best_methods(made["all"], "ppl") == {"y"} and best_methods(made["all"], "end_psnr") == {"x", "y"}
    assert best_methods(made["all"], "unet_rows") == set()


def test_rows_made_before_there_was_a_figure_are_still_shown_and_compared() -> None:
    """A folder of results of an earlier version, half of it made again."""
    old, new = [result(pair, "x", 1.0) for pair in ("a", "b")], [result("a", "y", 2.0)]
    for row in old:
        del row["figures"]["ghost"]
    made = table([*old, *new], ["x", "y"])["all"]
    assert "ghost" not in made["x"] and made["x"]["ppl"][0] == 1 and made["y"]["ghost"][0] == 1
    assert best_methods(made, "ghost") == {"y"} and best_methods({"x": made["x"]}, "ghost") == set()
    drawn = _table({"table": {"all": made}, "frechet": {}}, "all")
    assert drawn.count("<td></td>") == 1
    runs = [
        {"protocol": {}, "results": rows, "dataset": {"pairs": {"a": "k", "b": "l"}}}
        for rows in (old, [result("a", "x", 3.0)])
    ]
    found = compare(*runs)["x"]
    assert found["ppl"][0] == 2 and "ghost" not in found


def test_runs_are_compared_pair_by_pair() -> None:
    def of(results: list[dict[str, Any]], **protocol: Any) -> dict[str, Any]:
        return {"protocol": {"steps": 2} | protocol, "dataset": {"pairs": {"a": "1", "b": "2"}}, "results": results}

    one = of([result("a", "x", 1.0), result("b", "x", 10.0)])
    two = of([result("a", "x", 1.5), result("b", "x", 10.5)])
    assert compare(one, two)["x"]["ppl"] == [0.5, 0.5, 0.5, 2]
    with pytest.raises(DataError, match="differ in steps"):
        compare(one, of([], steps=3))
    with pytest.raises(DataError, match="no pair and method in common"):
        compare(one, of([result("a", "y", 1.0)]))
