"""The benchmark on a real local Ray of two workers, one of which is killed at work."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from PIL import Image

from conftest import tiny_pipeline
from diffmorpher import FitConfig
from diffmorpher.evaluation.bench import Settings, run_bench
from diffmorpher.evaluation.datasets import load_dataset
from diffmorpher.evaluation.results import collect


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


@pytest.mark.slow
def test_a_killed_workers_pair_goes_to_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("DIFFMORPHER_CACHE", str(tmp_path / "cache"))
    tiny_pipeline().save_pretrained(tmp_path / "model")
    for i in range(6):
        for k in (0, 1):
            Image.effect_noise((32, 32), 20 + 10 * i + 60 * k).convert("RGB").save(tmp_path / f"pair{i}_{k}.png")
    dataset = load_dataset(str(tmp_path))
    methods = ("ddim", "lora")
    settings = Settings(methods, frames=4, steps=25, fit=FitConfig(rank=2, steps=40), model=str(tmp_path / "model"))
    out = tmp_path / "out"
    killed: list[int] = []

    def kill_one_at_work() -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until and not killed:
            if list(out.rglob("result.json")) and (processes := workers()):
                os.kill(processes[0].pid, signal.SIGKILL)
                killed.append(processes[0].pid)
            time.sleep(0.02)

    killer = threading.Thread(target=kill_one_at_work)
    killer.start()
    seen = list(run_bench(dataset.pairs, settings, out, jobs=2, ray="local"))
    killer.join()

    assert killed, "no worker was there to be killed"
    assert Counter(seen) == {(pair.name, method): 1 for pair in dataset.pairs for method in methods}
    results = collect(dataset, dataset.pairs, settings, out, "test")
    assert not results["missing"] and not results["failed"] and len(results["results"]) == 12
