"""Frames anywhere between the images, in batches that carry the end images they need (method, sections 3 and 5 to 7)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..config import SampleConfig
from ..files.cache import NOT_KEPT, Kept
from ..models.backbone import Backbone
from ..models.conditioning import Conditioning
from ..progress import ProgressCallback
from .denoise import denoise
from .interpolate import Between, noise_between
from .lora import LoraBank


@torch.no_grad()
def sample_between(
    backbone: Backbone,
    bank: LoraBank | None,
    trajectory: Tensor,
    conditioning: Conditioning,
    where: Between,
    config: SampleConfig,
    size: int,
    loop: bool = False,
    progress: ProgressCallback | None = None,
    kept: Kept = NOT_KEPT,
) -> Tensor:
    """The clean latents of the frames that lie at `where` between K images: (n, C, h, w) float32, in the order of `where`.

    bank: the images' LoRAs, attached by the caller; None for none. trajectory: (T + 1, K, C, h, w), the inversion's latents,
    the noises last; conditioning: K rows. size: frames in a batch, end images not counted; frames do not depend on it.
    kept: a cache, where each batch is looked for first and goes to.
    """
    noises, num_images = trajectory[-1], trajectory.shape[1]
    parts = batches(where, size)
    done, total = 0, len(parts) * config.steps

    def on_step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress("sample", done, total)

    result = noises.new_empty(len(where.alpha), *noises.shape[1:])
    guided = config.guidance_scale != 1 and not backbone.embeds_guidance
    unconditional = backbone.unconditional(conditioning.length) if guided else None

    def denoised(batch: Batch) -> Tensor:
        at = Between.images(batch.positions, num_images, loop)
        if bank:
            fixed = [config.fix_lora] * len(batch.positions) if config.fix_lora is not None else batch.positions
            weights = Between.images(fixed, num_images, loop).weights(num_images)
            bank.set_rows(weights.repeat(2, 1) if guided else weights, config.lora_blend)
        return denoise(
            backbone,
            noise_between(noises, at, config.adain),
            conditioning.lerp(at.left, at.right, at.alpha),
            batch.rows,
            config,
            unconditional,
            trajectory[:, batch.images] if config.exact_ends else None,
            on_step,
        )

    about = kept.also(trajectory, conditioning.tensors, loop, asdict(replace(config, batch_size="auto")))
    for i, batch in enumerate(parts, start=1):
        latents = about.tensor(partial(denoised, batch), noises, batch.positions)
        done = i * config.steps  # also where nothing had to be made
        result[batch.frames] = latents[batch.batch_rows]
    return result


@dataclass(frozen=True)
class Batch:
    """End images first, then frames between them. Row `batch_rows[i]` of the batch is frame `frames[i]` of all asked for."""

    positions: list[float]  # of every row
    images: list[int]  # of the first rows
    rows: Between  # each row's ends, as rows of this batch
    frames: list[int]
    batch_rows: list[int]


def batches(where: Between, size: int) -> list[Batch]:
    """Split frames into batches of at most `size` frames, each with the end images they lie between.

    A frame exactly at an image is that image's end row, not a row more: it goes with the first batch that has it.
    """
    left, right, alpha = where.left.tolist(), where.right.tolist(), where.alpha.tolist()
    at_image = {i: left[i] if a == 0 else right[i] for i, a in enumerate(alpha) if a in (0, 1)}
    between = sorted((i for i in range(len(alpha)) if i not in at_image), key=lambda i: left[i] + alpha[i])
    count = -(-len(between) // size)
    groups = [between[len(between) * c // count : len(between) * (c + 1) // count] for c in range(count)]
    needed = [{image for i in group for image in (left[i], right[i])} for group in groups]
    alone = sorted(set(at_image.values()).difference(*needed))  # images asked for with no frame next to them
    for start in range(0, len(alone), size):
        groups.append([])
        needed.append(set(alone[start : start + size]))
    parts = []
    for group, images in zip(groups, needed, strict=True):
        ends = sorted(images)
        row_of = {image: row for row, image in enumerate(ends)}
        own = list(range(len(ends)))
        here = [i for i, image in at_image.items() if image in images]
        parts.append(
            Batch(
                positions=[*map(float, ends), *(left[i] + alpha[i] for i in group)],
                images=ends,
                rows=Between(
                    torch.tensor([*own, *(row_of[left[i]] for i in group)]),
                    torch.tensor([*own, *(row_of[right[i]] for i in group)]),
                    torch.tensor([*[0.0] * len(ends), *(alpha[i] for i in group)], dtype=torch.float64),
                ),
                frames=[*here, *group],
                batch_rows=[*(row_of[at_image.pop(i)] for i in here), *range(len(ends), len(ends) + len(group))],
            )
        )
    return parts
