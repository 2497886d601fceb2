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
    with torch.inference_mode(False), torch.enable_grad(), backbone.borrowed():
        mean, std, conditioning = mean.clone(), std.clone(), conditioning.clone()
        bank = LoraBank.create(attention_projections(backbone.unet), len(mean), config.rank, seed, device)
        parameters = [p.requires_grad_() for p in bank.parameters()]
        # In float16 small gradients would vanish. AdamW does not see a scale that its eps shares.
        scale = 1024.0 if backbone.unet.dtype == torch.float16 else 1.0
        optimizer = torch.optim.AdamW(
            parameters,
            lr=config.learning_rate,
            betas=(0.9, 0.999),
            eps=1e-8 * scale,
            weight_decay=config.weight_decay,
            fused=True,
        )
        with bank.attached(backbone.unet):
            for step in range(config.steps):
                t = int(torch.randint(backbone.num_train_timesteps, (1,), generator=generator))
                eps, draw = torch.randn(2, 1, *mean.shape[1:], generator=generator).to(device).expand(-1, *mean.shape)
                x_0 = mean + std * draw
                output = backbone.predict(backbone.add_noise(x_0, eps, t), t, conditioning)
                target = backbone.training_target(x_0, eps, t)
                # Mean over each image, summed over images: every LoRA gets the gradient it would get alone.
                loss = (output - target).square().flatten(1).mean(1).sum()
                optimizer.zero_grad()
                (loss * scale).backward()
                optimizer.step()
                if progress:
                    progress("fit", step + 1, config.steps)
        for p in parameters:
            p.requires_grad_(False)
            p.grad = None
    return bank
