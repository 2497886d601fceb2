"""Train the text encoder and the U-Net together: `python -m training.diffusion WORK --minutes 75`.

v-prediction (Salimans and Ho 2022) with min-SNR weights (Hang et al. 2023) on cached latents of the trained autoencoder,
captions dropped now and then so that guidance works.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerBase

from training import data
from training.loop import Limits, Run, moving_average, set_learning_rate
from training.optim import Muon

MAX_TOKENS = 24
CHECKS = 40  # of the held-out pictures, in a whole run


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """What the text encoder and the U-Net are and how they are trained."""

    channels: tuple[int, ...] = (64, 128, 192)
    layers: int = 1  # of each block
    dropout: float = 0.0  # in the U-Net
    text_width: int = 128
    text_layers: int = 3
    vocabulary: int = 2600
    batch: int = 48
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2  # of the matrices
    ema: float = 0.998
    snr_limit: float = 5.0  # gamma of min-SNR
    caption_dropout: float = 0.1
    variants: int = 4  # of each picture: one as it is, the others shifted, scaled, mirrored
    plain_share: float = 0.25  # how often the one as it is is drawn


CONFIGS = {
    "cpu": DiffusionConfig(),
    "gpu": DiffusionConfig(
        channels=(96, 192, 256),
        dropout=0.1,
        text_width=192,
        text_layers=4,
        batch=256,
        weight_decay=0.1,
        ema=0.9995,
        variants=32,
    ),
    "tiny": DiffusionConfig(channels=(16, 32), text_width=32, text_layers=1, vocabulary=600, batch=4, variants=2),
}


def build_tokenizer(captions: list[str], vocabulary: int) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer, learnt from the captions."""
    blank = CLIPTokenizer(model_max_length=MAX_TOKENS)
    return blank.train_new_from_iterator(captions, vocabulary)


def build_text_encoder(config: DiffusionConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            intermediate_size=3 * config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=config.text_width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(config: DiffusionConfig, latent_channels: int, latent_size: int) -> UNet2DConditionModel:
    levels = len(config.channels)
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=config.channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        layers_per_block=config.layers,
        dropout=config.dropout,
        cross_attention_dim=config.text_width,
        attention_head_dim=tuple(max(1, width // 32) for width in config.channels),  # by diffusers' name: their number
        norm_num_groups=16,
        use_linear_projection=True,
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def varied(images: Tensor, flip: Tensor, draw: torch.Generator) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1], a little smaller or larger, moved, and mirrored where that is allowed."""
    count = len(images)
    size = torch.empty(count).uniform_(0.85, 1.05, generator=draw)
    shift = torch.empty(count, 2).uniform_(-0.06, 0.06, generator=draw)
    mirror = 1 - 2 * ((torch.rand(count, generator=draw) < 0.5) & flip).float()
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = mirror / size, 1 / size, shift
    theta = theta.to(images.device)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images - 1, grid, mode="bicubic", align_corners=False).clamp(-2, 0) + 1  # on white


@torch.inference_mode()
def cache_latents(
    vae: AutoencoderKL, work: Path, pictures: list[data.Picture], variants: int, seed: int, name: str = "latents.pt"
) -> Tensor:
    """Latents float16 (variants, N, C, h, w): the pictures as they are, then varied ones. Kept in WORK/name."""
    file = work / name
    if file.exists():
        return torch.load(file, weights_only=True)
    device = next(vae.parameters()).device
    images = torch.from_numpy(data.read_images(work, pictures, vae.config.sample_size))
    flip = torch.tensor([picture.flip for picture in pictures])
    draw = torch.Generator().manual_seed(seed)
    rounds = []
    for number in range(variants):
        latents = []
        for i in range(0, len(images), 32):
            batch = images[i : i + 32].to(device).float() / 127.5 - 1
            batch = varied(batch, flip[i : i + 32], draw) if number else batch
            with torch.autocast(device.type, torch.bfloat16):
                latents.append(vae.encode(batch).latent_dist.mean.half().cpu())
        rounds.append(torch.cat(latents))
        print(f"latents {number + 1}/{variants}", flush=True)
    stacked = torch.stack(rounds)
    torch.save(stacked, file)
    return stacked


def draw_batch(
    pictures: list[data.Picture],
    latents: Tensor,
    config: Any,
    draw: torch.Generator,
    words: random.Random,
) -> tuple[Tensor, list[str]]:
    """Latents (batch, C, h, w), each picture as often as its weight says, and a caption for each, now and then none.

    config: has `batch`, `plain_share` and `caption_dropout`.
    """
    batch = config.batch
    weights = torch.tensor([picture.weight for picture in pictures])
    chosen = torch.multinomial(weights, batch, replacement=len(pictures) < batch, generator=draw)
    variant = torch.randint(min(1, len(latents) - 1), len(latents), (batch,), generator=draw)
    variant[torch.rand(batch, generator=draw) < config.plain_share] = 0
    captions = [
        "" if words.random() < config.caption_dropout else data.draw_caption(pictures[i], words)
        for i in chosen.tolist()
    ]
    return latents[variant, chosen], captions


def token_ids(tokenizer: PreTrainedTokenizerBase, captions: list[str]) -> Tensor:
    """(B, length), all padded or cut to the tokenizer's own length."""
    return tokenizer(
        captions,
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids


class LatentTraining:
    """Networks that learn from noisy latents and captions: their averages and optimizer, and one step."""

    def __init__(self, model: nn.ModuleDict, config: Any, plain: Iterable[nn.Module], device: torch.device):
        self.model, self.config, self.device = model.to(device), config, device
        self.average = moving_average(self.model, config.ema)
        self.average.eval()
        self.optimizer = Muon(self.model, config.learning_rate, config.weight_decay, plain)
        self.learn = Captured(self._learn) if device.type == "cuda" else self._learn

    def parts(self) -> dict[str, object]:
        return {"model": self.model, "average": self.average, "optimizer": self.optimizer}

    def even_times(self, even: Tensor) -> Tensor:
        """Numbers in [0, 1) as the network's times."""
        raise NotImplementedError

    def times(self, even: Tensor, draw: torch.Generator) -> Tensor:
        """The batch's times, from draws that are spread evenly over [0, 1)."""
        return self.even_times(even)

    def tokens(self, captions: list[str]) -> tuple[Tensor, ...]:
        """The captions as the text encoders take them, (B, length) each."""
        raise NotImplementedError

    def errors(self, model: nn.ModuleDict, latents: Tensor, t: Tensor, noise: Tensor, *tokens: Tensor) -> Tensor:
        """The error of each picture's prediction, (B,)."""
        raise NotImplementedError

    def step(self, latents: Tensor, captions: list[str], rate: float, draw: torch.Generator) -> Tensor:
        """One step on latents (B, C, h, w) and their captions; returns the loss."""
        count = len(latents)
        # Times spread evenly over the batch: the same expectation with less scatter.
        t = self.times((torch.arange(count) + torch.rand(count, generator=draw)) / count, draw)
        noise = torch.randn(latents.shape, generator=draw)
        set_learning_rate(self.optimizer, rate)
        loss = self.learn(*self._on_device(latents.float(), t, noise, *self.tokens(captions)))
        self.average.update_parameters(self.model)
        return loss

    def _learn(self, *batch: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.errors(self.model, *batch).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def check(self, latents: Tensor, captions: list[str], rounds: int = 1) -> Tensor:
        """The averaged weights' error on latents (N, C, h, w), the same even times and noise at every call, (rounds N,)."""
        draw = torch.Generator().manual_seed(0)
        latents, captions = latents.float().repeat(rounds, 1, 1, 1), captions * rounds
        t = self.even_times((torch.randperm(len(latents), generator=draw) + 0.5) / len(latents))
        noise = torch.randn(latents.shape, generator=draw)
        found = []
        for i in range(0, len(latents), 256):
            batch = self._on_device(*(part[i : i + 256] for part in (latents, t, noise, *self.tokens(captions))))
            found.append(self.errors(self.average.module, *batch).cpu())
        return torch.cat(found)

    def _on_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if self.device.type == "cuda":  # pinned, a copy does not wait for the step at work
            return tuple(x.pin_memory().to(self.device, non_blocking=True) for x in tensors)
        return tensors


class Captured:
    """A function of CUDA tensors of always the same shapes, from its fourth call on replayed as one CUDA graph.

    A small network's step is thousands of short kernels, which a processor cannot start as fast as a large GPU ends them.
    The tensor that it returns is overwritten by the next call.
    """

    def __init__(self, function: Callable[..., Tensor], warm_up: int = 3) -> None:
        self.function, self.warm_up = function, warm_up
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self.warm_up:
            self.warm_up -= 1
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                result = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(side)
            return result
        if self.graph is None:
            self.graph, self.inputs = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
            with torch.cuda.graph(self.graph):
                self.result = self.function(*self.inputs)
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.result.clone()


class DiffusionTraining(LatentTraining):
    """Text encoder and U-Net."""

    autocast = True  # to bfloat16

    def __init__(
        self, config: DiffusionConfig, tokenizer: CLIPTokenizer, latent_shape: tuple[int, ...], device: torch.device
    ):
        self.tokenizer = tokenizer
        text = build_text_encoder(config, tokenizer)
        unet = build_unet(config, latent_shape[0], latent_shape[-1])
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True
            unet.to(memory_format=torch.channels_last)
        plain = (unet.conv_in, unet.conv_out, unet.time_embedding, text.embeddings)
        super().__init__(nn.ModuleDict({"text": text, "unet": unet}), config, plain, device)
        self.abar = build_scheduler().alphas_cumprod.to(device)

    def even_times(self, even: Tensor) -> Tensor:
        return (even * len(self.abar)).long()

    def tokens(self, captions: list[str]) -> tuple[Tensor, ...]:
        return (token_ids(self.tokenizer, captions),)

    def errors(self, model: nn.ModuleDict, latents: Tensor, t: Tensor, noise: Tensor, *tokens: Tensor) -> Tensor:
        """The min-SNR-weighted squared error of the predicted velocity of each picture, (B,)."""
        abar = self.abar[t].view(-1, 1, 1, 1)
        noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
        target = abar.sqrt() * noise - (1 - abar).sqrt() * latents
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            embeddings = model["text"](*tokens).last_hidden_state
            predicted = model["unet"](noisy, t, embeddings).sample
        weight = self.weight(self.abar[t] / (1 - self.abar[t]))
        return weight * (predicted.float() - target).square().mean((1, 2, 3))

    def weight(self, snr: Tensor) -> Tensor:
        """min-SNR's weight of the velocity's error (Hang et al. 2023, eq. 12)."""
        return snr.clamp(max=self.config.snr_limit) / (snr + 1)

    def save(self, folder: Path) -> None:
        """The averaged weights, each network in its folder."""
        self.average.module["unet"].save_pretrained(folder / "unet")
        self.average.module["text"].save_pretrained(folder / "text_encoder")


def changed(config: Any, changes: list[str]) -> Any:
    """A configuration with fields changed, each NAME=VALUE, the value as Python writes it."""
    return dataclasses.replace(
        config, **{name: ast.literal_eval(value) for name, value in (c.split("=") for c in changes)}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--preset", choices=CONFIGS, default="cpu")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change the preset")
    Limits.add_arguments(parser, minutes=75)
    args = parser.parse_args()

    config, device = changed(CONFIGS[args.preset], args.set), torch.device(args.device)
    torch.manual_seed(args.seed)
    training, held_out = data.split(data.read_pictures(args.work))
    words = [text for picture in training for text in (*picture.captions, *picture.keywords)]
    tokenizer = build_tokenizer(words, config.vocabulary)
    tokenizer.save_pretrained(args.work / "tokenizer")
    vae = AutoencoderKL.from_pretrained(args.work / "vae").to(device)
    latents = cache_latents(vae, args.work, training, config.variants, args.seed)
    unseen = cache_latents(vae, args.work, held_out, 1, args.seed, "held_out.pt")[0]

    part = DiffusionTraining(config, tokenizer, tuple(latents.shape[2:]), device)
    run = Run(args.work / "diffusion", part.parts(), Limits.of(args))
    best, checked = math.inf, 0.0
    draw = torch.Generator().manual_seed(args.seed + run.step)
    words = random.Random(args.seed + run.step)
    for _ in run.steps(log_every=50):
        batch = draw_batch(training, latents, config, draw, words)
        run.record(loss=part.step(*batch, run.learning_rate(config.learning_rate), draw))
        if run.fraction - checked >= 1 / CHECKS:
            error = part.check(unseen, [picture.name for picture in held_out], rounds=4).mean().item()
            run.record(held_out=error)
            checked = run.fraction
            if error < best and run.fraction > 0.3:  # before that it is better every time
                best = error
                part.save(args.work / "best")
    part.save(args.work)
    print(f"Wrote {args.work / 'unet'} and {args.work / 'text_encoder'}, after {run.step} steps.")


if __name__ == "__main__":
    main()
