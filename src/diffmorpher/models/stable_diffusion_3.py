"""Stable Diffusion 3 and 3.5: a rectified-flow transformer of joint blocks, told by two CLIP encoders and T5, if it has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from ..errors import ModelError
from .backbone import AttentionSite
from .conditioning import Conditioning
from .flow import Flow
from .levels import Level
from .text import warn_if_cut


class StableDiffusion3(Flow):
    """A Stable Diffusion 3 or 3.5 pipeline as the method sees it, with or without T5. Raises `ModelError` for another kind."""

    family = "Stable Diffusion 3"
    network_class = SD3Transformer2DModel
    needed = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    optional = ("text_encoder_3",)
    lora_layers = tuple(
        f".{attn}.{layer}" for attn in ("attn", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0")
    )
    time_scale = 1000.0

    def __init__(self, pipe: Any, name: str = "", low_memory: bool = False, tf32: bool = False) -> None:
        super().__init__(pipe, name, low_memory, tf32)
        config = self.network.config
        if config.in_channels != pipe.vae.config.latent_channels:
            raise ModelError(
                f"the transformer takes {config.in_channels} channels where the VAE gives "
                f"{pipe.vae.config.latent_channels}; take the text-to-image model that it was made from."
            )
        if "turbo" in self.name.lower():
            raise ModelError(
                f"{self.name} is distilled to a few steps, which cannot be inverted; use the model without turbo."
            )
        self.size_multiple = self.smallest_side = config.patch_size * self.vae_factor

    @property
    def native_size(self) -> tuple[int, int]:
        side = self.network.config.sample_size * self.vae_factor
        return side, side

    def ends(self) -> tuple[Tensor, Tensor]:
        return self.network.pos_embed.proj.weight, self.network.proj_out.weight

    def attention_sites(self) -> list[AttentionSite]:
        """All blocks; text has projections of its own. 3.5-medium's first blocks attend to the image alone once more."""
        ends = tuple(f".{attn}.{layer}" for attn in ("attn", "attn2") for layer in ("to_k", "to_v"))
        return [AttentionSite(name) for name, _ in self.network.named_modules() if name.endswith(ends)]

    def encode_prompts(self, prompts: Sequence[str], length: int = 0) -> Conditioning:
        """`text`: both CLIP encoders' side by side, then T5's (zeros without one); `pooled`: both CLIP encoders'."""
        pipe, clip_limit, width = (
            self.pipe,
            self.pipe.tokenizer.model_max_length,
            self.network.config.joint_attention_dim,
        )
        t5 = pipe.tokenizer_3 if pipe.text_encoder_3 is not None else None
        t5_limit = min(256, t5.model_max_length) if t5 else 256
        # T5 reads on where CLIP stops: only the longer limit is worth a warning.
        warn_if_cut(t5 or pipe.tokenizer, prompts, t5_limit if t5 else clip_limit)

        def encoded(tokenizer: Any, encoder: Any, limit: int) -> Any:
            ids = tokenizer(list(prompts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
            return encoder(ids.input_ids.to(self.device), output_hidden_states=True)

        pairs = (pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)
        clips = [encoded(*pair, clip_limit) for pair in pairs]
        clip = torch.cat([each.hidden_states[-2].float() for each in clips], dim=-1)
        if t5:
            long = encoded(t5, pipe.text_encoder_3, t5_limit)[0].float()
        else:
            long = clip.new_zeros(len(prompts), t5_limit, width)
        text = torch.cat([torch.nn.functional.pad(clip, (0, width - clip.shape[-1])), long], dim=1)
        return Conditioning({"text": text, "pooled": torch.cat([each[0].float() for each in clips], dim=-1)})

    def output(self, latents: Tensor, level: Level, conditioning: Conditioning, guidance: float = 1.0) -> Tensor:
        self._count(len(latents))
        dtype = self.network.dtype
        velocity = self.network(
            hidden_states=latents.to(dtype).contiguous(),
            timestep=self.times(level, len(latents), latents.device),
            encoder_hidden_states=conditioning["text"].to(dtype),
            pooled_projections=conditioning["pooled"].to(dtype),
            return_dict=False,
        )[0]
        return torch.as_tensor(velocity).float().contiguous()
