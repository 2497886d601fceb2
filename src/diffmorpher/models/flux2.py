"""FLUX.2 Klein base: a rectified-flow transformer of joint and fused single blocks, told by three layers of Qwen3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ..errors import ModelError
from .backbone import AttentionSite
from .conditioning import Conditioning
from .flow import Flow
from .levels import Level
from .text import tokenized

_BASE = "black-forest-labs/FLUX.2-klein-base-4B"


class Flux2(Flow):
    """A FLUX.2 Klein base pipeline as the method sees it; a latent is 2 x 2 of the VAE's, normalised.

    Raises `ModelError` for another kind: FLUX.2 dev, pipelines that edit pictures, and the distilled Klein.
    """

    family = "FLUX.2 Klein"
    network_class = Flux2Transformer2DModel
    needed = ("transformer", "vae", "text_encoder", "tokenizer")
    lora_layers = tuple(f".attn.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", "to_out"))

    def __init__(self, pipe: Any, name: str = "", low_memory: bool = False, tf32: bool = False) -> None:
        super().__init__(pipe, name, low_memory, tf32)
        if not isinstance(pipe, Flux2KleinPipeline):
            raise ModelError(
                f"{type(pipe).__name__} cannot be used: of FLUX.2 only Klein's text-to-image pipeline, Flux2KleinPipeline, "
                f"is supported; take {_BASE}."
            )
        if pipe.config.is_distilled:
            raise ModelError(f"this FLUX.2 Klein is distilled to a few steps, which cannot be inverted; use {_BASE}.")
        self.vae_factor *= 2
        self.size_multiple = self.smallest_side = self.vae_factor

    @property
    def latent_channels(self) -> int:
        return 4 * super().latent_channels  # in patches of 2 x 2

    @property
    def native_size(self) -> tuple[int, int]:
        side = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return side, side

    def ends(self) -> tuple[Tensor, Tensor]:
        return self.network.x_embedder.weight, self.network.proj_out.weight

    def projections(self) -> dict[str, nn.Linear]:
        """Of the single blocks both fused layers; of the joint ones `to_out` is a list, whose first is meant."""
        return {name: layer for name, layer in super().projections().items() if not isinstance(layer, nn.ModuleList)}

    def attention_sites(self) -> list[AttentionSite]:
        """All blocks; a single one makes queries, keys, values and its MLP's input in one layer, the image after the text."""
        sites: list[AttentionSite] = []
        for i in range(len(self.network.transformer_blocks)):
            sites += [AttentionSite(f"transformer_blocks.{i}.attn.{layer}") for layer in ("to_k", "to_v")]
        keys_and_values = self.network.inner_dim, 3 * self.network.inner_dim
        for i in range(len(self.network.single_transformer_blocks)):
            layer = f"single_transformer_blocks.{i}.attn.to_qkv_mlp_proj"
            sites.append(AttentionSite(layer, "last", keys_and_values))
        return sites

    def image_rows(self, latents: Tensor) -> int:
        """One row for each latent."""
        return latents.shape[-2] * latents.shape[-1]

    # ---- pictures and prompts

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        if self.low_memory and len(pixels) > 1:
            return super().encode(pixels)  # which asks here again for each picture by itself
        mean, spread = self._statistics()
        posterior = [pixel_unshuffle(x, 2) for x in super().encode(pixels)]
        return (posterior[0] - mean) / spread, posterior[1] / spread

    def decode(self, latents: Tensor) -> Tensor:
        mean, spread = self._statistics()
        return super().decode(pixel_shuffle(latents.to(mean) * spread + mean, 2))

    def _shift_and_scale(self) -> tuple[float, float]:
        """None: it is the 2 x 2 latents that are normalised."""
        return 0.0, 1.0

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and spread of the VAE's 2 x 2 latents as it saw them in training, (C, 1, 1) each."""
        norm = self.vae.bn
        mean, variance = (x.to(self.device).float()[:, None, None] for x in (norm.running_mean, norm.running_var))
        return mean, (variance + self.vae.config.batch_norm_eps).sqrt()

    def encode_prompts(self, prompts: Sequence[str], length: int = 0) -> Conditioning:
        """`text`: three of Qwen3's layers side by side, of the prompt as a message to it; at most 512 tokens."""
        tokenizer, encoder = self.pipe.tokenizer, self.pipe.text_encoder
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            for prompt in prompts
        ]
        tokens = tokenized(tokenizer, chats, min(512, tokenizer.model_max_length)).to(self.device)
        layers = encoder(**tokens, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states
        return Conditioning({"text": torch.cat([layers[k] for k in (9, 18, 27)], dim=-1).float()})

    # ---- the network

    def output(self, latents: Tensor, level: Level, conditioning: Conditioning, guidance: float = 1.0) -> Tensor:
        self._count(len(latents))
        dtype, device = self.network.dtype, latents.device
        rows, columns, tokens = (torch.arange(n, device=device) for n in (*latents.shape[-2:], conditioning.length))
        none = torch.zeros(1, device=device, dtype=torch.int64)
        velocity = self.network(
            hidden_states=latents.flatten(2).transpose(1, 2).to(dtype).contiguous(),  # (B, hw, C)
            timestep=self.times(level, len(latents), device),
            encoder_hidden_states=conditioning["text"].to(dtype),
            txt_ids=torch.cartesian_prod(none, none, none, tokens),
            img_ids=torch.cartesian_prod(none, rows, columns, none),
            return_dict=False,
        )[0]
        return velocity.float().transpose(1, 2).reshape(latents.shape).contiguous()
