"""Fitting one LoRA per image, all images in one batch (method, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from .backbone import Backbone
from .config import FitConfig, ProgressCallback
from .lora import LoraBank, attention_projections


def fit_loras(
    backbone: Backbone,
    mean: Tensor,
    std: Tensor,
    conditioning: Tensor,
    config: FitConfig,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> LoraBank:
    """Train a bank on K images together: row k of each batch trains LoRA k alone.

    mean, std: (K, C, h, w), the scaled VAE posterior of each image; conditioning: (K, L, D).
    Each step draws one timestep, one noise and one posterior sample, shared by all rows: so an image's LoRA does not
    depend on which other images it is fitted with, and the same one comes from `diffmorpher fit`.
    """
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draws on every device
    device = mean.device
    with torch.enable_grad(), backbone.borrowed():
        bank = LoraBank.create(attention_projections(backbone.unet), len(mean), config.rank, seed, device)
        parameters = [p.requires_grad_() for p in bank.parameters()]
        optimizer = torch.optim.AdamW(
            parameters, lr=config.learning_rate, betas=(0.9, 0.999), weight_decay=config.weight_decay, fused=True
        )
        with bank.attached(backbone.unet):
            for step in range(config.steps):
                t = torch.randint(backbone.num_train_timesteps, (1,), generator=generator).expand(len(mean)).to(device)
                eps, draw = (
                    torch.randn(2, 1, *mean.shape[1:], generator=generator).to(device).expand(-1, *mean.shape).unbind(0)
                )
                x_0 = mean + std * draw
                output = backbone.predict(backbone.add_noise(x_0, eps, t), t, conditioning)
                target = backbone.training_target(x_0, eps, t)
                # Mean over each image, summed over images: every LoRA gets the gradient it would get alone.
                loss = (output - target).square().flatten(1).mean(1).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if progress:
                    progress("fit", step + 1, config.steps)
        for p in parameters:
            p.requires_grad_(False)
            p.grad = None
    return bank
