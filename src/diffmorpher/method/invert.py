"""DDIM inversion: from clean latents to the noise that samples back to them (method, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.backbone import Backbone
from ..progress import ProgressCallback


@torch.no_grad()
def invert(
    backbone: Backbone, latents: Tensor, conditioning: Tensor, steps: int, progress: ProgressCallback | None = None
) -> Tensor:
    """The way of all images at once from clean latents to noises; their LoRAs are attached by the caller.

    latents: (K, C, h, w) clean, scaled; conditioning: (K, L, D). Returns (T + 1, K, C, h, w), float32: the latents at each
    level of the schedule, the clean ones first, the noises last.
    """
    schedule = backbone.schedule(steps)
    z = latents.float()
    trajectory = [z]
    for i, t in enumerate(schedule.timesteps):
        z = schedule.move(z, backbone.predict_noise(z, t, conditioning), level=i, to=i + 1)
        trajectory.append(z)
        if progress:
            progress("invert", i + 1, steps)
    return torch.stack(trajectory)
