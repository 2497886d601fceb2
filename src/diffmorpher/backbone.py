"""What the method asks of a diffusion model: pictures and prompts in, noise predictions, pictures out.

The method sees a model through `Backbone.predict_noise` and its noise schedule as pairs `(a_t, s_t)` with
`z_t = a_t x_0 + s_t eps`; whether the network itself predicts noise or velocity stays in here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor

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
    low_memory: spare memory at the cost of time, see `Morpher`; what comes out is the same. tf32: on a GPU, let float32
    products be rounded to TF32, which is faster.
    `unet_rows` counts the rows of every U-Net batch so far; a row that is trained on (forward and backward) counts 3.
    """

    def __init__(self, pipe: Any, name: str = "", low_memory: bool = False, tf32: bool = False) -> None:
        _check_kind(pipe)
        self.pipe = pipe
        self.low_memory, self.tf32 = low_memory, tf32
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
        # Our own copy: the scheduler moves its table to whatever device it is called with.
        self._abar = self._scheduler.alphas_cumprod.double().clamp_min(_MIN_ABAR)  # (num_train_timesteps,)
        self.unet_rows = 0

    # ---- facts

    @property
    def device(self) -> torch.device:
        """Where the networks run; under model offload their weights may lie elsewhere."""
        return getattr(self.pipe, "_execution_device", self.unet.device)

    @property
    def vae_factor(self) -> int:
        """Pixels per latent cell along a side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def smallest_side(self) -> int:
        """The smallest working size in pixels: one cell at the U-Net's deepest level."""
        return self.vae_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @property
    def native_size(self) -> tuple[int, int]:
        """The size the model was trained at, (width, height) in pixels."""
        sample = self.unet.config.sample_size
        if sample is None:
            raise ModelError(f"the model {self.name} does not say what size it was trained at; give a size.")
        h, w = (sample, sample) if isinstance(sample, int) else sample
        return w * self.vae_factor, h * self.vae_factor

    def signature(self) -> dict[str, list[float]]:
        """The U-Net's sizes and some of its weights, to be stored with what belongs to this model."""
        parts = (self.unet.conv_in.weight, self.unet.conv_out.weight)
        sampled = [w.detach().flatten()[:: max(1, w.numel() // 32)][:32].float().tolist() for w in parts]
        return {"sizes": [float(size) for w in parts for size in w.shape], "weights": sampled[0] + sampled[1]}

    def has_signature(self, signature: dict[str, list[float]]) -> bool:
        """Whether a stored `signature` is this model's, in whatever dtype each was loaded."""
        own = self.signature()
        return own["sizes"] == signature["sizes"] and torch.allclose(
            torch.tensor(own["weights"]), torch.tensor(signature["weights"]), rtol=0.02, atol=1e-3
        )

    def schedule(self, steps: int) -> NoiseSchedule:
        """The noise schedule of a run of `steps` DDIM steps."""
        self._scheduler.set_timesteps(steps)
        last = self.num_train_timesteps - 1  # which an offset may step over
        timesteps = tuple(sorted(min(int(t), last) for t in self._scheduler.timesteps))
        clean = torch.as_tensor(self._scheduler.final_alpha_cumprod, dtype=torch.float64).reshape(1)
        abar = torch.cat([clean, self._abar[list(timesteps)]])
        return NoiseSchedule(timesteps, abar.sqrt(), (1 - abar).sqrt())

    @property
    def num_train_timesteps(self) -> int:
        return int(self._scheduler.config.num_train_timesteps)

    # ---- pictures and prompts

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and spread of the VAE's posterior as scaled latents (method, section 1).

        pixels: (B, 3, H, W) in [-1, 1]. Returns two (B, C, h, w), float32.
        """
        if self.low_memory and len(pixels) > 1:
            mean, std = zip(*map(self.encode, pixels.split(1)), strict=True)
            return torch.cat(mean), torch.cat(std)
        posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
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
        return self.vae.decode(z.to(self.device, self.vae.dtype)).sample.float().clamp(-1, 1)

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings padded to the tokenizer's length; a longer prompt is cut, with a warning.   # (B, L, D) float32"""
        encoder = self.pipe.text_encoder
        limit = min(self.pipe.tokenizer.model_max_length, encoder.config.max_position_embeddings)
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
        mask = ids.attention_mask.to(self.device) if getattr(encoder.config, "use_attention_mask", False) else None
        return encoder(ids.input_ids.to(self.device), attention_mask=mask)[0].float()

    # ---- the network

    def predict(self, latents: Tensor, timestep: int | Tensor, conditioning: Tensor) -> Tensor:
        """The network's own output (see `training_target`), float32.                                # (B, C, h, w)

        latents: (B, C, h, w); timestep: one for all rows, or (B,); conditioning: (B, L, D).
        """
        self.unet_rows += len(latents) * (3 if torch.is_grad_enabled() else 1)
        dtype = self.unet.dtype
        return self.unet(latents.to(dtype), timestep, encoder_hidden_states=conditioning.to(dtype)).sample.float()

    def predict_noise(self, latents: Tensor, timestep: int | Tensor, conditioning: Tensor) -> Tensor:
        """eps(z, t, c), float32.                                                                      # (B, C, h, w)"""
        output = self.predict(latents, timestep, conditioning)
        if self.prediction_type == "epsilon":
            return output
        a, s = self._levels(timestep)
        return a * output + s * latents  # v = a eps - s x_0 and z = a x_0 + s eps

    def add_noise(self, x_0: Tensor, eps: Tensor, timestep: int | Tensor) -> Tensor:
        """`z_t = a_t x_0 + s_t eps`."""
        a, s = self._levels(timestep)
        return a * x_0 + s * eps

    def training_target(self, x_0: Tensor, eps: Tensor, timestep: int | Tensor) -> Tensor:
        """What `predict` should return for `z_t`: the noise, or the velocity `a_t eps - s_t x_0`."""
        a, s = self._levels(timestep)
        return eps if self.prediction_type == "epsilon" else a * eps - s * x_0

    def _levels(self, timestep: int | Tensor) -> tuple[Any, Any]:
        """`a_t` and `s_t`: numbers, or for timesteps (B,) float32 tensors (B, 1, 1, 1)."""
        if isinstance(timestep, Tensor):
            abar = self._abar[timestep.cpu()].reshape(-1, 1, 1, 1)
            return abar.sqrt().float().to(timestep.device), (1 - abar).sqrt().float().to(timestep.device)
        abar = float(self._abar[timestep])
        return abar**0.5, (1 - abar) ** 0.5

    @contextmanager
    def trained(self) -> Iterator[None]:
        """While open, gradients pass through the U-Net; in low memory blocks are run again on the way back."""
        checkpoint = self.low_memory and not self.unet.is_gradient_checkpointing
        try:
            if checkpoint:
                self.unet.enable_gradient_checkpointing()
            with torch.inference_mode(False), torch.enable_grad(), self.borrowed():
                yield
        finally:
            if checkpoint:
                self.unet.disable_gradient_checkpointing()

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
            with float32_products(self.tf32):
                yield
        finally:
            for m, was in zip(modules, training, strict=True):
                m.training = was
            for p, was in zip(parameters, trainable, strict=True):
                p.requires_grad_(was)


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """While open, float32 products on a GPU are rounded to TF32 or not; torch's own default is to do so in convolutions."""
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = tf32
        yield
    finally:
        for place, was in zip(places, before, strict=True):
            place.allow_tf32 = was


def _check_kind(pipe: Any) -> None:
    """Raise `ModelError`, saying what to do, for a pipeline that cannot be used."""
    kind = type(pipe).__name__
    needed = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    missing = [part for part in needed if getattr(pipe, part, None) is None]
    if missing or not isinstance(pipe.unet, UNet2DConditionModel):
        lacks = ", ".join(missing) or "a UNet2DConditionModel"
        raise ModelError(f"{kind} is not a Stable Diffusion 1.x or 2.x pipeline (it lacks {lacks}).")
    unet, vae = pipe.unet.config, pipe.vae.config
    if getattr(pipe, "text_encoder_2", None) is not None or unet.addition_embed_type is not None:
        raise ModelError(
            f"{kind} is of the SDXL family, which is not supported yet; use a Stable Diffusion 1.x or 2.x model."
        )
    if unet.in_channels != vae.latent_channels:
        raise ModelError(
            f"the U-Net takes {unet.in_channels} channels where the VAE gives {vae.latent_channels}; inpainting and "
            "depth models cannot be used, take the text-to-image model they were made from."
        )
    if any(getattr(m, "fused_projections", False) for m in pipe.unet.modules()):
        raise ModelError("the U-Net's projections are fused; call pipe.unfuse_qkv_projections() first.")
    if any(hasattr(m, "base_layer") for m in pipe.unet.modules()):
        raise ModelError(
            "the U-Net has LoRA adapters loaded; call pipe.unload_lora_weights() first (after pipe.fuse_lora() to keep them)."
        )
    if pipe.unet.device.type == "meta":
        raise ModelError("the U-Net is under sequential offload, which is not supported; use model offload or none.")
