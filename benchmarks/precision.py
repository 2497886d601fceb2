"""What bfloat16 changes: the same films in both, by the benchmark's figures.

python benchmarks/precision.py --pairs 6
python benchmarks/precision.py --pairs 3 --model work/mini-flow --size 256x256
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from diffmorpher import Morpher
from diffmorpher.cli.terminal import quiet_libraries
from diffmorpher.files.pictures import load_image
from diffmorpher.models.catalog import ASSETS
from diffmorpher.progress import quiet_bars
from diffmorpher.settings import parse_size

FIGURES = ("PPL", "PDV e-4", "end dB")


def figures(pictures: list[Image.Image], made: Any) -> tuple[float, ...]:
    """Of one film: its length, its unevenness, and how near its ends are to the pictures."""
    ends = [(made.frames[0], pictures[0]), (made.frames[-1], pictures[-1])]
    errors = [np.asarray(a, float) - np.asarray(b.resize(a.size), float) for a, b in ends]
    decibels = -10 * np.log10(np.mean([np.mean(e**2) for e in errors]) / 255**2)
    return made.ppl, made.pdv * 1e4, float(decibels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--size", type=parse_size, help="in place of the model's own, such as 256x256")
    given = parser.parse_args()
    quiet_libraries()
    quiet_bars()
    with (ASSETS / "bench" / "pairs.csv").open(encoding="utf-8") as file:
        pairs = list(csv.DictReader(file))
    chosen = pairs[:: max(1, len(pairs) // given.pairs)][: given.pairs]
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    morphers = {name: Morpher.from_pretrained(given.model, device="cpu", dtype=dtype) for name, dtype in dtypes.items()}
    for morpher in morphers.values():
        morpher.spec = replace(morpher.spec, size=given.size or morpher.spec.size)
    table = Table(title=f"{given.model}, {given.frames} frames")
    for column in ("pair", "dtype", *FIGURES, "seconds", "dB to float32"):
        table.add_column(column, justify="left" if column in ("pair", "dtype") else "right")
    for pair in chosen:
        pictures = [load_image(ASSETS / "bench" / pair[f"image_{k}"]) for k in (0, 1)]
        films = {}
        for name, morpher in morphers.items():
            made = morpher(pictures, [pair["prompt_0"], pair["prompt_1"]], given.frames)
            films[name] = np.stack([np.asarray(frame, float) for frame in made.frames])
            unlike = np.mean((films[name] - films["float32"]) ** 2) / 255**2
            figures_of = [f"{x:.4f}" for x in figures(pictures, made)]
            near = f"{-10 * np.log10(unlike):.1f}" if unlike else ""
            table.add_row(pair["name"], name, *figures_of, f"{sum(made.seconds.values()):.0f}", near)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
