"""FLUX.1: a rectified-flow transformer of joint and single blocks, told by CLIP's pooled text, T5's sequence and a guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from ..errors import ModelError
from .backbone import AttentionSite
from .conditioning import Conditioning
from .flow import Flow
from .levels import Level
from .text import tokenized, with_all_vectors


class Flux(Flow):
    """A FLUX.1 pipeline as the method sees it. Raises `ModelError` for another kind, and for the distilled schnell."""

    family = "FLUX.1"
    network_class = FluxTransformer2DModel
    needed = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    lora_layers = (".attn.to_q", ".attn.to_k", ".attn.to_v", ".attn.to_out.0")

    def __init__(self, pipe: Any, name: str = "", low_memory: bool = False, tf32: bool = False) -> None:
        super().__init__(pipe, name, low_memory, tf32)
        config = self.network.config
        if config.in_channels != 4 * pipe.vae.config.latent_channels:
            raise ModelError(
                f"the transformer takes {config.in_channels} channels for {4 * pipe.vae.config.latent_channels} of the "
                "latents; fill, depth and canny models cannot be used, take FLUX.1-dev."
            )
        if config.num_layers == 19 and not config.guidance_embeds:
            raise ModelError("FLUX.1-schnell is distilled to a few steps, which cannot be inverted; use FLUX.1-dev.")
        self.size_multiple = self.smallest_side = 2 * self.vae_factor
        self.embeds_guidance = bool(config.guidance_embeds)

    @property
    def native_size(self) -> tuple[int, int]:
        side = self.pipe.default_sample_size * self.vae_factor
        return side, side

    def ends(self) -> tuple[Tensor, Tensor]:
        return self.network.x_embedder.weight, self.network.proj_out.weight

    def attention_sites(self) -> list[AttentionSite]:
        """All blocks; in the single ones the image comes after the text."""
        sites: list[AttentionSite] = []
        places: dict[str, Literal["all", "last"]] = {"transformer_blocks": "all", "single_transformer_blocks": "last"}
        for blocks, rows in places.items():
            for i in range(len(getattr(self.network, blocks))):
                sites += [AttentionSite(f"{blocks}.{i}.attn.{layer}", rows) for layer in ("to_k", "to_v")]
        return sites

    def encode_prompts(self, prompts: Sequence[str], length: int = 0) -> Conditioning:
        """`pooled`: CLIP's; `text`: T5's sequence, at most 512 tokens."""
        clip, t5 = self.pipe.tokenizer, self.pipe.tokenizer_2
        limit = min(clip.model_max_length, self.pipe.text_encoder.config.max_position_embeddings)
        # CLIP's share is the pooled text alone, and T5 reads on: only the longer limit is worth a warning.
        texts = with_all_vectors(self.pipe, prompts, clip)
        ids = clip(texts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt").input_ids
        pooled = self.pipe.text_encoder(ids.to(self.device)).pooler_output
        ids = tokenized(t5, with_all_vectors(self.pipe, prompts, t5), min(512, t5.model_max_length)).input_ids
        return Conditioning(
            {"text": self.pipe.text_encoder_2(ids.to(self.device))[0].float(), "pooled": pooled.float()}
        )

    def output(self, latents: Tensor, level: Level, conditioning: Conditioning, guidance: float = 1.0) -> Tensor:
        self._count(len(latents))
        batch, _, height, width = latents.shape
        dtype, device = self.network.dtype, latents.device
        packed = torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)  # (B, hw / 4, 4C)
        ids = torch.zeros(height // 2, width // 2, 3, device=device, dtype=dtype)
        ids[..., 1] += torch.arange(height // 2, device=device)[:, None]
        ids[..., 2] += torch.arange(width // 2, device=device)[None]
        velocity = self.network(
            hidden_states=packed.to(dtype).contiguous(),
            timestep=self.times(level, batch, device),
            guidance=torch.full((batch,), guidance, device=device) if self.embeds_guidance else None,
            pooled_projections=conditioning["pooled"].to(dtype),
            encoder_hidden_states=conditioning["text"].to(dtype),
            txt_ids=torch.zeros(conditioning.length, 3, device=device, dtype=dtype),
            img_ids=ids.flatten(0, 1),
            return_dict=False,
        )[0]
        grid = velocity.float().transpose(1, 2).unflatten(2, (height // 2, width // 2))
        return torch.nn.functional.pixel_shuffle(grid, 2).contiguous()
