"""Write the package's pictures from the folder that `python -m training.data WORK` made, WORK:

- assets/demo: the demo's, on white, 256 x 256 RGB PNG, which every program opens;
- assets/bench: the 24 held-out pairs of the benchmark `mini`, the WebP files as published, and their manifest.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
import zipfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from training import data  # noqa: E402

ASSETS = ROOT / "src/diffmorpher/assets"
DEMO = """
    dog face, cat face, wolf face, fox face, lion face, tiger face,
    red apple, tangerine, pear, bus, automobile, rose, tulip, hamburger
"""
CATEGORIES = ("animals", "faces", "food", "vehicles", "nature", "unlike")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    args = parser.parse_args()

    # The first of several is the one without a skin tone.
    files = {p.name: p.file for p in reversed(data.read_pictures(args.work))}
    with zipfile.ZipFile(args.work / "pictures.zip") as pack:
        (args.assets / "demo").mkdir(parents=True, exist_ok=True)
        for name in (part.strip() for part in DEMO.split(",")):
            with Image.open(io.BytesIO(pack.read(files[name]))) as source:
                white = Image.new("RGBA", source.size, "white")
                picture = Image.alpha_composite(white, source.convert("RGBA")).convert("RGB")
            picture.save(args.assets / "demo" / f"{_stem(name)}.png", optimize=True)

        bench = args.assets / "bench"
        bench.mkdir(parents=True, exist_ok=True)
        with (bench / "pairs.csv").open("w", newline="", encoding="utf-8") as manifest:
            rows = csv.writer(manifest, lineterminator="\n")
            rows.writerow(["category", "name", "image_0", "image_1", "prompt_0", "prompt_1"])
            for i, pair in enumerate(data.held_out_pairs()):
                stems = [_stem(name) for name in pair]
                for name, stem in zip(pair, stems, strict=True):
                    (bench / f"{stem}.webp").write_bytes(pack.read(files[name]))
                prompts = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in pair]
                rows.writerow([CATEGORIES[i // 4], "-".join(stems), *(f"{stem}.webp" for stem in stems), *prompts])


def _stem(name: str) -> str:
    return name.replace(" ", "-")


if __name__ == "__main__":
    main()
