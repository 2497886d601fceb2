"""Fitting one LoRA per image, all images in one batch (method, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import FitConfig
from ..models.backbone import Backbone
from ..models.conditioning import Conditioning
from ..progress import ProgressCallback
from .lora import LoraBank


def fit_loras(
    backbone: Backbone,
    mean: Tensor,
    std: Tensor,
    conditioning: Conditioning,
    config: FitConfig,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> LoraBank:
    """Train a bank on K images together: LoRA k learns from image k's rows of each batch alone.

    mean, std: (K, C, h, w), the scaled VAE posterior of each image; conditioning: K rows.
    Each step makes `config.draws` draws of a timestep, a noise and a posterior sample, the same for every image: so an
    image's LoRA does not depend on which other images it is fitted with, and the same one comes from `diffmorpher fit`. In
    low memory the images therefore take turns, each fitted to its end.
    """
    images = len(mean)
    if backbone.low_memory and images > 1:
        return _fit_in_turn(backbone, mean, std, conditioning, config, seed, progress)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draws on every device
    device = mean.device
    with backbone.trained():
        # Inference tensors cannot be trained on, their copies can. Rows: image 0's draws, then image 1's, ...
        mean, std = (x.repeat_interleave(config.draws, 0) for x in (mean, std))
        conditioning = conditioning.repeat(config.draws)
        bank = LoraBank.create(backbone.projections(), images, config.rank, seed, device)
        parameters = [p.requires_grad_() for p in bank.parameters()]
        # In float16 small gradients would vanish. AdamW does not see a scale that its eps shares.
        scale = 1024.0 if backbone.network.dtype == torch.float16 else 1.0
        optimizer = torch.optim.AdamW(
            parameters,
            lr=config.learning_rate,
            betas=(0.9, 0.999),
            eps=1e-8 * scale,
            weight_decay=config.weight_decay,
            fused=True,
        )
        with bank.attached(backbone.network):
            for step in range(config.steps):
                for group in optimizer.param_groups:
                    group["lr"] = config.rate(step)
                t = _timesteps(backbone.num_train_timesteps, config.draws, generator).to(device).repeat(images)
                noise = torch.randn(2, config.draws, *mean.shape[1:], generator=generator).to(device)
                eps, draw = noise.repeat(1, images, 1, 1, 1)
                x_0 = mean + std * draw
                output = backbone.output(backbone.noised(x_0, eps, t), backbone.level(t), conditioning)
                target = backbone.training_target(x_0, eps, t)
                # Mean over each image's draws, summed over images: every LoRA gets the gradient it would get alone.
                loss = (output - target).square().unflatten(0, (images, -1)).flatten(1).mean(1).sum()
                optimizer.zero_grad()
                (loss * scale).backward()
                optimizer.step()
                if progress:
                    progress("fit", step + 1, config.steps)
        for p in parameters:
            p.requires_grad_(False)
            p.grad = None
    return bank


def _fit_in_turn(
    backbone: Backbone,
    mean: Tensor,
    std: Tensor,
    conditioning: Conditioning,
    config: FitConfig,
    seed: int,
    progress: ProgressCallback | None,
) -> LoraBank:
    images = len(mean)
    loras = []
    for k in range(images):

        def report(stage: str, done: int, total: int, k: int = k) -> None:
            if progress:
                progress(stage, k * total + done, images * total)

        one = slice(k, k + 1)
        loras.append(fit_loras(backbone, mean[one], std[one], conditioning.rows(one), config, seed, report).lora(0))
    return LoraBank.stack(loras, backbone.network, [f"LoRA {k}" for k in range(images)], mean.device)


def _timesteps(count: int, draws: int, generator: torch.Generator) -> Tensor:
    """Timesteps of one step's draws, int64: each uniform, and one in each of `draws` equal parts of the whole range."""
    return (torch.randint(count, (draws,), generator=generator) + torch.arange(draws) * count) // draws
