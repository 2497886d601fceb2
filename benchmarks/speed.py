"""How fast a morph is, stage by stage, beside the plain sequential scheme and beside what the machine can do.

    python benchmarks/speed.py                                        # the bundled model
    python benchmarks/speed.py --random-weights sd21 --device cuda --dtype bfloat16
    python benchmarks/speed.py --scaling                              # 8 to 1,000 frames, 2 to 8 images

Every run of our path is paired with one of the reference, one after the other, so that a machine that grows slower
slows both; medians are of the runs, ratios of the pairs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from architectures import random_pipeline
from diffmorpher import DiffMorpherError, FitConfig, Morpher, SampleConfig, ScheduleConfig
from diffmorpher.cli.terminal import StageBars, quiet_libraries
from diffmorpher.models.catalog import ASSETS, CATALOG, ModelSpec
from diffmorpher.models.loading import choose_device, choose_dtype
from diffmorpher.progress import quiet_bars
from reference import reference_morph

STAGES = ("fit", "invert", "schedule", "sample")
PICTURES = [
    ASSETS / "bench" / f"{name}.webp"
    for name in ("tiger-face", "wolf-face", "dog-face", "cat-face", "pear", "lemon", "rose", "tulip")
]
PROMPTS = ["a tiger face", "a wolf face", "a dog face", "a cat face", "a pear", "a lemon", "a rose", "a tulip"]


# ---- what the work is, and what the machine can do


def tflop(morpher: Morpher) -> dict[str, float]:
    """TFLOP of one U-Net row forward and of one frame's decoding, counted on the meta device; LoRAs are left out."""
    width, height = morpher.working_size()
    factor, backbone = morpher.backbone.vae_factor, morpher.backbone
    channels, text = backbone.network.config.in_channels, backbone.pipe.text_encoder.config
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(backbone.network.config)
        vae = AutoencoderKL.from_config(backbone.vae.config)
        z = torch.empty(1, channels, height // factor, width // factor)
        c = torch.empty(1, text.max_position_embeddings, backbone.network.config.cross_attention_dim)
        counts = {}
        for name, call in (
            ("row", lambda: unet(z, torch.zeros((), dtype=torch.long), c)),
            ("decode", lambda: vae.decode(z)),
        ):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                call()
            counts[name] = counter.get_total_flops() / 1e12
    return counts


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The fastest of several large matrix products: what the machine can do, in TFLOP/s."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    best = 0.0
    for _ in range(12):
        started = time.perf_counter()
        a @ b
        synchronize(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - started) / 1e12)
    return best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_mb(device: torch.device) -> float:
    """On a GPU what torch has had allocated since the last reset, on a CPU the process's largest size so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ---- the schemes


def schemes(spec: ModelSpec, frames: int) -> dict[str, Callable[[Morpher, Sequence[Image.Image]], dict[str, Any]]]:
    """Name -> a function that makes the film and returns seconds by stage, rows and figures."""
    paper, fast = ModelSpec("", ""), spec if spec != ModelSpec("", "") else CATALOG["mini"]

    def plain(morpher: Morpher, images: Sequence[Image.Image]) -> dict[str, Any]:
        rows = morpher.backbone.unet_rows
        _, _, seconds = reference_morph(morpher, images, PROMPTS[:2], frames, paper.fit, paper.sample)
        return {"seconds": seconds, "rows": morpher.backbone.unet_rows - rows}

    def ours(fit: FitConfig, sample: SampleConfig, method: Any) -> Callable[..., dict[str, Any]]:
        def run(morpher: Morpher, images: Sequence[Image.Image]) -> dict[str, Any]:
            schedule = ScheduleConfig(method=method)
            made = morpher(images, PROMPTS[:2], frames, fit=fit, sample=sample, schedule=schedule)
            seconds = {stage: made.seconds[stage] for stage in STAGES}
            return {"seconds": seconds, "rows": made.unet_rows, "pdv": made.pdv, "ppl": made.ppl}

        return run

    return {
        "sequential, two passes": plain,
        "batched, two passes": ours(paper.fit, paper.sample, "two-pass"),
        "batched, inserted": ours(paper.fit, replace(paper.sample, exact_ends=True), "insert"),
        "fast settings": ours(fast.fit, fast.sample, "insert"),
    }


def measure(morpher: Morpher, frames: int, runs: int, only: str | None, bars: Callable[..., None]) -> dict[str, Any]:
    """All schemes, `runs` times in turn."""
    device = morpher.backbone.device
    images = [Image.open(file).convert("RGB") for file in PICTURES[:2]]
    chosen = {n: f for n, f in schemes(morpher.spec, frames).items() if only is None or only in n}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    small = FitConfig(steps=2)
    morpher(images, PROMPTS[:2], 4, fit=small, sample=SampleConfig(steps=2))  # warm-up: kernels chosen, memory mapped
    for run in range(runs):
        for i, (name, scheme) in enumerate(chosen.items()):
            bars("runs", run * len(chosen) + i, runs * len(chosen))
            gc.collect()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            started = time.perf_counter()
            made = scheme(morpher, images)
            synchronize(device)
            results[name].append(made | {"total": time.perf_counter() - started, "peak_mb": peak_memory_mb(device)})
    bars("runs", runs * len(chosen), runs * len(chosen))
    return results


def table_of(results: dict[str, list[dict[str, Any]]], work: dict[str, float], peak: float, frames: int) -> Table:
    """One line per scheme: medians, the floor (operations over measured peak), and how often the reference's time."""
    table = Table(title=f"{frames} frames")
    first = next(iter(results))
    columns = (
        "scheme",
        *STAGES,
        "total s",
        "ratio",
        "rows",
        "rows/s",
        "TFLOP/s",
        "of peak",
        "floor s",
        "PDV e-4",
        "peak MB",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "scheme" else "right")
    for name, runs in results.items():
        seconds = [statistics.median(r["seconds"][stage] for r in runs) for stage in STAGES]
        total, rows = statistics.median(r["total"] for r in runs), runs[0]["rows"]
        operations = rows * work["row"] + decoded(name, frames) * work["decode"]
        ratio = statistics.median(a["total"] / b["total"] for a, b in zip(results[first], runs, strict=True))
        table.add_row(
            name,
            *(f"{s:.1f}" for s in seconds),
            f"{total:.1f}",
            f"{ratio:.2f}x",
            f"{rows:,}",
            f"{rows / sum(seconds):.0f}",
            f"{operations / total:.3g}",
            f"{operations / total / peak:.0%}",
            f"{operations / peak:.1f}",
            f"{runs[0]['pdv'] * 1e4:.2f}" if "pdv" in runs[0] else "",
            f"{max(r['peak_mb'] for r in runs):.0f}",
        )
    return table


def decoded(scheme: str, frames: int) -> int:
    return 2 * frames if "two passes" in scheme else frames


# ---- scaling


def scaling(morpher: Morpher, most: int) -> list[Table]:
    """Seconds per frame over the number of frames, and seconds of the fit over the number of images."""
    images = [Image.open(file).convert("RGB") for file in PICTURES]
    frames_table, images_table = Table(title="frames"), Table(title="images fitted together")
    for column in ("frames", "seconds", "ms/frame", "rows", "PDV e-4", "peak MB"):
        frames_table.add_column(column, justify="right")
    for column in ("images", "fit s", "s/image", "peak MB"):
        images_table.add_column(column, justify="right")
    device = morpher.backbone.device
    for count in (1, 2, 4, 8):
        started = time.perf_counter()
        morpher.fit_all(images[:count], PROMPTS[:count])
        synchronize(device)
        seconds = time.perf_counter() - started
        images_table.add_row(str(count), f"{seconds:.1f}", f"{seconds / count:.2f}", f"{peak_memory_mb(device):.0f}")
    path = morpher.prepare(images[:2], PROMPTS[:2])
    for count in [n for n in (8, 16, 64, 250, 1000) if n <= most]:
        started = time.perf_counter()
        made = morpher.film(path, count)
        seconds = time.perf_counter() - started
        cells = (f"{seconds:.1f}", f"{1000 * seconds / count:.0f}", f"{made.unet_rows:,}", f"{made.pdv * 1e4:.3f}")
        frames_table.add_row(f"{count:,}", *cells, f"{peak_memory_mb(device):.0f}")
    return [images_table, frames_table]


# ---- the command


def machine(device: torch.device) -> str:
    """The processor, the versions and the date, in one line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    if device.type == "cpu" and Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else name
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "diffusers", "diffmorpher"))
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    return f"{name}, {os.cpu_count()} cores, {packages} ({commit or 'no git'}), {time.strftime('%Y-%m-%d')}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help="a catalog name, hub id, folder or .safetensors file")
    parser.add_argument("--random-weights", metavar="NAME", help="sd21, sd15 or mini instead: no download")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--tf32", action="store_true", help="let a GPU round float32 products to TF32")
    parser.add_argument("--low-memory", action="store_true", help="as 'diffmorpher morph --low-memory'")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", help="schemes whose name has this in it")
    parser.add_argument("--scaling", action="store_true", help="frames and images instead of schemes")
    parser.add_argument("--most", type=int, default=1000, help="longest film of --scaling")
    parser.add_argument("--json", type=Path, help="also write all runs to this file")
    given = parser.parse_args(arguments)
    console = Console(width=160)
    try:
        device = choose_device(given.device)
        dtype = choose_dtype(given.dtype, device)
        quiet_libraries()
        quiet_bars()
        if given.random_weights:
            morpher = Morpher(
                random_pipeline(given.random_weights, device, dtype),
                name=f"random {given.random_weights}",
                low_memory=given.low_memory,
                tf32=given.tf32,
            )
        else:
            morpher = Morpher.from_pretrained(
                given.model, device=device, dtype=dtype, low_memory=given.low_memory, tf32=given.tf32
            )
        work, peak = tflop(morpher), peak_tflops(device, dtype)
        console.print(machine(device), highlight=False)
        console.print(
            f"{morpher.backbone.name}, {dtype}: {work['row']:.4g} TFLOP a row, {work['decode']:.4g} a decoded frame; "
            f"measured peak {peak:.3g} TFLOP/s",
            highlight=False,
        )
        if given.scaling:
            for table in scaling(morpher, given.most):
                console.print(table)
            return
        with StageBars() as bars:
            results = measure(morpher, given.frames, given.runs, given.only, bars)
    except DiffMorpherError as error:
        sys.exit(f"speed.py: error: {error}")
    console.print(table_of(results, work, peak, given.frames))
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(device), "runs": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
