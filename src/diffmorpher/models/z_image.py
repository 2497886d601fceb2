"""Z-Image: a rectified-flow transformer of joint blocks, image rows before those of the caption, told by Qwen3's sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from torch import Tensor, nn
from torch.nn.functional import pad

from ..errors import ModelError
from .backbone import AttentionSite
from .conditioning import Conditioning
from .flow import Flow
from .levels import Level
from .text import tokenized


class ZImage(Flow):
    """A Z-Image pipeline as the method sees it. Raises `ModelError` for another kind, for Omni and Edit, and for Turbo."""

    family = "Z-Image"
    network_class = ZImageTransformer2DModel
    needed = ("transformer", "vae", "text_encoder", "tokenizer")
    lora_layers = (".attention.to_q", ".attention.to_k", ".attention.to_v", ".attention.to_out.0")
    native_size = (1024, 1024)  # nothing in the pipeline says it

    def __init__(self, pipe: Any, name: str = "", low_memory: bool = False, tf32: bool = False) -> None:
        super().__init__(pipe, name, low_memory, tf32)
        if self.network.config.siglip_feat_dim is not None:
            raise ModelError(
                "the transformer also reads pictures, as Z-Image-Omni and Z-Image-Edit do; use Tongyi-MAI/Z-Image."
            )
        if "turbo" in self.name.lower():  # which has the base model's layers
            raise ModelError(
                f"{self.name} is distilled to a few steps, which cannot be inverted; use Tongyi-MAI/Z-Image."
            )
        self.size_multiple = self.smallest_side = 2 * self.vae_factor

    def ends(self) -> tuple[Tensor, Tensor]:
        patches = "2-1"  # of 2 x 2 latents and one frame, the only ones that the pipeline uses
        return self.network.all_x_embedder[patches].weight, self.network.all_final_layer[patches].linear.weight

    def projections(self) -> dict[str, nn.Linear]:
        """Those of the blocks that see the image; the joint ones project the caption with the same weights."""
        found = super().projections()
        return {name: layer for name, layer in found.items() if not name.startswith("context_refiner.")}

    def attention_sites(self) -> list[AttentionSite]:
        """All blocks that see the image, which lies first: before padding, and in the joint ones before the caption."""
        return [AttentionSite(name, "first") for name in self.projections() if name.endswith((".to_k", ".to_v"))]

    def encode_prompts(self, prompts: Sequence[str], length: int = 0) -> Conditioning:
        """`text`: Qwen3's sequence, at most 512 tokens and zeros; `padding`, (B, L, 1): 1 for rows with the network's own
        padding in place of text, less for rows between the two.

        All captions are padded to one multiple of 32, since their length shifts the image's positions.
        """
        tokenizer = self.pipe.tokenizer
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            for prompt in prompts
        ]
        tokens = tokenized(tokenizer, chats, min(512, tokenizer.model_max_length)).to(self.device)
        ids, mask = tokens.input_ids, tokens.attention_mask.bool()
        states = self.pipe.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
        captions = [state[kept].float() for state, kept in zip(states, mask, strict=True)]
        rows = -(-max(length, *map(len, captions)) // SEQ_MULTI_OF) * SEQ_MULTI_OF
        text = torch.stack([pad(caption, (0, 0, 0, rows - len(caption))) for caption in captions])
        padding = torch.arange(rows, device=text.device) >= mask.sum(1, keepdim=True).to(text.device)  # (B, L)
        return Conditioning({"text": text, "padding": padding.float()[..., None]})

    def output(self, latents: Tensor, level: Level, conditioning: Conditioning, guidance: float = 1.0) -> Tensor:
        self._count(len(latents))
        network, dtype = self.network, self.network.dtype
        padding = conditioning["padding"].flatten(0, 1)

        def padded(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
            # As the network itself pads, which it cannot by a share of a row.
            return torch.lerp(embedded, network.cap_pad_token.to(embedded), padding.to(embedded))

        handle = network.cap_embedder.register_forward_hook(padded)
        try:
            images = network(
                x=list(latents[:, :, None].to(dtype).contiguous().unbind()),
                t=1 - self.times(level, len(latents), latents.device),
                cap_feats=list(conditioning["text"].to(dtype).unbind()),
                return_dict=False,
            )[0]
        finally:
            handle.remove()
        # The network's time runs from noise to the picture, and so does its velocity.
        return -torch.stack(images).squeeze(2).float()
