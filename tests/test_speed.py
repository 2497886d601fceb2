"""The speed benchmark: its reference does the same work as ours, and its table comes out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import tiny_pipeline
from diffmorpher import FitConfig, Morpher, SampleConfig, ScheduleConfig

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PICTURES = [Image.effect_noise((32, 32), s).convert("RGB") for s in (20, 60)]


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_the_reference_makes_the_frames_of_two_passes(benchmarks: None) -> None:
    """One row at a time, with stored features, against our batches: the same alphas, frames and number of rows but one."""
    from reference import reference_morph

    fit, sample = FitConfig(rank=2, steps=3, learning_rate=1e-2), SampleConfig(steps=4)
    morpher = Morpher(tiny_pipeline())
    frames, alphas, seconds = reference_morph(morpher, PICTURES, ["a", "b"], 5, fit, sample)
    rows = morpher.backbone.unet_rows
    assert rows == 2 * 3 * 3 + 2 * 4 + 2 * 5 * 4 and set(seconds) == {"fit", "invert", "schedule", "sample"}
    ours = morpher(PICTURES, ["a", "b"], 5, fit=fit, sample=sample, schedule=ScheduleConfig(method="two-pass"))
    assert ours.unet_rows == rows and ours.alphas == pytest.approx(alphas, abs=1e-3)
    for a, b in zip(ours.frames, frames, strict=True):
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 2


@pytest.mark.parametrize(("name", "row", "decode"), [("sd21", 0.804, 2.5), ("sd15", 0.8, 2.5)])
def test_operations_of_the_known_architectures(benchmarks: None, name: str, row: float, decode: float) -> None:
    """Against the figures for Stable Diffusion at 512 x 512; the networks are on the meta device and weigh nothing."""
    from architectures import random_pipeline
    from speed import tflop

    pipe = random_pipeline(name, torch.device("meta"), torch.float32)
    assert sum(p.numel() for p in pipe.unet.parameters()) == {"sd21": 865_910_724, "sd15": 859_520_964}[name]

    class OnMeta:  # a Morpher refuses networks without weights
        class backbone:
            network, vae_factor, vae = pipe.unet, 8, pipe.vae

        @staticmethod
        def working_size() -> tuple[int, int]:
            return 512, 512

    OnMeta.backbone.pipe = pipe  # type: ignore[attr-defined]
    work = tflop(OnMeta())  # type: ignore[arg-type]
    assert work["row"] == pytest.approx(row, rel=0.03) and work["decode"] == pytest.approx(decode, rel=0.05)


def run_speed(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "speed.py"), *arguments], capture_output=True, text=True, timeout=300
    )


def test_a_table_comes_out(tmp_path: Path) -> None:
    out = tmp_path / "runs.json"
    done = run_speed("--random-weights", "mini", "--runs", "1", "--frames", "3", "--only", "fast", "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert "fast settings" in done.stdout and "of peak" in done.stdout and "TFLOP a row" in done.stdout
    (run,) = json.loads(out.read_text())["runs"]["fast settings"]
    assert run["rows"] <= 1000 and run["total"] > 0


def test_what_cannot_be_timed_is_said() -> None:
    for name in ("sdxl", "sd99"):
        failed = run_speed("--random-weights", name)
        assert failed.returncode == 1 and failed.stderr.splitlines()[-1].startswith("speed.py: error:")
        assert "Traceback" not in failed.stderr
