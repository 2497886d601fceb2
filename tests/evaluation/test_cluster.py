"""The benchmark on a real local Ray whose workers are killed at work, on a cluster elsewhere, and stopped by hand."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from conftest import tiny_pipeline
from diffmorpher import FitConfig
from diffmorpher.errors import ConfigError, ModelError
from diffmorpher.evaluation.bench import run_bench
from diffmorpher.evaluation.datasets import Dataset, load_dataset
from diffmorpher.evaluation.results import collect
from diffmorpher.evaluation.worker import Settings, read_result

pytestmark = pytest.mark.slow  # a Ray takes seconds to start and to end
METHODS = ("ddim", "lora")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with six pairs and a tiny model, which is also the folder that the test runs in."""
    pytest.importorskip("ray")
    monkeypatch.setenv("DIFFMORPHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DIFFMORPHER_CACHE_GB", "1")
    tiny_pipeline().save_pretrained(tmp_path / "model")
    for i in range(6):
        for k in (0, 1):
            Image.effect_noise((32, 32), 20 + 10 * i + 60 * k).convert("RGB").save(tmp_path / f"pair{i}_{k}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def long_settings(steps: int = 25) -> Settings:
    """Long enough to be interrupted; paths are relative, as people type them."""
    return Settings(METHODS, frames=4, steps=steps, fit=FitConfig(rank=2, steps=40), model="model", device="cpu")


def workers() -> list[psutil.Process]:
    """The processes of our actors, under whatever Ray started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ray::_Actor" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def at_work(out: Path) -> set[str]:
    """The pairs of which something is being written."""
    return {part.parent.name for part in out.glob("*/.diffmorpher-*.part")}


@contextmanager
def beside(act: Callable[[], bool]) -> Iterator[None]:
    """Call `act` over and over beside the block, until it says that it is done."""
    over = threading.Event()

    def loop() -> None:
        while not over.is_set() and not act():
            time.sleep(0.01)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def check_whole(dataset: Dataset, settings: Settings, out: Path, seen: list[tuple[str, str]]) -> None:
    assert Counter(seen) == {(pair.name, method): 1 for pair in dataset.pairs for method in settings.methods}
    results = collect(dataset, dataset.pairs, settings, out, "test")
    assert not results["missing"] and not results["failed"]
    assert len(results["results"]) == len(dataset.pairs) * len(settings.methods)
    assert not at_work(out), "a killed worker's half-written folder is still there"


def test_a_killed_workers_pair_goes_to_another(data: Path) -> None:
    dataset, settings, out = load_dataset("."), long_settings(), Path("out")
    killed: list[int] = []

    def kill_one_of_two() -> bool:
        if list(out.rglob("result.json")) and len(at_work(out)) == 2 and len(there := workers()) == 2:
            os.kill(there[0].pid, signal.SIGKILL)
            killed.append(there[0].pid)
        return bool(killed)

    with beside(kill_one_of_two):
        seen = list(run_bench(dataset.pairs, settings, out, jobs=2, ray="local"))
    assert killed, "the two workers were never at work together"
    check_whole(dataset, settings, out, seen)


def test_another_autoencoder_goes_along(data: Path) -> None:
    torch.manual_seed(1)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(data / "model" / "vae"))
    vae.save_pretrained(data / "another")
    dataset, own = load_dataset("."), long_settings(2)
    pairs = dataset.pairs[:2]
    for out, settings, ray in (
        ("ray", replace(own, vae="another"), "local"),
        ("alone", replace(own, vae="another"), None),
        ("own", own, None),
    ):
        check_whole(Dataset("two", pairs), settings, Path(out), list(run_bench(pairs, settings, Path(out), ray=ray)))
    for pair in pairs:
        for method in METHODS:
            ray, alone, without = (
                np.asarray(Image.open(Path(out, pair.name, method, "001.png"))).astype(int)
                for out in ("ray", "alone", "own")
            )
            assert abs(ray - alone).max() <= 1  # a worker has another number of threads than the tests
            assert abs(alone - without).max() > 50


def test_a_pair_that_ends_every_worker_is_recorded_and_the_rest_is_made(data: Path) -> None:
    dataset, settings, out = load_dataset("."), long_settings(), Path("out")
    pairs = dataset.pairs[:2]
    killed: set[int] = set()

    def kill_whoever_takes_it() -> bool:
        if pairs[0].name in at_work(out) and len(killed) < 3:
            for process in workers():
                if process.pid not in killed:
                    os.kill(process.pid, signal.SIGKILL)
                    killed.add(process.pid)
        return False

    with beside(kill_whoever_takes_it):
        seen = list(run_bench(pairs, settings, out, jobs=1, ray="local"))
    assert len(killed) == 3 and len(seen) == len(set(seen)) == 4
    for method in METHODS:
        bad, good = (read_result(out, pair, method) for pair in pairs)
        assert bad and bad["status"] == "failed" and "it ended 3 Ray workers" in bad["error"]
        assert good and good["status"] == "done"
    seen = list(run_bench(pairs, settings, out, jobs=1))  # without whoever killed it, it is made
    check_whole(Dataset("two", pairs), settings, out, seen)


def test_what_is_wrong_with_the_model_or_the_address_is_said_as_without_ray(data: Path) -> None:
    pairs = load_dataset(".").pairs[:1]
    for ray in (None, "local"):
        with pytest.raises(ModelError, match="nowhere") as error:
            list(run_bench(pairs, Settings(METHODS, model="./nowhere"), data / "out", ray=ray))
        assert "\n" not in str(error.value)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ConfigError, match=f"no Ray cluster is reached at '{address}'"):
        list(run_bench(pairs, long_settings(), data / "out", ray=address))


def test_on_a_cluster_that_runs_elsewhere(data: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The cluster was started in another folder; pictures, model and output are given by relative paths."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = Path(sys.executable).with_name("ray")
    options = ("--head", "--block", "--num-cpus", "2", "--port", str(port), "--include-dashboard", "false")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    # It asks for a token if this process has one to show: a Ray that it started itself has seen to that.
    environment = {"RAY_AUTH_MODE": "disabled"} | os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    with (elsewhere / "log").open("w") as log:
        cluster = subprocess.Popen([ray, "start", *options], cwd=elsewhere, env=environment, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 120
        while "Ray runtime started" not in (elsewhere / "log").read_text():
            assert cluster.poll() is None and time.monotonic() < until, (elsewhere / "log").read_text()
            time.sleep(0.2)
        dataset, settings = load_dataset("."), long_settings(steps=2)
        seen = list(run_bench(dataset.pairs, settings, Path("out"), ray=f"127.0.0.1:{port}"))
        check_whole(dataset, settings, Path("out"), seen)
    finally:
        cluster.send_signal(signal.SIGTERM)
        cluster.wait(timeout=60)


@pytest.mark.parametrize("whole_group", [False, True], ids=["the driver alone", "as Ctrl-C in a terminal"])
def test_stopping_leaves_nothing_half_written(data: Path, whole_group: bool) -> None:
    shutil.rmtree(data / "cache", ignore_errors=True)
    arguments = ["bench", ".", "--methods", ",".join(METHODS), "--out", "out", "--model", "model", "--device", "cpu"]
    arguments += ["--frames", "4", "--steps", "40", "--lora-steps", "40", "--pairs", "3", "--jobs", "2", "--ray"]
    process = subprocess.Popen(
        [sys.executable, "-m", "diffmorpher", *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    until = time.monotonic() + 120
    while not (list(data.glob("out/*/ddim/result.json")) and at_work(data / "out")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    ours = psutil.Process(process.pid).children(recursive=True)
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=90)
    assert process.returncode == 130 and "Traceback" not in said, said
    assert not at_work(data / "out")
    _, left = psutil.wait_procs(ours, timeout=20)
    assert not left, left
    assert 1 <= len(list(data.glob("out/*/*/result.json"))) < 6
