"""What a model is prepared from: pictures and prompts encoded, and a bank of LoRAs, fitted or given."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .arguments import lora_list, read_loras
from .config import FitConfig
from .files.cache import Kept
from .method.fit import fit_loras
from .method.lora import LoraBank
from .models.backbone import Backbone
from .models.conditioning import Conditioning
from .models.finite import check_finite
from .models.memory import explained, in_parts
from .path import to_pixels
from .progress import ProgressCallback


def encode(
    backbone: Backbone, pictures: Sequence[Image.Image], prompts: Sequence[str]
) -> tuple[Tensor, Tensor, Conditioning]:
    """Mean and spread of the pictures' latents, (K, C, h, w) each, and what the network is told of the prompts."""
    with torch.no_grad(), backbone.borrowed():
        mean, std = _encode_pictures(backbone, to_pixels(pictures))
        with explained(backbone, "encode the prompts", (mean.shape[-2], mean.shape[-1])):
            conditioning = backbone.encode_prompts(prompts)
    for name, x in conditioning.tensors.items():
        check_finite(x, f"the prompts' {name}", "encode", backbone.parts, "the text encoder overflowed")
    return mean, std, conditioning


def _encode_pictures(backbone: Backbone, pixels: Tensor) -> tuple[Tensor, Tensor]:
    def encode(at_once: int) -> tuple[Tensor, Tensor]:
        mean, std = zip(*map(backbone.encode, pixels.split(at_once)), strict=True)
        return torch.cat(mean), torch.cat(std)

    height, width = (side // backbone.vae_factor for side in pixels.shape[-2:])
    return in_parts(backbone, "encode", "picture", (height, width), len(pixels), encode)


def fitted(
    backbone: Backbone,
    mean: Tensor,
    std: Tensor,
    conditioning: Conditioning,
    config: FitConfig,
    seed: int,
    progress: ProgressCallback | None,
    prompts: Sequence[str],
    hashes: Sequence[str],
    kept: Kept,
) -> LoraBank:
    """One LoRA for each picture, which knows what it was fitted to."""
    bank = fit_loras(backbone, mean, std, conditioning, config, seed, progress, kept)
    for metadata, prompt, digest in zip(bank.metadata, prompts, hashes, strict=True):
        metadata |= {"prompt": prompt, "model": backbone.name, "image_hash": digest}
    return bank


def given_bank(backbone: Backbone, loras: Any, hashes: Sequence[str]) -> tuple[LoraBank, list[str]]:
    """LoRAs made before, one for all pictures or one each, and their names; with a warning for each of another picture.

    hashes: of the pictures. Raises `ConfigError`, `LoraError`.
    """
    lora_list(loras, len(hashes))  # refuses another number
    read, names = read_loras(lora_list(loras, None))
    if len(read) == 1:  # which belongs to no picture
        read, names = read * len(hashes), names * len(hashes)
    else:
        for lora, name, digest in zip(read, names, hashes, strict=True):
            if lora.metadata.get("image_hash", digest) != digest:
                warnings.warn(f"{name} was fitted to another picture, or at another size.", stacklevel=4)
    return LoraBank.stack(read, backbone.network, names, backbone.device, backbone.family), names
