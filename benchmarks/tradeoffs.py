"""What fewer U-Net rows cost: fits, steps and schedules, one change at a time, over held-out pairs of the bundled model.

    python benchmarks/tradeoffs.py --pairs 6 --json tradeoffs.json
    python benchmarks/tradeoffs.py --pairs 6 --model work/mini-flow --size 256x256    # what flows are set to
    python benchmarks/tradeoffs.py --read tradeoffs.json rest.json    # parts made by --part, as one table

The rule of inversion, the attention blocks, exact ends and fits of flows are chosen by the second.

Every line is the mean over the pairs. "lost" is what the ends lose without `exact_ends`: the perceptual distance of the first
and last frame from the pictures that the autoencoder alone gives back.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from diffmorpher import FitConfig, Morpher, SampleConfig, ScheduleConfig
from diffmorpher.cli.terminal import StageBars, quiet_libraries
from diffmorpher.evaluation.datasets import Pair, load_dataset
from diffmorpher.evaluation.metrics import figures
from diffmorpher.files.films import contact_sheet
from diffmorpher.files.pictures import fit_image, load_image
from diffmorpher.method.perceptual import perceptual_distance
from diffmorpher.models.catalog import CATALOG, ModelSpec
from diffmorpher.models.levels import Level, NoiseSchedule
from diffmorpher.path import to_pixels
from diffmorpher.progress import quiet_bars
from diffmorpher.settings import parse_size

FRAMES = 16
FIGURES = ("ppl", "pdv", "end_distance", "end_psnr", "roughness", "ghost")


@dataclass(frozen=True)
class Variant:
    """inversion: the rule, None for the family's. blocks: attention is mixed in sites whose path has this in it. shift: of a
    flow's levels s to shift s / (1 + (shift - 1) s); below 1 they are denser near the picture, above it near the noise."""

    name: str
    fit: FitConfig | None
    sample: SampleConfig
    schedule: ScheduleConfig
    inversion: Literal["plain", "uni"] | None = None
    blocks: str = ""
    shift: float = 1.0


PAPER_FIT, FAST_FIT = FitConfig(), CATALOG["mini"].fit
FAST, PAPER = CATALOG["mini"].sample, SampleConfig()
INSERT, TWO_PASS = ScheduleConfig(), ScheduleConfig(method="two-pass")


def variants() -> list[Variant]:
    """The paper's settings, the bundled model's, and between them what was tried."""
    fits = [
        FitConfig(steps=50, draws=2, learning_rate=1e-3, decay=True),
        FitConfig(steps=23, draws=4, learning_rate=3e-4, decay=True),
        FitConfig(steps=12, draws=4, learning_rate=1e-3, decay=True),
        FitConfig(steps=12, draws=8, learning_rate=6e-3, decay=True),
        FitConfig(steps=46, draws=1, learning_rate=2e-3, decay=True),
    ]
    shares = [share for share in (0.0, 0.3, 0.6, 1.0) if share != FAST.attention_lambda]
    return [
        Variant("paper", PAPER_FIT, PAPER, TWO_PASS),
        Variant("insert", PAPER_FIT, PAPER, INSERT),
        Variant("insert, exact ends", PAPER_FIT, replace(PAPER, exact_ends=True), INSERT),
        Variant("insert, fit to 0", replace(PAPER_FIT, decay=True), PAPER, INSERT),
        Variant("20 steps", PAPER_FIT, replace(PAPER, steps=20), INSERT),
        *(Variant(f"{steps} steps, exact", FAST_FIT, replace(FAST, steps=steps), INSERT) for steps in (50, 20, 12, 5)),
        *(Variant(describe(fit), fit, FAST, INSERT) for fit in fits),
        Variant("no LoRA", None, FAST, INSERT),
        *(
            Variant(f"attention_lambda {share}", FAST_FIT, replace(FAST, attention_lambda=share), INSERT)
            for share in shares
        ),
        Variant("guidance_scale 2", FAST_FIT, replace(FAST, guidance_scale=2.0), INSERT),
        Variant("the bundled model's", FAST_FIT, FAST, INSERT),
    ]


def flow_variants(own: ModelSpec) -> list[Variant]:
    """A flow family's own settings, and others, one change at a time."""
    fit, sample = own.fit, own.sample
    lost = replace(sample, exact_ends=False)
    fits = [replace(fit, learning_rate=rate) for rate in (3e-4, 1e-3)] + [replace(fit, steps=100)]
    fits += [FitConfig(steps=50, draws=4, learning_rate=1e-3, decay=True)]
    kinds: list[dict[str, Any]] = [
        *({"attention_lambda": share} for share in (0.0, 0.3, 1.0)),
        {"attention_mode": "kv"},
        {"adain": False},
        *({"steps": steps} for steps in (28, 20)),
        {"guidance_scale": 2.0},
    ]
    return [
        Variant("the family's", fit, sample, INSERT),
        Variant("plain inversion", fit, sample, INSERT, "plain"),
        Variant("no exact ends", fit, lost, INSERT),
        Variant("no exact ends, plain", fit, lost, INSERT, "plain"),
        *(
            Variant(", ".join(f"{k} {v}" for k, v in each.items()), fit, replace(sample, **each), INSERT)
            for each in kinds
        ),
        Variant("levels denser near the picture", fit, sample, INSERT, shift=1 / 3),
        Variant("levels denser near the noise", fit, sample, INSERT, shift=3.0),
        Variant("joint blocks alone", fit, sample, INSERT, blocks=".transformer_blocks."),
        Variant("single blocks alone", fit, sample, INSERT, blocks=".single_transformer_blocks."),
        *(Variant(describe(each), each, sample, INSERT) for each in fits),
    ]


def describe(fit: FitConfig) -> str:
    return f"fit {fit.steps} x {fit.draws}, {fit.learning_rate:g}{' to 0' if fit.decay else ''}"


def shifted(backbone: Any, steps: int, shift: float) -> NoiseSchedule:
    even = [i / steps for i in range(steps + 1)]
    levels = [shift * s / (1 + (shift - 1) * s) for s in even]
    return NoiseSchedule.straight([Level(1 - s, s, s * backbone.time_scale) for s in levels])


def run(
    morpher: Morpher, size: tuple[int, int], pair: Pair, variant: Variant, loras: dict[FitConfig | None, Any]
) -> tuple[dict[str, float], list[Image.Image]]:
    """The figures of one pair's film with its U-Net rows, and its frames."""
    images = [fit_image(load_image(image), size) for image in pair.images]
    backbone: Any = morpher.backbone
    backbone.inversion = variant.inversion or type(backbone).inversion
    sites = type(backbone).attention_sites(backbone)
    backbone.attention_sites = lambda: [site for site in sites if variant.blocks in f".{site.layer}"]
    if variant.shift != 1:
        backbone.schedule = lambda steps: shifted(backbone, steps, variant.shift)
    else:
        vars(backbone).pop("schedule", None)
    fit, rows = variant.fit, morpher.backbone.unet_rows
    if fit not in loras:
        loras[fit] = morpher.fit_all(images, pair.prompts, fit, size=size) if fit else None
        rows = morpher.backbone.unet_rows
    path = morpher.prepare(images, pair.prompts, loras[fit], fit=None, steps=variant.sample.steps, size=size)
    film = morpher.film(path, FRAMES, variant.sample, variant.schedule)
    rows = morpher.backbone.unet_rows - rows + (len(images) * 3 * fit.steps * fit.draws if fit else 0)
    distance = perceptual_distance(str(morpher.backbone.device))
    made = figures(to_pixels(film.frames), to_pixels([images[0], images[-1]]), distance)
    ends = path.sample([0, path.num_images - 1], replace(variant.sample, exact_ends=False), output="pt") * 2 - 1
    with torch.inference_mode():
        lost = distance(ends, path.decode(path.latents)).mean().item()
    return {"rows": rows, "lost": lost} | {name: made[name] for name in FIGURES}, film.frames


def table_of(results: dict[str, list[dict[str, float]]]) -> Table:
    table = Table(title=f"{FRAMES} frames, means of {len(next(iter(results.values())))} pairs")
    for column in ("variant", "rows", "PPL", "PDV e-4", "end distance", "end dB", "lost", "roughness", "ghost"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, runs in results.items():
        mean = {key: sum(r[key] for r in runs) / len(runs) for key in runs[0]}
        table.add_row(
            name,
            f"{mean['rows']:,.0f}",
            f"{mean['ppl']:.3f}",
            f"{mean['pdv'] * 1e4:.2f}",
            f"{mean['end_distance']:.4f}",
            f"{mean['end_psnr']:.1f}",
            f"{mean['lost']:.4f}",
            f"{mean['roughness']:.2f}",
            f"{mean['ghost']:.2f}",
        )
    return table


def joined(parts: Sequence[dict[str, list[dict[str, float]]]]) -> dict[str, list[dict[str, float]]]:
    """The runs of several files, of the variants that are in all of them."""
    return {
        name: [run for part in parts for run in part[name]] for name in parts[0] if all(name in part for part in parts)
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument(
        "--part", type=int, nargs=2, default=(1, 1), metavar=("I", "N"), help="the i-th of n parts of the pairs"
    )
    parser.add_argument("--model", default="mini")
    parser.add_argument("--size", type=parse_size, help="in place of the model's own, such as 256x256")
    parser.add_argument("--only", nargs="+", help="variants whose name has one of these in it")
    parser.add_argument(
        "--read", nargs="+", type=Path, metavar="JSON", help="the table of other runs' files, and no run"
    )
    parser.add_argument("--json", type=Path, help="also write every pair's figures to this file")
    parser.add_argument("--sheets", type=Path, metavar="FOLDER", help="also write every pair's films there, a row each")
    given = parser.parse_args(arguments)
    if given.read:
        Console(width=120).print(table_of(joined([json.loads(file.read_text()) for file in given.read])))
        return
    quiet_libraries()
    quiet_bars()
    morpher = Morpher.from_pretrained(given.model)
    size = given.size or morpher.working_size()
    tried = variants() if morpher.backbone.network_part == "unet" else flow_variants(morpher.spec)
    chosen = [v for v in tried if given.only is None or any(part in v.name for part in given.only)]
    if not chosen:
        parser.error(
            f"no variant has {' or '.join(given.only)} in its name; there are {', '.join(v.name for v in tried)}."
        )
    part, parts = given.part
    pairs = load_dataset("mini").take(given.pairs)[part - 1 :: parts]
    if not pairs:
        parser.error(f"of {given.pairs} pairs none is in part {part} of {parts}.")
    results: dict[str, list[dict[str, float]]] = {v.name: [] for v in chosen}
    with StageBars() as bars:
        for i, pair in enumerate(pairs):
            loras: dict[FitConfig | None, Any] = {}
            frames: list[Image.Image] = []
            for j, variant in enumerate(chosen):
                bars("runs", i * len(chosen) + j, len(pairs) * len(chosen))
                made, film = run(morpher, size, pair, variant, loras)
                results[variant.name].append(made)
                frames += film
                if given.json:
                    given.json.write_text(json.dumps(results, indent=2) + "\n")
            if given.sheets:
                given.sheets.mkdir(parents=True, exist_ok=True)
                contact_sheet(frames, FRAMES).save(given.sheets / f"{pair.name}.png")
        bars("runs", len(pairs) * len(chosen), len(pairs) * len(chosen))
    Console(width=120).print(table_of(results))


if __name__ == "__main__":
    main()
