"""What the method asks of a diffusion model: pictures and prompts in, noise predictions, pictures out.

The method sees a model through `Backbone.predict_noise` and its noise schedule as pairs `(a_t, s_t)` with
`z_t = a_t x_0 + s_t eps`; whether the network itself predicts noise or velocity stays in here.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from .errors import ModelError

#: Smallest abar that is divided by: a schedule rescaled to zero terminal SNR reaches 0 (the value diffusers uses too).
_MIN_ABAR = 2.0**-24


@dataclass(frozen=True)
class NoiseSchedule:
    """T timesteps and the T + 1 noise levels they move between.

    Level 0 is the clean end (`final_alpha_cumprod`), level i + 1 that of `timesteps[i]`. The prediction at `timesteps[i]`
    moves a latent from level i to i + 1 (inversion) or from i + 1 to i (sampling): the same solver both ways.
    """

    timesteps: tuple[int, ...]  # T, ascending
    a: Tensor  # (T + 1,) float64, sqrt(abar)
    s: Tensor  # (T + 1,) float64, sqrt(1 - abar)

    def __len__(self) -> int:
        return len(self.timesteps)

    def move(self, z: Tensor, eps: Tensor, level: int, to: int) -> Tensor:
        """DDIM with eta 0: `x_0 = (z - s e) / a`, then `a' x_0 + s' e` (method, sections 4 and 7)."""
        a, s, a_to, s_to = (float(x) for x in (self.a[level], self.s[level], self.a[to], self.s[to]))
        return a_to * ((z - s * eps) / a) + s_to * eps


class Backbone:
    """A Stable Diffusion 1.x or 2.x pipeline as the method sees it.

    pipe: a diffusers pipeline with `unet`, `vae`, `text_encoder`, `tokenizer` and `scheduler`; it is never changed
    outside a `with` block. Raises `ModelError` if it is of another kind.
    `unet_rows` counts the rows of every U-Net batch so far; a row that is trained on (forward and backward) counts 3.
    """

    def __init__(self, pipe: Any, name: str = "") -> None:
        _check_kind(pipe)
        self.pipe = pipe
        self.name = name or getattr(pipe.config, "_name_or_path", "") or type(pipe).__name__
        self.unet: UNet2DConditionModel = pipe.unet
        self.vae: AutoencoderKL = pipe.vae
        # The sampler is DDIM by name, whatever the checkpoint ships with: inversion needs the same solver.
        self._scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        self.prediction_type: str = self._scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ModelError(
                f"the model {self.name} predicts {self.prediction_type!r}; only epsilon and v_prediction are supported."
            )
        self.unet_rows = 0

    # ---- facts

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def vae_factor(self) -> int:
        """Pixels per latent cell along a side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def size_multiple(self) -> int:
        """Working sizes are multiples of this, so that every level of the U-Net halves evenly."""
        return self.vae_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @property
    def native_size(self) -> tuple[int, int]:
        """The size the model was trained at, (width, height) in pixels."""
        sample = self.unet.config.sample_size
        h, w = (sample, sample) if isinstance(sample, int) else sample
        return w * self.vae_factor, h * self.vae_factor

    def fingerprint(self) -> str:
        """Short hash of the U-Net's shape and some of its weights: tells models apart, whatever they are called."""
        config = {k: v for k, v in self.unet.config.items() if not k.startswith("_")}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for part in (self.unet.conv_in, self.unet.conv_out):
            digest.update(part.weight.detach().to("cpu", torch.bfloat16).float().numpy().tobytes())
        return digest.hexdigest()[:16]

    def schedule(self, steps: int) -> NoiseSchedule:
        """The noise schedule of a run of `steps` DDIM steps."""
        self._scheduler.set_timesteps(steps)
        timesteps = tuple(sorted(int(t) for t in self._scheduler.timesteps))
        abar = torch.cat(
            [
                torch.as_tensor(self._scheduler.final_alpha_cumprod).reshape(1).double(),
                self._scheduler.alphas_cumprod.double()[list(timesteps)],
            ]
        ).clamp_min(_MIN_ABAR)
        return NoiseSchedule(timesteps, abar.sqrt(), (1 - abar).sqrt())

    @property
    def num_train_timesteps(self) -> int:
        return int(self._scheduler.config.num_train_timesteps)

    # ---- pictures and prompts

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and spread of the VAE's posterior as scaled latents (method, section 1).

        pixels: (B, 3, H, W) in [-1, 1]. Returns two (B, C, h, w), float32.
        """
        posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        scale = self.vae.config.scaling_factor
        mean, std = (posterior.mean.float() - shift) * scale, posterior.std.float() * scale
        return (
            mean.contiguous(),
            std.contiguous(),
        )  # not in the VAE's memory format: a saved path must round as a fresh one

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) to pictures (B, 3, H, W), float32, in [-1, 1]."""
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        z = latents / self.vae.config.scaling_factor + shift
        return self.vae.decode(z.to(self.vae.dtype)).sample.float().clamp(-1, 1)

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings padded to the tokenizer's length; a longer prompt is cut, with a warning.   # (B, L, D) float32"""
        limit = self.pipe.tokenizer.model_max_length
        for prompt in prompts:
            length = len(self.pipe.tokenizer(prompt, truncation=False, verbose=False).input_ids)
            if length > limit:
                warnings.warn(
                    f"the prompt {prompt[:40]!r}... has {length} tokens; the model reads the first {limit} of them.",
                    stacklevel=2,
                )
        ids = self.pipe.tokenizer(
            list(prompts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        )
        encoder = self.pipe.text_encoder
        mask = ids.attention_mask.to(encoder.device) if getattr(encoder.config, "use_attention_mask", False) else None
        return encoder(ids.input_ids.to(encoder.device), attention_mask=mask)[0].float()

    # ---- the network

    def predict(self, latents: Tensor, timestep: int | Tensor, conditioning: Tensor) -> Tensor:
        """The network's own output (see `training_target`), float32.                                # (B, C, h, w)

        latents: (B, C, h, w); timestep: one for all or (B,); conditioning: (B, L, D).
        """
        self.unet_rows += len(latents) * (3 if torch.is_grad_enabled() else 1)
        dtype = self.unet.dtype
        return self.unet(latents.to(dtype), timestep, encoder_hidden_states=conditioning.to(dtype)).sample.float()

    def predict_noise(self, latents: Tensor, timestep: int, conditioning: Tensor) -> Tensor:
        """eps(z, t, c), float32.                                                                      # (B, C, h, w)"""
        output = self.predict(latents, timestep, conditioning)
        if self.prediction_type == "epsilon":
            return output
        abar = float(self._scheduler.alphas_cumprod[timestep].clamp_min(_MIN_ABAR))
        return abar**0.5 * output + (1 - abar) ** 0.5 * latents  # v = a eps - s x_0

    def add_noise(self, x_0: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
        """`z_t = a_t x_0 + s_t eps` with one t per row."""
        return self._scheduler.add_noise(x_0, eps, timesteps)

    def training_target(self, x_0: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
        """What `predict` should return for `z_t`: the noise, or the velocity `a_t eps - s_t x_0`."""
        return eps if self.prediction_type == "epsilon" else self._scheduler.get_velocity(x_0, eps, timesteps)

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """While open, all networks are in eval mode and frozen; afterwards each is as it was found."""
        modules = [m for m in (self.unet, self.vae, self.pipe.text_encoder) for m in m.modules()]
        training = [m.training for m in modules]
        parameters = [p for m in (self.unet, self.vae, self.pipe.text_encoder) for p in m.parameters()]
        trainable = [p.requires_grad for p in parameters]
        try:
            for m in modules:
                m.training = False
            for p in parameters:
                p.requires_grad_(False)
            yield
        finally:
            for m, was in zip(modules, training, strict=True):
                m.training = was
            for p, was in zip(parameters, trainable, strict=True):
                p.requires_grad_(was)


def _check_kind(pipe: Any) -> None:
    kind = type(pipe).__name__
    missing = [
        part for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler") if getattr(pipe, part, None) is None
    ]
    if missing or not isinstance(pipe.unet, UNet2DConditionModel):
        raise ModelError(
            f"{kind} is not a Stable Diffusion 1.x or 2.x pipeline (it lacks {', '.join(missing) or 'a UNet2DConditionModel'})."
        )
    if getattr(pipe, "text_encoder_2", None) is not None or pipe.unet.config.addition_embed_type is not None:
        raise ModelError(
            f"{kind} is of the SDXL family, which is not supported yet; use a Stable Diffusion 1.x or 2.x model."
        )
    if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise ModelError(
            f"the U-Net takes {pipe.unet.config.in_channels} channels where the VAE gives {pipe.vae.config.latent_channels}; "
            "inpainting and depth models cannot be used, take the text-to-image model they were made from."
        )
    if any(isinstance(m, nn.Module) and getattr(m, "fused_projections", False) for m in pipe.unet.modules()):
        raise ModelError("the U-Net's projections are fused; call pipe.unfuse_qkv_projections() first.")
