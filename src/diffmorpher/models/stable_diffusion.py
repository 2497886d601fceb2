"""Stable Diffusion 1.x and 2.x: a U-Net that predicts noise or velocity, one CLIP text encoder, sampled by DDIM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from ..errors import ModelError
from .backbone import AttentionSite, Backbone
from .conditioning import Conditioning
from .levels import Level, NoiseSchedule, Prediction
from .text import tokenized, with_all_vectors

#: Smallest abar that is divided by: a schedule rescaled to zero terminal SNR reaches 0 (the value diffusers uses too).
_MIN_ABAR = 2.0**-24


class StableDiffusion(Backbone):
    """A Stable Diffusion 1.x or 2.x pipeline as the method sees it.

    pipe: a diffusers pipeline with `unet`, `vae`, `text_encoder`, `tokenizer` and `scheduler`. Raises `ModelError` if it is of
    another kind.
    """

    needed: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    family: ClassVar[str] = "Stable Diffusion 1.x or 2.x"
    network_part, network_class = "unet", UNet2DConditionModel
    lora_layers = tuple(
        f".{attn}.{layer}" for attn in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0")
    )

    def __init__(self, pipe: Any, name: str = "", low_memory: bool = False, tf32: bool = False) -> None:
        super().__init__(pipe, name, low_memory, tf32)
        unet, vae = self.network.config, self.vae.config
        if unet.in_channels != vae.latent_channels:
            raise ModelError(
                f"the U-Net takes {unet.in_channels} channels where the VAE gives {vae.latent_channels}; inpainting and "
                "depth models cannot be used, take the text-to-image model they were made from."
            )
        if unet.time_cond_proj_dim is not None:
            raise ModelError(
                f"{self.name} is a consistency model (LCM), distilled to a few steps, which cannot be inverted; take the model "
                "that it was made from."
            )
        self.size_multiple = self.vae_factor
        self.smallest_side = self.vae_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
        kind, facts = type(pipe.scheduler).__name__, pipe.scheduler.config
        if "beta_schedule" not in facts or facts.get("use_flow_sigmas") or "flow" in str(facts.get("prediction_type")):
            raise ModelError(
                f"the scheduler {kind} is for other models than {self.family}; give the pipeline the one its model came with, "
                "such as DDIMScheduler."
            )
        # The sampler is DDIM by name, whatever the checkpoint ships with: inversion needs the same solver.
        self._scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        self.num_train_timesteps = int(self._scheduler.config.num_train_timesteps)
        self.prediction_type: str = self._scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ModelError(
                f"the model {self.name} predicts {self.prediction_type!r}; only epsilon and v_prediction are supported."
            )
        # Our own copy: the scheduler moves its table to whatever device it is called with.
        self._abar = self._scheduler.alphas_cumprod.double().clamp_min(_MIN_ABAR)  # (num_train_timesteps,)

    # ---- facts

    @property
    def native_size(self) -> tuple[int, int]:
        sample = self.network.config.sample_size
        if sample is None:
            raise ModelError(f"the model {self.name} does not say what size it was trained at; give a size.")
        h, w = (sample, sample) if isinstance(sample, int) else sample
        return w * self.vae_factor, h * self.vae_factor

    def ends(self) -> tuple[Tensor, Tensor]:
        return self.network.conv_in.weight, self.network.conv_out.weight

    def schedule(self, steps: int) -> NoiseSchedule:
        self._scheduler.set_timesteps(steps)
        last = self.num_train_timesteps - 1  # which an offset may step over
        timesteps = sorted(min(int(t), last) for t in self._scheduler.timesteps)
        clean = torch.as_tensor(self._scheduler.final_alpha_cumprod, dtype=torch.float64).reshape(1)
        return NoiseSchedule.diffusion(timesteps, torch.cat([clean, self._abar[timesteps]]))

    def level(self, t: Tensor) -> Level:
        abar = self._abar[t.cpu()].reshape(-1, 1, 1, 1)
        return Level(abar.sqrt().float().to(t.device), (1 - abar).sqrt().float().to(t.device), t)

    def attention_sites(self) -> list[AttentionSite]:
        """The self-attention of the up blocks, as in the paper."""
        ends = (".attn1.to_k", ".attn1.to_v")
        return [
            AttentionSite(name)
            for name, _ in self.network.named_modules()
            if name.startswith("up_blocks.") and name.endswith(ends)
        ]

    # ---- pictures and prompts

    def encode_prompts(self, prompts: Sequence[str], length: int = 0) -> Conditioning:
        encoder = self.pipe.text_encoder
        limit = min(self.pipe.tokenizer.model_max_length, encoder.config.max_position_embeddings)
        texts = with_all_vectors(self.pipe, prompts, self.pipe.tokenizer)
        ids = tokenized(self.pipe.tokenizer, texts, limit)
        mask = ids.attention_mask.to(self.device) if getattr(encoder.config, "use_attention_mask", False) else None
        return Conditioning({"text": encoder(ids.input_ids.to(self.device), attention_mask=mask)[0].float()})

    # ---- the network

    def output(self, latents: Tensor, level: Level, conditioning: Conditioning, guidance: float = 1.0) -> Tensor:
        self._count(len(latents))
        dtype = self.network.dtype
        latents, text = latents.to(dtype).contiguous(), conditioning["text"].to(dtype).contiguous()
        added = self._added(latents, conditioning)
        output = self.network(latents, level.time, encoder_hidden_states=text, added_cond_kwargs=added)
        return output.sample.float().contiguous()

    def _added(self, latents: Tensor, conditioning: Conditioning) -> dict[str, Tensor] | None:
        """What the U-Net is told beside the text."""
        return None

    def prediction(self, output: Tensor, latents: Tensor, level: Level) -> Prediction:
        a, s = level.a, level.s
        if self.prediction_type == "epsilon":
            return Prediction((latents - s * output) / a, output)
        return Prediction(a * latents - s * output, a * output + s * latents)  # v = a eps - s x_0 and z = a x_0 + s eps

    def training_target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The noise, or the velocity `a_t eps - s_t x_0`."""
        level = self.level(t)
        return eps if self.prediction_type == "epsilon" else level.a * eps - level.s * x_0
