"""Denoising a batch of frames together with the end images whose features they use (method, section 7)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from ..config import SampleConfig
from ..models.backbone import Backbone
from ..models.conditioning import Conditioning
from ..models.finite import check_finite
from .attention import interpolated_attention
from .interpolate import Between, lerp


@torch.no_grad()
def denoise(
    backbone: Backbone,
    noises: Tensor,
    conditioning: Conditioning,
    rows: Between,
    config: SampleConfig,
    unconditional: Conditioning | None = None,
    trajectory: Tensor | None = None,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """From noise to clean latents, self-attention interpolated in the first steps.

    noises: (B, C, h, w), the end images' rows among them; conditioning: B rows;
    rows: for each row of this batch which two of its rows are its ends, and its alpha;
    unconditional: the empty prompt's conditioning, one row, for classifier-free guidance by `config.guidance_scale`;
    trajectory: (T + 1, E, C, h, w), the inversion's latents of the first E rows, the end images, needed where
    `config.exact_ends` is set: each step puts the end rows back on it, and the rows between them by the same, interpolated.
    Returns (B, C, h, w), float32. The LoRAs are attached, with their rows set, by the caller.
    """
    schedule = backbone.schedule(config.steps)
    z, batch = noises.float(), len(noises)
    between = rows = rows.on(z.device)
    if unconditional:
        conditioning = Conditioning.cat([unconditional.expand(batch), conditioning])
        # The unconditional half has its own end rows.
        rows = Between(
            torch.cat([rows.left, rows.left + batch]), torch.cat([rows.right, rows.right + batch]), rows.alpha.repeat(2)
        )
    most_likely = (
        "guidance is too strong" if config.guidance_scale > 20 else "a LoRA is too strong; lower the LoRA rate"
    )
    told = config.guidance_scale if backbone.embeds_guidance else 1.0
    for level in range(len(schedule), 0, -1):
        replaced = schedule.replaces(config.attention_lambda, level)
        attention = (
            interpolated_attention(backbone, rows, config.attention_mode, backbone.image_rows(z))
            if replaced
            else nullcontext()
        )
        with attention:
            prediction = backbone.predict(
                z.repeat(2, 1, 1, 1) if unconditional else z, schedule.levels[level], conditioning, told
            )
        if unconditional:
            prediction = backbone.guided(prediction, schedule.levels[level], config.guidance_scale)
        z = schedule.down(prediction, level)
        if config.exact_ends:
            assert trajectory is not None
            missing = trajectory[level - 1] - z[: trajectory.shape[1]]
            z = z + lerp(missing[between.left], missing[between.right], between.alpha)
        where = f"sample, step {len(schedule) - level + 1} of {len(schedule)}"
        check_finite(z, "the latents", where, [backbone.network], most_likely)
        if on_step:
            on_step()
    return z
