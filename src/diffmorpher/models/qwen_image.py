"""Qwen-Image: a rectified-flow transformer of joint blocks, told by Qwen2.5-VL's sequence alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

from ..errors import ModelError
from .backbone import AttentionSite
from .conditioning import Conditioning
from .flow import Flow
from .levels import Level, Prediction
from .text import warn_if_cut

LIMIT = 512  # rows of text, as in diffusers' pipeline


class QwenImage(Flow):
    """A Qwen-Image pipeline as the method sees it. Raises `ModelError` for another kind, and for few-step models."""

    family = "Qwen-Image"
    network_class = QwenImageTransformer2DModel
    needed = ("transformer", "vae", "text_encoder", "tokenizer")
    lora_layers = (".attn.to_q", ".attn.to_k", ".attn.to_v", ".attn.to_out.0")

    def __init__(self, pipe: Any, name: str = "", low_memory: bool = False, tf32: bool = False) -> None:
        from diffusers import QwenImagePipeline  # not above: it imports all of Qwen2.5-VL

        super().__init__(pipe, name, low_memory, tf32)
        config = self.network.config
        other = config.in_channels != 4 * self.vae.config.z_dim or any(
            config.get(mark) for mark in ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
        )
        if other or not isinstance(pipe, QwenImagePipeline):
            raise ModelError(
                f"{type(pipe).__name__} holds no text-to-image model; editing, layered, inpainting and ControlNet models "
                "cannot be used, take Qwen/Qwen-Image with QwenImagePipeline."
            )
        scheduler = getattr(pipe.scheduler, "config", {})
        # Lightning's scheduler shifts all sizes alike, the base model's a large picture more.
        lightning = "base_shift" in scheduler and scheduler["base_shift"] == scheduler["max_shift"]
        if lightning or any(word in self.name.lower() for word in ("lightning", "distill", "turbo")):
            raise ModelError(
                f"{self.name} is distilled to a few steps, which cannot be inverted; use Qwen/Qwen-Image as it is."
            )
        self.size_multiple = self.smallest_side = 2 * self.vae_factor

    @property
    def native_size(self) -> tuple[int, int]:
        side = self.pipe.default_sample_size * self.vae_factor
        return side, side

    def ends(self) -> tuple[Tensor, Tensor]:
        return self.network.img_in.weight, self.network.proj_out.weight

    def attention_sites(self) -> list[AttentionSite]:
        """All blocks; text has projections of its own."""
        blocks = range(len(self.network.transformer_blocks))
        return [AttentionSite(f"transformer_blocks.{i}.attn.{layer}") for i in blocks for layer in ("to_k", "to_v")]

    # ---- pictures and prompts: the VAE is one of films, a picture a film of one frame

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        if pixels.ndim == 5:
            return super().encode(pixels)
        mean, std = self.encode(pixels[:, :, None])
        return mean[:, :, 0], std[:, :, 0]

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents.to(self.device)[:, :, None])[:, :, 0]

    def _shift_and_scale(self) -> tuple[Tensor, Tensor]:
        mean, std = (
            torch.tensor(x, device=self.device).reshape(-1, 1, 1, 1)
            for x in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        return mean, 1 / std

    def encode_prompts(self, prompts: Sequence[str], length: int = 0) -> Conditioning:
        """`text`: Qwen2.5-VL's sequence; a shorter text ends in rows of zeros.

        These count as text, in all rows of a batch: the frames next to an image are then told what the image itself is.
        """
        warn_if_cut(self.pipe.tokenizer, prompts, LIMIT)
        text, _ = self.pipe.encode_prompt(list(prompts), self.device, max_sequence_length=LIMIT)
        return Conditioning({"text": pad(text.float(), (0, 0, 0, max(0, length - text.shape[1])))})

    # ---- the network

    def output(self, latents: Tensor, level: Level, conditioning: Conditioning, guidance: float = 1.0) -> Tensor:
        self._count(len(latents))
        batch, _, height, width = latents.shape
        dtype = self.network.dtype
        packed = pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)  # (B, hw / 4, 4C)
        velocity = self.network(
            hidden_states=packed.to(dtype).contiguous(),
            timestep=self.times(level, batch, latents.device),
            encoder_hidden_states=conditioning["text"].to(dtype),
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
            return_dict=False,
        )[0]
        grid = velocity.float().transpose(1, 2).unflatten(2, (height // 2, width // 2))
        return pixel_shuffle(grid, 2).contiguous()

    def guided(self, both: Prediction, level: Level, scale: float) -> Prediction:
        """Classifier-free guidance, each 2 x 2 latents' velocity brought back to the length that it has with the text alone."""
        plain = super().guided(both, level, scale)
        velocity, with_text = plain.noise - plain.clean, (both.noise - both.clean).chunk(2)[1]
        velocity = velocity * _lengths(with_text) / _lengths(velocity)
        return self.prediction(velocity, level.noised(plain.clean, plain.noise), level)


def _lengths(velocity: Tensor) -> Tensor:
    """At each latent the norm of the 2 x 2 latents, all channels, that it is one of.   # (B, C, h, w) -> (B, 1, h, w)"""
    norms = pixel_unshuffle(velocity, 2).norm(dim=1, keepdim=True)
    return norms.repeat_interleave(2, 2).repeat_interleave(2, 3)
