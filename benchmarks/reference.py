"""DiffMorpher as one would first write it: one picture, one frame, one row at a time. What speed is measured against.

Each LoRA is fitted by itself at batch 1, each image inverted by itself; the two end trajectories are sampled first and the
inputs of their up blocks' self-attention stored, step by step; then each frame is sampled alone, with its LoRA set anew
and its keys and values taken from what was stored; all of it twice, for rescheduling. The same frames as `film` in two
passes gives (tests/test_speed.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffmorpher import FitConfig, Morpher, SampleConfig
from diffmorpher.files.pictures import fit_image
from diffmorpher.inputs import encode
from diffmorpher.method.fit import fit_loras
from diffmorpher.method.interpolate import Between, noise_between
from diffmorpher.method.invert import invert
from diffmorpher.method.lora import LoraBank
from diffmorpher.method.perceptual import perceptual_distance
from diffmorpher.method.schedule import even_positions, uniform_positions
from diffmorpher.models.conditioning import Conditioning
from diffmorpher.path import to_bytes, to_pil

#: Per step and layer, the inputs that an end image's self-attention had.
Stored = list[list[Tensor]]


def reference_morph(
    morpher: Morpher,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    num_frames: int,
    fit: FitConfig,
    sample: SampleConfig,
    seed: int = 0,
) -> tuple[list[Image.Image], list[float], dict[str, float]]:
    """The frames between two images, their alphas, and the seconds of each stage."""
    backbone, seconds = morpher.backbone, {}
    mean, std, conditioning = encode(morpher.backbone, [fit_image(i, morpher.working_size()) for i in images], prompts)
    started = time.perf_counter()
    banks = [
        fit_loras(backbone, mean[k : k + 1], std[k : k + 1], conditioning.rows(slice(k, k + 1)), fit, seed)
        for k in (0, 1)
    ]
    seconds["fit"] = time.perf_counter() - started

    started = time.perf_counter()
    noises = []
    for k, bank in enumerate(banks):
        with backbone.borrowed(), bank.attached(backbone.network):
            noises.append(invert(backbone, mean[k : k + 1], conditioning.rows(slice(k, k + 1)), sample.steps)[-1])
    seconds["invert"] = time.perf_counter() - started
    pair = LoraBank.stack([bank.lora(0) for bank in banks], backbone.network, ["0", "1"], mean.device)

    def one_pass(alphas: Sequence[float]) -> tuple[Tensor, list[float]]:
        ends: list[Stored] = []
        frames = {}
        for alpha in (0.0, 1.0, *alphas[1:-1]):
            latents, stored = _sample_one(backbone, pair, torch.cat(noises), conditioning, alpha, sample, ends)
            if alpha in (0.0, 1.0):
                ends.append(stored)
            with torch.no_grad():
                frames[alpha] = backbone.decode(latents).cpu()
        pixels = to_bytes(torch.cat([frames[alpha] for alpha in alphas])).float() / 127.5 - 1  # as a film shows them
        return pixels, perceptual_distance(str(backbone.device)).consecutive(pixels).tolist()

    alphas = uniform_positions(num_frames, 2)
    started = time.perf_counter()
    _, distances = one_pass(alphas)
    seconds["schedule"] = time.perf_counter() - started
    started = time.perf_counter()
    alphas = even_positions(alphas, distances, num_frames, 2)
    pixels, _ = one_pass(alphas)
    seconds["sample"] = time.perf_counter() - started
    return to_pil(pixels), alphas, seconds


@torch.no_grad()
def _sample_one(
    backbone: Any,
    pair: LoraBank,
    noises: Tensor,
    conditioning: Conditioning,
    alpha: float,
    sample: SampleConfig,
    ends: Sequence[Stored],
) -> tuple[Tensor, Stored]:
    """One frame's clean latents (1, C, h, w), and what its attention layers were given in the replaced steps."""
    at = Between.images([alpha], 2)
    schedule = backbone.schedule(sample.steps)
    stored: Stored = []
    z = noise_between(noises, at, sample.adain)
    c = conditioning.lerp(at.left, at.right, at.alpha)
    with backbone.borrowed(), pair.attached(backbone.network):
        pair.set_rows(at.weights(2), sample.lora_blend)
        for i in range(len(schedule)):
            level = len(schedule) - i
            replaced = schedule.replaces(sample.attention_lambda, level)
            source = [ends[0][i], ends[1][i]] if len(ends) == 2 and replaced else None
            with _attention(backbone.network, source, alpha) as seen:
                prediction = backbone.predict(z, schedule.levels[level], c)
            if len(ends) < 2 and replaced:
                stored.append(seen)
            z = schedule.down(prediction, level)
    return z, stored


@contextmanager
def _attention(unet: torch.nn.Module, source: list[list[Tensor]] | None, alpha: float) -> Iterator[list[Tensor]]:
    """Record the inputs of the up blocks' self-attention; with a source, take keys and values from it."""
    seen: list[Tensor] = []
    handles: list[Any] = []
    layers = [m for n, m in unet.named_modules() if n.startswith("up_blocks.") and n.endswith(".attn1")]
    for index, layer in enumerate(layers):
        if source is None:
            handles.append(layer.register_forward_pre_hook(lambda module, args: seen.append(args[0])))
            continue

        def replace(module: Any, args: tuple[Any, ...], i: int = index) -> tuple[Any, ...]:
            return ((1 - alpha) * source[0][i] + alpha * source[1][i], *args[1:])

        handles += [projection.register_forward_pre_hook(replace) for projection in (layer.to_k, layer.to_v)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
