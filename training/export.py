"""Put the trained parts together: `python -m training.export WORK [--install]` writes WORK/mini in Stable Diffusion's layout.

With --flow it writes WORK/mini-flow in FLUX's, from the last checkpoint of training.flow, also while that is still at work.
Weights are safetensors in float16; the package loads them into float32 on a CPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from diffmorpher.models.bundled import write_sums
from training.diffusion import build_scheduler
from training.loop import moving_average, read_checkpoint

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
    )
    return _save(pipe, work / "mini")


def export_flow(work: Path, model: Path) -> Path:
    folder = work / "flow"
    vae = AutoencoderKL.from_pretrained(model / "vae")
    scales = AutoencoderKL.load_config(folder / "vae")
    vae.register_to_config(shift_factor=scales["shift_factor"], scaling_factor=scales["scaling_factor"])
    transformer = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(folder / "transformer"))
    text = T5EncoderModel(T5Config.from_pretrained(folder / "text_encoder_2"))
    average = moving_average(nn.ModuleDict({"text": text, "transformer": transformer}))
    states, _ = read_checkpoint(folder)
    average.load_state_dict(states["average"])
    pipe = FluxPipeline(
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(model / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(model / "tokenizer"),
        text_encoder_2=average.module["text"],
        tokenizer_2=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer_2"),
        transformer=average.module["transformer"],
        scheduler=FlowMatchEulerDiscreteScheduler(),  # shift 1, the same for every size
    )
    return _save(pipe, work / "mini-flow")


def _save(pipe: DiffusionPipeline, out: Path) -> Path:
    pipe.to(torch.float16)
    shutil.rmtree(out, ignore_errors=True)
    pipe.save_pretrained(out)
    for file in out.rglob("*config.json"):  # the folder it came from is nobody's business
        about = json.loads(file.read_text())
        about.pop("_name_or_path", None)
        if "dtype" in about:  # transformers would load it as it is stored, diffusers its parts in float32
            about["dtype"] = "float32"
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
    write_sums(INSTALLED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--install", action="store_true", help="put it into the package, in place of the bundled model")
    parser.add_argument("--flow", action="store_true", help="the flow model instead, from its last checkpoint")
    parser.add_argument("--model", type=Path, default=INSTALLED, help="the one that training.flow was given")
    args = parser.parse_args()
    if args.flow and args.install:
        parser.error("only the model in Stable Diffusion's layout is bundled: leave --install out")
    out = export_flow(args.work, args.model) if args.flow else export(args.work)
    if args.install:
        install(out)
    size = sum(file.stat().st_size for file in out.rglob("*.safetensors")) / 1e6
    print(f"Wrote {INSTALLED if args.install else out}, {size:.1f} MB of weights.")


if __name__ == "__main__":
    main()
