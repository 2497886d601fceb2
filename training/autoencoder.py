"""Train the autoencoder: `python -m training.autoencoder WORK --minutes 45`.

Loss on crops: L1 + squared error + perceptual + KL, and after `adversarial_from` of the budget a hinge loss from a small
patch discriminator (Isola et al. 2017; Rombach et al. 2022).
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from diffmorpher.method.perceptual import PerceptualDistance
from training import data
from training.loop import Limits, Run, moving_average, set_learning_rate
from training.optim import Muon

CRITIC_RATE = 2e-4


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """What the autoencoder is and how it is trained. Weights multiply the terms of the loss."""

    size: int = 256  # of the pictures, in pixels
    channels: tuple[int, ...] = (24, 48, 96, 128, 160)
    latent_channels: int = 16
    groups: int = 8  # of the group norms
    batch: int = 8
    crop: int = 96
    learning_rate: float = 2e-3
    perceptual: float = 0.5
    perceptual_share: float = 0.5  # of the batch that the perceptual loss looks at: it costs half a step
    squared: float = 2.0
    kl: float = 5e-4
    adversarial: float = 0.02
    adversarial_from: float = 1.0  # of the budget; 1 is never


CONFIGS = {
    "cpu": AutoencoderConfig(),
    "tiny": AutoencoderConfig(128, (16, 16, 16, 16), 8, batch=4, crop=64, adversarial_from=0.5),
    "gpu": AutoencoderConfig(batch=64, crop=256, adversarial_from=0.8),
}


def build(config: AutoencoderConfig) -> AutoencoderKL:
    levels = len(config.channels)
    return AutoencoderKL(
        block_out_channels=config.channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=config.latent_channels,
        layers_per_block=1,
        mid_block_add_attention=False,
        norm_num_groups=config.groups,
        sample_size=config.size,
        scaling_factor=1.0,
    )


def discriminator() -> nn.Module:
    """Scores of overlapping patches, (B, 1, h, w)."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 4, 2, 1), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(32, 64, 4, 2, 1), nn.GroupNorm(8, 64), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(64, 128, 4, 1, 1), nn.GroupNorm(8, 128), nn.LeakyReLU(0.2)),
        nn.Conv2d(128, 1, 4, 1, 1),
    )


def crops(images: Tensor, indices: Tensor, flip: Tensor, size: int, draw: torch.Generator) -> Tensor:
    """Square crops at random places of images uint8 (N, 3, H, W), half of them mirrored where that is allowed.

    Returns float32 in [-1, 1], (B, 3, size, size).
    """
    batch = []
    for i in indices.tolist():
        top, left = torch.randint(0, images.shape[-1] - size + 1, (2,), generator=draw).tolist()
        crop = images[i, :, top : top + size, left : left + size]
        mirrored = flip[i] and torch.rand((), generator=draw) < 0.5
        batch.append(crop.flip(-1) if mirrored else crop)
    return torch.stack(batch).float() / 127.5 - 1


class AutoencoderTraining:
    """The models and optimizers, and one step of each."""

    def __init__(self, config: AutoencoderConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.vae = build(config).to(device)
        self.average = moving_average(self.vae)
        self.critic = discriminator().to(device)
        ends = (self.vae.encoder.conv_in, self.vae.decoder.conv_out)
        self.optimizer = Muon(self.vae, config.learning_rate, 1e-4, ends)
        self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), CRITIC_RATE, betas=(0.5, 0.99), fused=True)
        self.distance = PerceptualDistance().to(device)

    def parts(self) -> dict[str, object]:
        names = ("vae", "average", "critic", "optimizer", "critic_optimizer")
        return {name: getattr(self, name) for name in names}

    def step(self, images: Tensor, adversarial: bool, rate: float) -> dict[str, Tensor]:
        """One step on images (B, 3, h, w); returns the terms of the loss."""
        config = self.config
        images = images.to(self.device)
        set_learning_rate(self.optimizer, rate)
        with torch.autocast(self.device.type, torch.bfloat16):
            posterior = self.vae.encode(images).latent_dist
            made = self.vae.decode(posterior.sample()).sample
        made = made.float()
        terms = {
            "l1": (made - images).abs().mean(),
            "squared": functional.mse_loss(made, images),
            "perceptual": self._perceptual(made, images),
            "kl": posterior.kl().float().mean() / images[0].numel(),
        }
        loss = terms["l1"] + config.squared * terms["squared"] + config.perceptual * terms["perceptual"]
        loss = loss + config.kl * terms["kl"] * images[0].numel() / posterior.mean[0].numel()
        if adversarial:
            terms["adversarial"] = -self.critic(made).mean()
            loss = loss + config.adversarial * terms["adversarial"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        self.optimizer.step()
        self.average.update_parameters(self.vae)
        if adversarial:
            terms["critic"] = self._critic_step(images, made.detach())
        return {name: value.detach() for name, value in terms.items()}

    def _perceptual(self, made: Tensor, images: Tensor) -> Tensor:
        count = max(1, round(len(images) * self.config.perceptual_share))
        return self.distance(made[:count], images[:count]).mean()

    def _critic_step(self, images: Tensor, made: Tensor) -> Tensor:
        loss = functional.relu(1 - self.critic(images)).mean() + functional.relu(1 + self.critic(made)).mean()
        self.critic_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.critic_optimizer.step()
        return loss


@torch.inference_mode()
def reconstruct(vae: AutoencoderKL, images: Tensor, batch: int = 16) -> Tensor:
    """Images in [-1, 1], (N, 3, H, W), through the posterior's mean and back."""
    device = next(vae.parameters()).device
    made = [vae.decode(vae.encode(part.to(device)).latent_dist.mean).sample.cpu() for part in images.split(batch)]
    return torch.cat(made).clamp(-1, 1)


def fold_latent_statistics(vae: AutoencoderKL, images: Tensor) -> None:
    """Make the latents of the training pictures zero-mean, unit-spread per channel, inside the model.

    quant_conv and post_quant_conv are 1 x 1 convolutions, so that a shift and a scale of the latents goes into them and
    `scaling_factor` stays 1.
    """
    with torch.inference_mode():
        device = next(vae.parameters()).device
        latents = torch.cat([vae.encode(part.to(device)).latent_dist.mean for part in images.split(32)])
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    with torch.no_grad():
        out, back, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
        # The posterior's logarithm of the variance moves by -2 log std.
        back.bias += back.weight[:, :, 0, 0] @ mean
        back.weight *= std[None, :, None, None]
        out.weight[:channels] /= std[:, None, None, None]
        out.bias[:channels] = (out.bias[:channels] - mean) / std
        out.bias[channels:] -= 2 * std.log()


def psnr(made: Tensor, images: Tensor) -> Tensor:
    """Decibels, (N,), of images in [-1, 1]."""
    return 10 * torch.log10(4 / (made - images).square().mean((1, 2, 3)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--preset", choices=CONFIGS, default="cpu")
    parser.add_argument("--start", type=Path, help="a folder with an autoencoder of these sizes to start from")
    Limits.add_arguments(parser, minutes=45)
    args = parser.parse_args()

    config = CONFIGS[args.preset]
    torch.manual_seed(args.seed)
    training, held_out = data.split(data.read_pictures(args.work))
    images = torch.from_numpy(data.read_images(args.work, training, config.size))
    flip = torch.tensor([picture.flip for picture in training])
    weights = torch.tensor([picture.weight for picture in training])
    few = held_out[:: max(1, len(held_out) // 64)]
    check = torch.from_numpy(data.read_images(args.work, few, config.size)).float() / 127.5 - 1

    part = AutoencoderTraining(config, torch.device(args.device))
    if args.start:
        start = AutoencoderKL.from_pretrained(args.start).state_dict()
        part.vae.load_state_dict(start)
        part.average.module.load_state_dict(start)
    run = Run(args.work / "autoencoder", part.parts(), Limits.of(args))
    draw = torch.Generator().manual_seed(args.seed + run.step)
    for step in run.steps(log_every=100):
        chosen = torch.multinomial(weights, config.batch, generator=draw)
        batch = crops(images, chosen, flip, config.crop, draw)
        adversarial = run.fraction >= config.adversarial_from
        run.record(**part.step(batch, adversarial, run.learning_rate(config.learning_rate)))
        if step % 1000 == 999:
            made = reconstruct(part.average.module, check)
            run.record(psnr=psnr(made, check).mean(), distance=part.distance(made.to(part.device), check).mean())
    if run.finished:
        vae = part.average.module.float()
        fold_latent_statistics(vae, torch.from_numpy(np.ascontiguousarray(images[::4])).float() / 127.5 - 1)
        vae.eval().save_pretrained(args.work / "vae")
        print(f"Wrote {args.work / 'vae'}")


if __name__ == "__main__":
    main()
