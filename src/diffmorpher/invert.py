"""DDIM inversion: from clean latents to the noise that samples back to them (method, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from .backbone import Backbone
from .config import ProgressCallback


@torch.no_grad()
def invert(
    backbone: Backbone, latents: Tensor, conditioning: Tensor, steps: int, progress: ProgressCallback | None = None
) -> Tensor:
    """Noises of all images at once; their LoRAs are attached by the caller.

    latents: (K, C, h, w) clean, scaled; conditioning: (K, L, D). Returns (K, C, h, w), float32.
    """
    schedule = backbone.schedule(steps)
    z = latents.float()
    for i, t in enumerate(schedule.timesteps):
        z = schedule.move(z, backbone.predict_noise(z, t, conditioning), level=i, to=i + 1)
        if progress:
            progress("invert", i + 1, steps)
    return z
