"""Stable Diffusion's architectures with random weights: for timing, where no weights can be downloaded."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffmorpher.errors import ModelError
from diffmorpher.models.catalog import CATALOG

_UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}
UNETS: dict[str, dict[str, Any]] = {
    "sd15": _UNET | {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": _UNET | {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
}
_TEXT: dict[str, dict[str, Any]] = {
    "sd15": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "sd21": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16},
}
_VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}


def random_pipeline(name: str, device: torch.device, dtype: torch.dtype) -> StableDiffusionPipeline:
    """A pipeline of the architecture called "sd15" or "sd21" (2.1-base), 512 x 512, or of the bundled "mini".

    Raises `ModelError` for another.
    """
    if name == "sdxl":
        raise ModelError("Stable Diffusion XL is not supported by diffmorpher yet, so there is nothing to time.")
    if name == "mini":
        pipe = StableDiffusionPipeline.from_pretrained(
            CATALOG["mini"].source, safety_checker=None, requires_safety_checker=False
        )
        for module in (pipe.unet, pipe.vae, pipe.text_encoder):
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
        return pipe.to(device, dtype)
    if name not in UNETS:
        raise ModelError(f"the architecture {name!r} is not known; there are {', '.join([*UNETS, 'mini'])}.")
    torch.manual_seed(0)
    # The bundled model's tokenizer has fewer words; the text's length and the encoder's size are the architecture's.
    tokenizer = CLIPTokenizer.from_pretrained(f"{CATALOG['mini'].source}/tokenizer", model_max_length=77)
    ids = {n: getattr(tokenizer, n) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = CLIPTextConfig(**_TEXT[name], vocab_size=49408, max_position_embeddings=77, **ids)
    with device:
        parts = {
            "unet": UNet2DConditionModel(**UNETS[name]).to(dtype),
            "vae": AutoencoderKL(**_VAE).to(dtype),
            "text_encoder": CLIPTextModel(text).to(dtype),
        }
    return StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            set_alpha_to_one=False,
            clip_sample=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
