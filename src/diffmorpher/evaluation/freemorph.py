"""FreeMorph (Cao, Si, Wang and Liu, ICCV 2025, arXiv 2507.01953), from its paper: no fit, modified self-attention.

Equation numbers are the paper's. What it leaves open is settled so: all self-attention layers of the U-Net are modified; text
embeddings are interpolated linearly; equation 8's mask keeps the frequencies up to `KEPT` of the highest in both
directions; its noise is one draw for all frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..method.attention import check_unet, project, project_out, self_attention
from ..method.interpolate import Between, slerp
from ..models.backbone import Backbone
from ..models.conditioning import Conditioning
from ..path import to_pixels
from ..progress import ProgressCallback

#: lambda_1 to lambda_4: where the attention changes, as shares of the steps.
FORWARD, REVERSE = (0.3, 0.6), (0.2, 0.6)
GUIDANCE = 7.5
KEPT = 0.75


class GuidedAttention:
    """`sum_s w_sb ATT(Q_b, K_r, V_r)` with r = `sources[s, b]`: a diffusers attention processor.

    sources: (S, B), rows of the batch; weights: (S, B), which sum to 1 over s.
    """

    def __init__(self, sources: Tensor, weights: Tensor) -> None:
        self.sources, self.weights = sources, weights

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:  # (B, N, D) -> (B, N, D)
        q, k, v = project(attn, hidden_states)
        mixed = torch.zeros_like(q)
        for rows, w in zip(self.sources, self.weights.to(q), strict=True):
            mixed += w[:, None, None, None] * scaled_dot_product_attention(q, k[rows], v[rows])
        return project_out(attn, mixed)


def towards_ends(alphas: Tensor) -> GuidedAttention:
    """Equation 7, and with every alpha 1/2 equation 5. Rows: left and right image, which keep their own, then the frames."""
    a = torch.cat([torch.tensor([0.0, 1.0]).to(alphas), alphas])
    ends = torch.tensor([[0], [1]], device=a.device).expand(2, len(a))
    return GuidedAttention(ends, torch.stack([1 - a, a]))


def towards_all(frames: int, device: torch.device) -> GuidedAttention:
    """Equation 6: every frame attends to each of the frames, equally. The two images keep their own."""
    ends = torch.tensor([[0, 1]], device=device).expand(frames, 2)
    others = torch.arange(2, frames + 2, device=device)[:, None].expand(frames, frames)
    return GuidedAttention(torch.cat([ends, others], 1), torch.full((frames, frames + 2), 1 / frames, device=device))


def doubled(attention: GuidedAttention) -> GuidedAttention:
    """The same for a batch whose second half is the first under another text."""
    sources, weights = attention.sources, attention.weights
    return GuidedAttention(torch.cat([sources, sources + sources.shape[1]], 1), weights.repeat(1, 2))


def inject_noise(z: Tensor, seed: int, kept: float = KEPT) -> Tensor:
    """Equation 8: the highest frequencies of every frame's latent become those of one draw of noise.   # (J, C, h, w)"""
    noise = torch.randn(z.shape[1:], generator=torch.Generator().manual_seed(seed)).to(z)
    fy, fx = (torch.fft.fftfreq(side, device=z.device).abs() * 2 for side in z.shape[2:])  # 1 is the highest
    low = (fy[:, None] <= kept) & (fx[None] <= kept)
    return torch.fft.ifft2(torch.where(low, torch.fft.fft2(z), torch.fft.fft2(noise))).real


@torch.no_grad()
def freemorph(
    backbone: Backbone,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    count: int,
    seed: int,
    steps: int,
    guidance: float = GUIDANCE,
    progress: ProgressCallback | None = None,
) -> tuple[Tensor, list[float]]:
    """Algorithm 1: `count` frames, the first and the last being the two images themselves.

    images: two, at the model's working size. guidance: classifier-free, of the way back; 1 is off.
    Returns (count, 3, H, W) float32 in [-1, 1], and the alphas.
    """
    check_unet(backbone, "FreeMorph", "leave this method out")
    frames, pixels = count - 2, to_pixels(images)
    where = Between.images([0.0, 1.0, *((j + 1) / (count - 1) for j in range(frames))], 2)
    with backbone.borrowed():
        ends, _ = backbone.encode(pixels)
        text = backbone.encode_prompts([*prompts, ""])  # together: of one length
        rows = where.on(ends.device)
        z = slerp(ends[rows.left], ends[rows.right], where.alpha)  # equation 4; rows: left, right, frames
        c, free = text.lerp(rows.left, rows.right, rows.alpha), text.rows(slice(2, None)).expand(count)
        trend, average = towards_ends(rows.alpha[2:]), towards_all(frames, ends.device)
        aggregation = towards_ends(torch.full_like(rows.alpha[2:], 0.5))
        schedule = backbone.schedule(steps)
        for i, attention in enumerate(_windows(backbone, steps, FORWARD, (None, average, trend))):
            with attention:
                prediction = backbone.predict(z, schedule.levels[i + 1], c)
            z = schedule.up(z, prediction, i + 1)
            _report(progress, "invert", i + 1, steps)
        z = torch.cat([z[:2], inject_noise(z[2:], seed)])
        back: list[GuidedAttention | None] = [trend, aggregation, None]
        if guidance != 1:
            back = [attention and doubled(attention) for attention in back]
        for i, attention in enumerate(_windows(backbone, steps, REVERSE, back)):
            level = steps - i
            with attention:
                if guidance == 1:
                    prediction = backbone.predict(z, schedule.levels[level], c)
                else:
                    both = backbone.predict(z.repeat(2, 1, 1, 1), schedule.levels[level], Conditioning.cat([free, c]))
                    prediction = both.guided(guidance)
            z = schedule.down(prediction, level)
            _report(progress, "sample", i + 1, steps)
        decoded = [backbone.decode(frame[None]).cpu() for frame in z[2:]]
    return torch.cat([pixels[:1], *decoded, pixels[1:]]), [0.0, *where.alpha[2:].tolist(), 1.0]


def _windows(
    backbone: Backbone, steps: int, limits: tuple[float, float], attentions: Sequence[GuidedAttention | None]
) -> Iterator[AbstractContextManager[None]]:
    """Each step's attention: one up to the first limit, one up to the second, one after them; None is the model's own."""
    for i in range(steps):
        attention = attentions[sum(i >= round(limit * steps, 9) for limit in limits)]
        yield self_attention(backbone.network, attention) if attention else nullcontext()


def _report(progress: ProgressCallback | None, stage: str, done: int, total: int) -> None:
    if progress:
        progress(stage, done, total)
