"""What to try before a long training, one change at a time: `python -m training.tries WORK --minutes 10 --json tries.json`.

Each variant of text encoder and U-Net gets the same minutes of one core (of the processor's time, so that other work beside
does not matter), the same pictures and seed, and the same question at the end: the error on the held-out pictures, at fixed
noise and times, with the weights of min-SNR 5 whatever it was trained with.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from training import data
from training.diffusion import (
    CONFIGS,
    DiffusionConfig,
    DiffusionTraining,
    build_tokenizer,
    cache_latents,
    draw_batch,
)
from training.export import INSTALLED
from training.loop import moving_average, rate_at

BASE = dataclasses.replace(CONFIGS["gpu"], batch=48, ema=0.99, variants=4)


class LogitNormal(DiffusionTraining):
    """Times around the middle (Esser et al. 2024), where the even draws are quantiles."""

    def times(self, even: Tensor, draw: torch.Generator) -> Tensor:
        return self.even_times(torch.special.ndtri(even.clamp(1e-4, 1 - 1e-4)).sigmoid())


class Unweighted(DiffusionTraining):
    """The squared error of the velocity as it is, without min-SNR."""

    def weight(self, snr: Tensor) -> Tensor:
        return torch.ones_like(snr)


class Wide(DiffusionTraining):
    """Without bfloat16."""

    autocast = False


@dataclasses.dataclass(frozen=True)
class Variant:
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    kind: type[DiffusionTraining] = DiffusionTraining
    prepare: Callable[[nn.Module], object] = lambda model: None


VARIANTS = {
    "as it was trained, batches of 48": Variant(),
    "64-128-192, text 128 x 3": Variant({"channels": (64, 128, 192), "text_width": 128, "text_layers": 3}),
    "128-256-320": Variant({"channels": (128, 256, 320)}),
    "two layers a block": Variant({"layers": 2}),
    "batches of 96": Variant({"batch": 96}),
    "no min-SNR": Variant(kind=Unweighted),
    "logit-normal times": Variant(kind=LogitNormal),
    "float32": Variant(kind=Wide),
    "channels_last": Variant(prepare=lambda model: model.to(memory_format=torch.channels_last)),
}


def attempt(variant: Variant, work: Path, minutes: float, seed: int) -> dict[str, Any]:
    """Train a variant for so many minutes of the processor.

    Returns its parameters, steps and held-out errors, those of averages of several lengths.
    """
    config: DiffusionConfig = dataclasses.replace(BASE, **variant.changes)
    torch.manual_seed(seed)
    training, held_out = data.split(data.read_pictures(work))
    tokenizer = build_tokenizer([t for p in training for t in (*p.captions, *p.keywords)], config.vocabulary)
    vae = AutoencoderKL.from_pretrained(INSTALLED / "vae")
    latents = cache_latents(vae, work, training, config.variants, seed)
    unseen = cache_latents(vae, work, held_out, 1, seed, "held_out.pt")[0]
    part = variant.kind(config, tokenizer, tuple(latents.shape[2:]), torch.device("cpu"))
    variant.prepare(part.model)
    averages = {decay: moving_average(part.model, decay) for decay in (0.8, 0.9)}
    draw, words = torch.Generator().manual_seed(seed), random.Random(seed)
    steps, spent, losses = 0, 0.0, []
    while spent < 60 * minutes:
        began = time.process_time()
        rate = rate_at(spent / (60 * minutes), config.learning_rate)
        losses.append(float(part.step(*draw_batch(training, latents, config, draw, words), rate, draw)))
        spent, steps = spent + time.process_time() - began, steps + 1
        for average in averages.values():
            average.update_parameters(part.model)
    judge = DiffusionTraining(BASE, tokenizer, tuple(latents.shape[2:]), torch.device("cpu"))
    found = {}
    for name, average in {
        "longest average": part.average,
        "of 10 steps": averages[0.9],
        "of 5 steps": averages[0.8],
    }.items():
        judge.average = average.eval()
        found[name] = judge.check(unseen, [picture.name for picture in held_out], rounds=4).mean().item()
    return {
        "parameters": sum(p.numel() for p in part.model.parameters()),
        "steps": steps,
        "seconds a step": spent / steps,
        "last loss": sum(losses[-20:]) / len(losses[-20:]),
        "held out": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="what training.data wrote")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--only", action="append", help="a part of a variant's name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("tries.json"), help="results, also of earlier calls")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, variant in VARIANTS.items():
        done = json.loads(args.json.read_text()) if args.json.exists() else {}
        if name in done or (args.only and not any(part in name for part in args.only)):
            continue
        done[name] = attempt(variant, args.work, args.minutes, args.seed)
        print(name, done[name], flush=True)
        args.json.write_text(json.dumps(done, indent=2) + "\n")


if __name__ == "__main__":
    main()
