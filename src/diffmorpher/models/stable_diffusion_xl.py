"""Stable Diffusion XL: the U-Net and DDIM of Stable Diffusion, two text encoders, a pooled text and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from .conditioning import Conditioning
from .stable_diffusion import StableDiffusion
from .text import tokenized, with_all_vectors


class StableDiffusionXL(StableDiffusion):
    """A Stable Diffusion XL base pipeline as the method sees it.

    pipe: a diffusers pipeline with `unet`, `vae`, `scheduler`, two text encoders and their tokenizers. Raises `ModelError` if
    it is of another kind, the refiner say.
    """

    needed = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    family = "Stable Diffusion XL"

    def __init__(self, pipe: Any, name: str = "", low_memory: bool = False, tf32: bool = False) -> None:
        if getattr(pipe, "unet", None) is not None and getattr(pipe, "text_encoder", None) is None:
            raise ModelError(
                "this is Stable Diffusion XL's refiner, or a pipeline without its first text encoder; use the base model."
            )
        super().__init__(pipe, name, low_memory, tf32)

    def encode_prompts(self, prompts: Sequence[str], length: int = 0) -> Conditioning:
        """`text`: both encoders' last hidden states but one, side by side; `pooled`: the second's projection."""
        texts = []
        for tokenizer, encoder in (
            (self.pipe.tokenizer, self.pipe.text_encoder),
            (self.pipe.tokenizer_2, self.pipe.text_encoder_2),
        ):
            limit = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
            whole = with_all_vectors(self.pipe, prompts, tokenizer)
            ids = tokenized(tokenizer, whole, limit).input_ids.to(self.device)
            encoded = encoder(ids, output_hidden_states=True)
            texts.append(encoded.hidden_states[-2].float())
        return Conditioning({"text": torch.cat(texts, dim=-1), "pooled": encoded[0].float()})

    def unconditional(self, length: int = 0) -> Conditioning:
        """Zeros where the model was trained so, else the empty prompt."""
        empty = self.encode_prompts([""])
        if not self.pipe.config.force_zeros_for_empty_prompt:
            return empty
        return Conditioning({name: torch.zeros_like(x) for name, x in empty.tensors.items()})

    def _added(self, latents: Tensor, conditioning: Conditioning) -> dict[str, Tensor]:
        """The pooled text, and the picture's size as it was, where it was cut, and as it shall be: here never cut."""
        height, width = (side * self.vae_factor for side in latents.shape[-2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=latents.dtype, device=latents.device)
        return {"text_embeds": conditioning["pooled"].to(latents.dtype), "time_ids": sizes.expand(len(latents), -1)}

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        with self._exact_vae():
            return super().encode(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        with self._exact_vae():
            return super().decode(latents)

    def _exact_vae(self) -> AbstractContextManager[None]:
        """While open, a VAE that is known to overflow in float16 is in float32."""
        return self._wide_vae() if self.vae.dtype == torch.float16 and self.vae.config.force_upcast else nullcontext()
