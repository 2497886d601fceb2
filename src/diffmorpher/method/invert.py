"""Inversion: from clean latents to the noise that samples back to them (method, section 4)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..models.backbone import Backbone
from ..models.conditioning import Conditioning
from ..models.finite import check_finite
from ..progress import ProgressCallback


@torch.no_grad()
def invert(
    backbone: Backbone,
    latents: Tensor,
    conditioning: Conditioning,
    steps: int,
    progress: ProgressCallback | None = None,
    rule: Literal["plain", "uni"] | None = None,
) -> Tensor:
    """The way of all images at once from clean latents to noises; their LoRAs are attached by the caller.

    latents: (K, C, h, w) clean, scaled; conditioning: K rows.
    rule: at which latents the network is asked about the level that a step goes to. "plain": those of the level below (DDIM
    inversion). "uni": those that the last step's prediction leads to (Uni-Inv, arXiv 2504.13109), which is nearer to the
    sampler's inverse at as many evaluations. None is the family's own.
    Returns (T + 1, K, C, h, w), float32: the latents at each level of the schedule, the clean ones first, the noises last.
    """
    rule = rule or backbone.inversion
    schedule = backbone.schedule(steps)
    z = latents.float()
    trajectory, prediction = [z], None
    for i in range(1, len(schedule) + 1):
        ahead = schedule.up(z, prediction, i) if rule == "uni" and prediction else z
        prediction = backbone.predict(ahead, schedule.levels[i], conditioning)
        z = schedule.up(z, prediction, i)
        where = f"invert, step {i} of {len(schedule)}"
        check_finite(z, "the latents", where, [backbone.network], "a LoRA is too strong; lower the LoRA rate")
        trajectory.append(z)
        if progress:
            progress("invert", i, steps)
    return torch.stack(trajectory)
