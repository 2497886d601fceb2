"""Denoising a batch of frames together with the end images whose features they use (method, section 7)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from ..config import SampleConfig
from ..models.backbone import Backbone
from .attention import interpolated_attention, replaced_steps
from .interpolate import Between, lerp


@torch.no_grad()
def denoise(
    backbone: Backbone,
    noises: Tensor,
    conditioning: Tensor,
    rows: Between,
    config: SampleConfig,
    unconditional: Tensor | None = None,
    trajectory: Tensor | None = None,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """DDIM from noise to clean latents, self-attention interpolated in the first steps.

    noises: (B, C, h, w), the end images' rows among them; conditioning: (B, L, D);
    rows: for each row of this batch which two of its rows are its ends, and its alpha;
    unconditional: (1, L, D), the empty prompt's embedding, needed where `config.guidance_scale` is above 1;
    trajectory: (T + 1, E, C, h, w), the inversion's latents of the first E rows, the end images, needed where
    `config.exact_ends` is set: each step puts the end rows back on it, and the rows between them by the same, interpolated.
    Returns (B, C, h, w), float32. The LoRAs are attached, with their rows set, by the caller.
    """
    schedule = backbone.schedule(config.steps)
    replaced = replaced_steps(config.attention_lambda, config.steps)
    z, batch = noises.float(), len(noises)
    between = rows = rows.on(z.device)
    guided = config.guidance_scale != 1
    if guided:
        assert unconditional is not None
        conditioning = torch.cat([unconditional.expand(batch, -1, -1), conditioning])
        # The unconditional half has its own end rows.
        rows = Between(
            torch.cat([rows.left, rows.left + batch]), torch.cat([rows.right, rows.right + batch]), rows.alpha.repeat(2)
        )
    for i in range(len(schedule)):
        level = len(schedule) - i
        attention = (
            interpolated_attention(backbone.network, rows, config.attention_mode) if i < replaced else nullcontext()
        )
        with attention:
            eps = backbone.predict_noise(
                z.repeat(2, 1, 1, 1) if guided else z, schedule.timesteps[level - 1], conditioning
            )
        if guided:
            free, conditional = eps.chunk(2)
            eps = free + config.guidance_scale * (conditional - free)
        z = schedule.move(z, eps, level=level, to=level - 1)
        if config.exact_ends:
            assert trajectory is not None
            missing = trajectory[level - 1] - z[: trajectory.shape[1]]
            z = z + lerp(missing[between.left], missing[between.right], between.alpha)
        if on_step:
            on_step()
    return z
