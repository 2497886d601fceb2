"""Put the trained parts together: `python -m training.export WORK [--install]` writes WORK/mini in Stable Diffusion's layout.

Weights are safetensors in float16; the package loads them into float32 on a CPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from training.diffusion import build_scheduler

INSTALLED = Path(__file__).resolve().parents[1] / "src/diffmorpher/assets/mini"


def export(work: Path) -> Path:
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(work / "unet"),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16)
    out = work / "mini"
    shutil.rmtree(out, ignore_errors=True)
    pipe.save_pretrained(out)
    for file in out.rglob("*config.json"):  # the folder it came from is nobody's business
        about = json.loads(file.read_text())
        about.pop("_name_or_path", None)
        file.write_text(json.dumps(about, indent=2) + "\n")
    return out


def install(folder: Path) -> None:
    """Replace the bundled model, all but its card."""
    for part in ("vae", "unet", "text_encoder", "tokenizer", "scheduler"):
        shutil.rmtree(INSTALLED / part, ignore_errors=True)
        shutil.copytree(folder / part, INSTALLED / part)
    shutil.copy(folder / "model_index.json", INSTALLED)
    for file in INSTALLED.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes for the owner alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--install", action="store_true", help="put it into the package, in place of the bundled model")
    args = parser.parse_args()
    out = export(args.work)
    if args.install:
        install(out)
    size = sum(file.stat().st_size for file in out.rglob("*.safetensors")) / 1e6
    print(f"Wrote {INSTALLED if args.install else out}, {size:.1f} MB of weights.")


if __name__ == "__main__":
    main()
