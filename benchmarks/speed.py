"""How fast a morph is, stage by stage, beside the plain sequential scheme and beside what the machine can do.

    python benchmarks/speed.py                                        # the bundled model
    python benchmarks/speed.py --random-weights sd21 --device cuda --dtype bfloat16
    python benchmarks/speed.py --scaling                              # 8 to 1,000 frames, 2 to 8 images
    python benchmarks/speed.py --random-weights sdxl --size 512 512 --dtype bfloat16 --rows    # one row of each kind

Every run of our path is paired with one of the reference, one after the other, so that a machine that grows slower
slows both; medians are of the runs, ratios of the pairs.
"""

from __future__ import annotations

import argparse
import copy
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
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from architectures import ARCHITECTURES, random_pipeline
from diffmorpher import DiffMorpherError, FitConfig, Morpher, SampleConfig, ScheduleConfig
from diffmorpher.cli.terminal import StageBars, quiet_libraries
from diffmorpher.files.pictures import load_image
from diffmorpher.method.fit import fit_loras
from diffmorpher.models.backbone import Backbone
from diffmorpher.models.catalog import ASSETS, CATALOG, ModelSpec
from diffmorpher.models.conditioning import Conditioning
from diffmorpher.models.levels import Level
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


def tflop(backbone: Backbone, conditioning: Conditioning, size: tuple[int, int]) -> dict[str, float]:
    """TFLOP of one row of the network forward and of one frame's decoding, counted on the meta device; LoRAs are left out.

    conditioning: one row; size: (width, height) in pixels.
    """
    meta = torch.device("meta")
    kind, level = type(backbone), backbone.schedule(2).levels[1]
    copied: Any = copy.copy(backbone)
    copied.__class__ = type(kind.__name__, (kind,), {"device": meta})
    with meta:
        copied.network = type(backbone.network).from_config(backbone.network.config)
        copied.vae = type(backbone.vae).from_config(backbone.vae.config)
        latents, _ = copied.encode(torch.empty(1, 3, *reversed(size)))
        told = Conditioning({name: x.to(meta) for name, x in conditioning.tensors.items()})
        level = Level(*(torch.as_tensor(x).to(meta) for x in (level.a, level.s, level.time)))
        counts = {}
        for name, call in (
            ("row", lambda: copied.output(latents, level, told)),
            ("decode", lambda: copied.decode(latents)),
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


Scheme = Callable[[Morpher, Sequence[Image.Image]], dict[str, Any]]


def schemes(morpher: Morpher, frames: int, steps: int | None = None, fit_steps: int | None = None) -> dict[str, Scheme]:
    """Name -> a function that makes the film and returns seconds by stage, rows and figures.

    steps, fit_steps: in place of every scheme's own. The sequential reference knows U-Nets alone.
    """
    paper = ModelSpec("", "")
    fast = CATALOG["mini"] if replace(morpher.spec, size=None) == paper else morpher.spec
    if steps:
        paper, fast = (replace(spec, sample=replace(spec.sample, steps=steps)) for spec in (paper, fast))
    if fit_steps:
        paper, fast = (replace(spec, fit=replace(spec.fit, steps=fit_steps)) for spec in (paper, fast))

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

    reference = {"sequential, two passes": plain} if morpher.backbone.network_part == "unet" else {}
    return reference | {
        "batched, two passes": ours(paper.fit, paper.sample, "two-pass"),
        "batched, inserted": ours(paper.fit, replace(paper.sample, exact_ends=True), "insert"),
        "fast settings": ours(fast.fit, fast.sample, "insert"),
    }


def measure(morpher: Morpher, chosen: dict[str, Scheme], runs: int, bars: Callable[..., None]) -> dict[str, Any]:
    """All schemes, `runs` times in turn."""
    device = morpher.backbone.device
    images = [load_image(file) for file in PICTURES[:2]]  # on white, as the program does
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
    images = [load_image(file) for file in PICTURES]
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


# ---- one row


def rows(morpher: Morpher, work: dict[str, float], peak: float) -> Table:
    """Seconds of a row forward, a row fitted and a frame decoded: for what is too large for a film here."""
    backbone, size = morpher.backbone, morpher.working_size()
    table = Table(title="one of each")
    for column in ("", "seconds", "TFLOP/s", "of peak", "peak MB"):
        table.add_column(column, justify="right" if column else "left")
    latents = torch.zeros(1, backbone.latent_channels, *(side // backbone.vae_factor for side in reversed(size)))
    level = backbone.schedule(2).levels[1]
    with backbone.borrowed(), torch.no_grad():
        told = backbone.encode_prompts(["a pear"])

        def forward() -> None:
            backbone.output(latents.to(backbone.device), level, told)

        def fitted() -> None:
            fit_loras(backbone, latents, torch.ones_like(latents), told, FitConfig(steps=1), 0)

        def decoded() -> None:
            backbone.decode(latents)

        # Of a fit's gradients those of the frozen weights are left out; what is left has not been counted.
        tflop = {"forward": work["row"], "fitted, forward and back": None, "frame decoded": work["decode"]}
        for (name, operations), run in zip(tflop.items(), (forward, fitted, decoded), strict=True):
            started = time.perf_counter()
            run()
            synchronize(backbone.device)
            seconds = time.perf_counter() - started
            speed = (operations or 0) / seconds
            said = (f"{speed:.3g}", f"{speed / peak:.0%}") if operations else ("", "")
            table.add_row(name, f"{seconds:.1f}", *said, f"{peak_memory_mb(backbone.device):,.0f}")
    return table


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
    parser.add_argument("--random-weights", metavar="NAME", help=f"instead, no download: {', '.join(ARCHITECTURES)}")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--tf32", action="store_true", help="let a GPU round float32 products to TF32")
    parser.add_argument("--low-memory", action="store_true", help="as 'diffmorpher morph --low-memory'")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, nargs=2, metavar=("W", "H"), help="pixels; else the model's own size")
    parser.add_argument("--steps", type=int, help="steps of inversion and sampling, in all schemes")
    parser.add_argument("--fit-steps", type=int, help="steps of the fit, in all schemes")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", help="schemes whose name has this in it")
    parser.add_argument("--rows", action="store_true", help="one row of each kind instead of schemes")
    parser.add_argument("--small-text", action="store_true", help="with --random-weights: few layers of T5 or Qwen")
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
                random_pipeline(given.random_weights, device, dtype, given.small_text),
                name=f"random {given.random_weights}",
                low_memory=given.low_memory,
                tf32=given.tf32,
            )
        else:
            morpher = Morpher.from_pretrained(
                given.model, device=device, dtype=dtype, low_memory=given.low_memory, tf32=given.tf32
            )
        if given.size:
            morpher.spec = replace(morpher.spec, size=tuple(given.size))
        size, dtype = morpher.working_size(), next(morpher.backbone.network.parameters()).dtype
        work = tflop(morpher.backbone, morpher.backbone.encode_prompts(["a pear"]), size)
        peak = peak_tflops(device, dtype)
        console.print(machine(device), highlight=False)
        console.print(
            f"{morpher.backbone.name}, {size[0]} x {size[1]}, {dtype}: {work['row']:.4g} TFLOP a row, "
            f"{work['decode']:.4g} a decoded frame; measured peak {peak:.3g} TFLOP/s",
            highlight=False,
        )
        if given.rows:
            console.print(rows(morpher, work, peak))
            return
        if given.scaling:
            for table in scaling(morpher, given.most):
                console.print(table)
            return
        every = schemes(morpher, given.frames, given.steps, given.fit_steps)
        chosen = {name: scheme for name, scheme in every.items() if given.only is None or given.only in name}
        if not chosen:
            sys.exit(f"speed.py: error: no scheme has {given.only!r} in its name; there are {', '.join(every)}.")
        with StageBars() as bars:
            results = measure(morpher, chosen, given.runs, bars)
    except DiffMorpherError as error:
        sys.exit(f"speed.py: error: {error}")
    console.print(table_of(results, work, peak, given.frames))
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(device), "runs": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
