"""The sheets of benchmarks/ and docs/results.md: `python scripts/make_bench_pictures.py RESULTS`, a benchmark's folder.

It holds what `diffmorpher bench mini --methods dissolve,warp,preview,diffmorpher-fast --out RESULTS` makes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from diffmorpher.evaluation.datasets import load_dataset
from diffmorpher.files.films import contact_sheet

ROOT = Path(__file__).resolve().parents[1]
MIDDLE = (0, 2, 4, 5, 6, 8, 10, 11, 12, 14, 16)  # of 17 frames, more of the middle
METHODS = ("dissolve", "warp", "preview", "diffmorpher-fast")
THREE = ("tiger-face-wolf-face", "lion-face-fox-face", "taxi-police-car")


def film(results: Path, pair: str, method: str, frames: tuple[int, ...], side: int) -> list[Image.Image]:
    pictures = [Image.open(results / pair / method / f"{i:03d}.png").convert("RGB") for i in frames]
    return [picture.resize((side, side), Image.Resampling.LANCZOS) for picture in pictures]


def main() -> None:
    results = Path(sys.argv[1])
    names = [pair.name for pair in load_dataset("mini").pairs]
    halves = [
        contact_sheet([f for name in part for f in film(results, name, "diffmorpher-fast", MIDDLE, 92)], len(MIDDLE))
        for part in (names[:12], names[12:])
    ]
    contact_sheet(halves, 2, gap=24).save(ROOT / "benchmarks/frames.jpg", quality=88)
    even = tuple(range(0, 17, 2))
    groups = [
        contact_sheet([f for method in METHODS for f in film(results, name, method, even, 108)], len(even))
        for name in THREE
    ]
    contact_sheet(groups, 1, gap=16).save(ROOT / "docs/methods.jpg", quality=88)


if __name__ == "__main__":
    main()
