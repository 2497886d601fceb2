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

from conftest import tiny_pipeline, tiny_xl_pipeline
from diffmorpher import FitConfig, Morpher, SampleConfig, ScheduleConfig
from diffmorpher.models.conditioning import Conditioning
from diffmorpher.models.stable_diffusion import StableDiffusion
from diffmorpher.models.stable_diffusion_xl import StableDiffusionXL

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


@pytest.mark.parametrize(
    ("name", "parameters", "side", "row", "decode"),
    [
        ("sd21", 865_910_724, 512, 0.804, 2.5),
        ("sd15", 859_520_964, 512, 0.8, 2.5),
        ("sdxl", 2_567_463_684, 1024, 5.98 + 0.78, 10.3),  # published: 2.99 T products without attention's own
    ],
)
def test_operations_of_the_known_architectures(
    benchmarks: None, name: str, parameters: int, side: int, row: float, decode: float
) -> None:
    """Against the published figures; the networks are on the meta device and weigh nothing."""
    from architectures import random_pipeline
    from speed import tflop

    pipe = random_pipeline(name, torch.device("meta"), torch.float32)
    assert sum(p.numel() for p in pipe.unet.parameters()) == parameters
    backbone = StableDiffusionXL(tiny_xl_pipeline()) if name == "sdxl" else StableDiffusion(tiny_pipeline())
    backbone.network, backbone.vae, backbone.vae_factor = pipe.unet, pipe.vae, 8
    text = torch.zeros(1, 77, pipe.unet.config.cross_attention_dim)
    work = tflop(backbone, Conditioning({"text": text, "pooled": torch.zeros(1, 1280)}), (side, side))
    assert work["row"] == pytest.approx(row, rel=0.03) and work["decode"] == pytest.approx(decode, rel=0.05)


FLOWS = {
    "flux-dev": 11_901_408_320,
    "sd35-medium": 2_243_171_520,
    "flux2-klein": 3_875_544_576,
    "z-image": 6_154_908_736,
    "qwen-image": 20_430_401_088,
}


@pytest.mark.parametrize("name", FLOWS)
def test_flows_of_the_published_sizes_can_be_built(benchmarks: None, name: str) -> None:
    from architectures import random_pipeline

    pipe = random_pipeline(name, torch.device("meta"), torch.bfloat16)
    count = sum(p.numel() for p in pipe.transformer.parameters())
    assert count == FLOWS[name]
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["flux2-klein", "z-image", "qwen-image"])
def test_small_texts_tell_the_network_as_much(benchmarks: None, name: str) -> None:
    """Few layers, of the published width; the network takes what they say at that width."""
    from architectures import random_pipeline

    pipe = random_pipeline(name, torch.device("meta"), torch.bfloat16, small_text=True)
    text, config = pipe.text_encoder, pipe.transformer.config
    width = text.config.get_text_config().hidden_size
    assert sum(p.numel() for p in text.parameters()) < 2.5e9
    assert {"flux2-klein": 3 * width, "z-image": width, "qwen-image": width}[name] == (
        config.cap_feat_dim if name == "z-image" else config.joint_attention_dim
    )


def test_one_row_of_each_kind_is_timed(benchmarks: None) -> None:
    from speed import rows

    morpher = Morpher(tiny_pipeline())
    table = rows(morpher, {"row": 1e-6, "decode": 1e-6}, 1.0)
    assert [len(column._cells) for column in table.columns] == [3] * 5
    assert all(float(seconds) >= 0 for seconds in table.columns[1]._cells)
    assert morpher.backbone.unet_rows == 1 + 3


def test_memory_is_that_of_the_tensors_that_live(benchmarks: None) -> None:
    from memory import Live

    weight, kib = torch.zeros(256), 1024
    with Live([weight]) as live:
        a = weight + 1
        b = torch.cat([a, weight.view(2, 128).flatten()])  # views are nobody's memory
        assert live.now == 4 * kib
        del a
        assert live.now == 3 * kib
        del b
    assert (live.now, live.peak) == (kib, 4 * kib)


@pytest.mark.slow
def test_what_a_gpu_needs_is_counted(benchmarks: None) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "memory.py"), "sd21", "--sides", "256"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    plain, low = ([c.strip() for c in line.split("│")] for line in done.stdout.splitlines() if "│ sd21" in line)
    assert plain[4] == "1.7" and 2 < float(plain[6]) < 4 and float(low[6]) < float(plain[6])


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
    for arguments in (("--random-weights", "sd99"), ("--random-weights", "mini", "--only", "x")):
        failed = run_speed(*arguments)
        assert failed.returncode == 1 and failed.stderr.splitlines()[-1].startswith("speed.py: error:")
        assert "Traceback" not in failed.stderr
