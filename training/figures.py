"""What a trained model is worth, on held-out pictures: the figures of the model's card.

`python -m training.figures WORK MODEL --out DIR`, where MODEL is a folder, or `mini` for the bundled model, prints
- the autoencoder's PSNR and perceptual distance on every held-out picture,
- the denoising loss on them, as the training's log has it,
- distance and PSNR of input -> LoRA fit -> inversion -> sampling on the pictures of twelve held-out pairs,
and writes sheets to be looked at: pictures.png (64 names drawn from the training set, with their names), morphs.png (the
twelve pairs), further.png (twelve pairs that nobody chose) and, beside them, figures.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from itertools import combinations
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from diffmorpher import Morpher
from diffmorpher.files.pictures import fit_image
from diffmorpher.method.perceptual import perceptual_distance
from diffmorpher.path import to_pil, to_pixels
from training import data
from training.autoencoder import psnr, reconstruct
from training.diffusion import CONFIGS, DiffusionTraining

# What can be named at sight: not flags, signs, times of day or the many people.
NAMEABLE = {"Animals & Nature", "Food & Drink", "Travel & Places", "Objects", "Activities", "Smileys & Emotion"}
PARTS = ("autoencoder", "denoising", "pictures", "morphs", "further")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("model", nargs="?", default="mini")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    parser.add_argument("--parts", default=",".join(PARTS), help="comma list; all by default")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    morpher = Morpher.from_pretrained(args.model, device=args.device)
    training, held_out = data.split(data.read_pictures(args.work))
    file = args.out / "figures.json"
    figures = json.loads(file.read_text()) if file.exists() else {}
    for part in args.parts.split(","):
        if part == "autoencoder":
            figures |= autoencoder(morpher, args.work, held_out)
        elif part == "denoising":
            figures |= denoising(morpher, args.work, held_out)
        elif part == "pictures":
            pictures(morpher, training).save(args.out / "pictures.png")
        elif part == "morphs":
            sheet, ends = morphs(morpher, args.work, held_out, twelve_pairs())
            sheet.save(args.out / "morphs.png")
            figures |= ends
        elif part == "further":
            pairs = further_pairs(held_out)
            print("\n".join(" to ".join(pair) for pair in pairs))
            morphs(morpher, args.work, held_out, pairs)[0].save(args.out / "further.png")
        else:
            parser.error(f"there is no part {part!r}; there are {', '.join(PARTS)}")
        file.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def autoencoder(morpher: Morpher, work: Path, held_out: list[data.Picture]) -> dict[str, float]:
    """Means over the held-out pictures."""
    images = torch.from_numpy(data.read_images(work, held_out, morpher.pipe.vae.config.sample_size)).float() / 127.5 - 1
    made = reconstruct(morpher.pipe.vae, images)
    distances = torch.cat([perceptual_distance()(a, b) for a, b in zip(made.split(16), images.split(16), strict=True)])
    return {
        "autoencoder_psnr": round(psnr(made, images).mean().item(), 2),
        "autoencoder_distance": round(distances.mean().item(), 4),
        "autoencoder_pictures": len(images),
    }


@torch.inference_mode()
def denoising(morpher: Morpher, work: Path, held_out: list[data.Picture], rounds: int = 4) -> dict[str, float]:
    """The mean min-SNR-weighted error of the predicted velocity; `rounds` times and noises a picture, always the same."""
    vae, unet = morpher.pipe.vae, morpher.pipe.unet
    images = torch.from_numpy(data.read_images(work, held_out, vae.config.sample_size)).float() / 127.5 - 1
    latents = torch.cat([vae.encode(batch.to(vae.device)).latent_dist.mean for batch in images.split(32)])
    judge = DiffusionTraining(CONFIGS["tiny"], morpher.pipe.tokenizer, tuple(latents.shape[1:]), unet.device)
    judge.average.module = nn.ModuleDict({"text": morpher.pipe.text_encoder, "unet": unet})
    errors = judge.check(latents * vae.config.scaling_factor, [picture.name for picture in held_out], rounds)
    return {"denoising_loss": round(errors.mean().item(), 4)}


def pictures(morpher: Morpher, training: list[data.Picture], guidance: float = 3.0, steps: int = 30) -> Image.Image:
    """Text to picture for 64 names, drawn once and for all with seed 0."""
    names = sorted({p.name for p in training if p.category in NAMEABLE and "clock face" not in p.name})
    names = random.Random(0).sample(names, 64)
    made: list[Image.Image] = []
    for i in range(0, 64, 16):
        generator = torch.Generator().manual_seed(i)
        prompts = [f"a {name}" for name in names[i : i + 16]]
        made += morpher.pipe(prompts, num_inference_steps=steps, guidance_scale=guidance, generator=generator).images
    return _sheet(made, names, columns=8)


def twelve_pairs() -> list[tuple[str, str]]:
    """Three pairs each of animals, food, vehicles and unlike things."""
    pairs = data.held_out_pairs()
    return [pair for start in (0, 8, 12, 20) for pair in pairs[start : start + 3]]


def further_pairs(held_out: list[data.Picture], count: int = 12) -> list[tuple[str, str]]:
    """Pairs that nobody has looked at: of things of one category that share a keyword, none of them in the benchmark or in two
    pairs, the first ones in the order of the sha256 of "one to other"."""
    known = {name for pair in data.held_out_pairs() for name in pair}
    things = {p.name: p for p in held_out if p.category in NAMEABLE and p.name not in known and "clock" not in p.name}
    pairs = [
        (one, other)
        for one, other in combinations(sorted(things), 2)
        if things[one].category == things[other].category and {*things[one].keywords} & {*things[other].keywords}
    ]
    chosen: list[tuple[str, str]] = []
    for pair in sorted(pairs, key=lambda pair: hashlib.sha256(" to ".join(pair).encode()).digest()):
        if not {*pair} & {name for each in chosen for name in each}:
            chosen.append(pair)
    return chosen[:count]


def morphs(
    morpher: Morpher, work: Path, held_out: list[data.Picture], chosen: list[tuple[str, str]]
) -> tuple[Image.Image, dict[str, float]]:
    """Films of 16 frames, with the model's own settings, between held-out pictures."""
    rows: list[Image.Image] = []
    distances: list[float] = []
    decibels: list[float] = []
    for pair in chosen:
        found = [next(p for p in held_out if p.name == name) for name in pair]
        inputs = to_pil(torch.from_numpy(data.read_images(work, found, 256)).float() / 127.5 - 1)
        result = morpher(inputs, prompts=[f"a {name}" for name in pair], num_frames=16)
        size = (result.frames[0].width, result.frames[0].height)
        wanted = to_pixels([fit_image(picture, size) for picture in inputs])
        made = to_pixels([result.frames[0], result.frames[-1]])
        distances += _values(perceptual_distance()(made, wanted))
        decibels += _values(psnr(made, wanted))
        rows += [result.frames[i] for i in (0, 3, 5, 6, 7, 8, 9, 10, 12, 15)]
        print(f"{pair[0]} to {pair[1]}: ends {distances[-2]:.3f} {distances[-1]:.3f}, pdv {result.pdv:.2e}", flush=True)
    ends = {
        "round_trip_distance": round(sum(distances) / len(distances), 4),
        "round_trip_psnr": round(sum(decibels) / len(decibels), 2),
        "round_trip_pictures": len(distances),
    }
    return _sheet(rows, None, columns=10), ends


def _values(tensor: Tensor) -> list[float]:
    return [float(value) for value in tensor]


def _sheet(pictures: list[Image.Image], names: list[str] | None, columns: int) -> Image.Image:
    width, height = pictures[0].size
    step = height + (14 if names else 0)
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * step), "white")
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        corner = (i % columns * width, i // columns * step)
        sheet.paste(picture, corner)
        if names:
            draw.text((corner[0] + 2, corner[1] + height), names[i][:22], fill="black")
    return sheet


if __name__ == "__main__":
    main()
