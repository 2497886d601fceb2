"""Real models at tiny size, shared by the tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

import diffmorpher
from diffmorpher import Morpher

torch.set_num_threads(1)  # for tiny models a second thread only waits; see `mini`

ASSETS = Path(diffmorpher.__file__).parent / "assets"


def tiny_pipeline(prediction_type: str = "epsilon", seed: int = 0, **changes: Any) -> StableDiffusionPipeline:
    """A pipeline of the Stable Diffusion layout with random weights: 32 x 32 pixels, 4 x 8 x 8 latents.

    changes: "linear" for SD 2's linear projections, "shift_factor" for the VAE, anything else goes to the U-Net.
    """
    torch.manual_seed(seed)
    linear = changes.pop("linear", False)
    shift = changes.pop("shift_factor", None)
    unet = UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 32,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
            "use_linear_projection": linear,
        }
        | changes
    )
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=0.31,
        shift_factor=shift,
    )
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "mini" / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipe = StableDiffusionPipeline(
        vae, CLIPTextModel(text), tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    for part in (unet, vae, pipe.text_encoder):
        part.eval()
    return pipe


def tiny_xl_pipeline(seed: int = 0) -> StableDiffusionXLPipeline:
    """A pipeline of Stable Diffusion XL's layout with random weights: 32 x 32 pixels, 4 x 8 x 8 latents."""
    base = tiny_pipeline(
        seed=seed,
        linear=True,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )
    config = CLIPTextConfig(**base.text_encoder.config.to_dict() | {"projection_dim": 24, "hidden_act": "gelu"})
    second = CLIPTextModelWithProjection(config).eval()
    return StableDiffusionXLPipeline(
        base.vae, base.text_encoder, second, base.tokenizer, base.tokenizer, base.unet, base.scheduler,
        add_watermarker=False,
    )  # fmt: skip


def tiny_flux_pipeline(seed: int = 0, guidance_embeds: bool = True) -> FluxPipeline:
    """A pipeline of FLUX.1's layout with random weights: 32 x 32 pixels, 4 x 8 x 8 latents, 16 image rows."""
    base = tiny_pipeline(seed=seed, shift_factor=0.1)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=32, guidance_embeds=guidance_embeds, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(base.tokenizer), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    pipe = FluxPipeline(scheduler, base.vae, base.text_encoder, base.tokenizer, t5, base.tokenizer, transformer)
    pipe.default_sample_size = 8  # the class says 128
    return pipe


def tiny_sd3_pipeline(seed: int = 0, t5: bool = True) -> StableDiffusion3Pipeline:
    """A pipeline of Stable Diffusion 3.5-medium's layout with random weights: one block of two attends to the image twice."""
    xl, base = tiny_xl_pipeline(seed), tiny_pipeline(seed=seed, shift_factor=0.1)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=48, out_channels=4,
        pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
    ).eval()  # fmt: skip
    third = T5EncoderModel(
        T5Config(vocab_size=len(base.tokenizer), d_model=64, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ).eval()
    return StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), base.vae, xl.text_encoder_2, base.tokenizer,
        xl.text_encoder_2, base.tokenizer, third if t5 else None, base.tokenizer if t5 else None,
    )  # fmt: skip


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="session")
def demo() -> dict[str, Image.Image]:
    """The demo pictures by name, 256 x 256 RGB."""
    return {file.stem: Image.open(file).convert("RGB") for file in sorted((ASSETS / "demo").glob("*.png"))}


@pytest.fixture(scope="session")
def loaded_mini() -> Morpher:
    return Morpher.from_pretrained("mini", device="cpu")


@pytest.fixture
def mini(loaded_mini: Morpher) -> Iterator[Morpher]:
    """The bundled model, on two threads."""
    torch.set_num_threads(2)
    yield loaded_mini
    torch.set_num_threads(1)
