"""What inversion loses by either rule: pictures there and back again, without LoRAs and with the model's recommended ones.

    python benchmarks/inversion.py [--model MODEL]

Error of the latents (root mean square) and PSNR of the pictures against the decoded latents, of the demo's first four pictures.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from PIL import Image

from diffmorpher import Morpher
from diffmorpher.method.invert import invert
from diffmorpher.models.catalog import ASSETS
from diffmorpher.path import MorphPath


@torch.no_grad()
def lost(path: MorphPath, steps: int, rule: Any) -> str:
    backbone, c = path.backbone, path.conditioning
    schedule = backbone.schedule(steps)
    with backbone.borrowed(), path._lora():
        z = invert(backbone, path.latents, c, steps, rule=rule)[-1]
        for level in range(steps, 0, -1):
            z = schedule.down(backbone.predict(z, schedule.levels[level], c), level)
        error = (backbone.decode(z) - backbone.decode(path.latents)).square().mean() / 4  # of a range of 2
    return f"{(z - path.latents).square().mean().sqrt():.2g}, {-10 * math.log10(error):.1f} dB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    morpher = Morpher.from_pretrained(parser.parse_args().model, device="cpu")
    pictures = [Image.open(file) for file in sorted((ASSETS / "demo").glob("*.png"))[:4]]
    print("| steps | LoRA | plain | uni |\n| --- | --- | --- | --- |")
    for name, fit in (("none", None), ("fitted", "recommended")):
        path = morpher.prepare(pictures, fit=fit, steps=1)  # type: ignore[arg-type]
        for steps in (10, 20, 40, 80):
            print(f"| {steps} | {name} | {lost(path, steps, 'plain')} | {lost(path, steps, 'uni')} |")


if __name__ == "__main__":
    main()
