"""The published architectures with random weights: for timing, where no weights can be downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from diffmorpher.errors import ModelError
from diffmorpher.models.catalog import CATALOG
from diffmorpher.models.clip_vocabulary import CONFIGS, clip_tokenizer


def _stable_diffusion(name: str, small: bool) -> DiffusionPipeline:
    """1.5, 2.1-base or XL, of the configurations that the package loads single files with."""
    folder = CONFIGS / {"sd15": "sd1", "sd21": "sd2-base", "sdxl": "sdxl"}[name]
    unet = UNet2DConditionModel.load_config(folder / "unet")
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_config(unet),
        "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")),
        "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")),
        "tokenizer": clip_tokenizer(folder / "tokenizer"),
        "scheduler": DDIMScheduler.from_config(DDIMScheduler.load_config(folder / "scheduler")),
    }
    if name == "sdxl":
        second = CLIPTextConfig.from_pretrained(folder / "text_encoder_2")
        parts["text_encoder_2"] = CLIPTextModelWithProjection(second)
        return StableDiffusionXLPipeline(
            **parts, tokenizer_2=clip_tokenizer(folder / "tokenizer_2"), add_watermarker=False
        )
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def _mini(name: str, small: bool) -> DiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(
        CATALOG["mini"].source, safety_checker=None, requires_safety_checker=False
    )
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return pipe


def _vae_16() -> AutoencoderKL:
    """FLUX.1's autoencoder, which Stable Diffusion 3's and Z-Image's have the layers of."""
    return AutoencoderKL.from_config(
        AutoencoderKL.load_config(CONFIGS / "sdxl" / "vae"), latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159,
        use_quant_conv=False, use_post_quant_conv=False, force_upcast=False,
    )  # fmt: skip


def _qwen3(small: bool) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Qwen3 4B, FLUX.2 Klein's and Z-Image's text encoder."""
    config = Qwen3Config(
        vocab_size=151936, hidden_size=2560, intermediate_size=64 if small else 9728, num_hidden_layers=28 if small else 36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    tokenizer = _words(512)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return Qwen3ForCausalLM(config), tokenizer


def _flux2_klein(name: str, small: bool) -> DiffusionPipeline:
    transformer = Flux2Transformer2DModel(
        num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
    )
    return Flux2KleinPipeline(
        FlowMatchEulerDiscreteScheduler(), AutoencoderKLFlux2(), *_qwen3(small), transformer, is_distilled=False
    )


def _z_image(name: str, small: bool) -> DiffusionPipeline:
    encoder, tokenizer = _qwen3(small)
    return ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(), _vae_16(), encoder.model, tokenizer, ZImageTransformer2DModel()
    )


def _qwen_image(name: str, small: bool) -> DiffusionPipeline:
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    text = {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 64 if small else 18944,
        "num_hidden_layers": 2 if small else 28,
        "num_attention_heads": 28, "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    }  # fmt: skip
    vision = {
        "depth": 2 if small else 32,
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": 3420,
        "out_hidden_size": 3584,
    }
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text | ids, vision_config=vision))
    return QwenImagePipeline(
        FlowMatchEulerDiscreteScheduler(),
        AutoencoderKLQwenImage(),
        encoder,
        _words(1024),
        QwenImageTransformer2DModel(),
    )


def _flow_parts(second: str, small: bool) -> dict[str, Any]:
    """The text encoders and the autoencoder that Stable Diffusion 3.5 and FLUX.1 have in common."""
    folder = CONFIGS / "sdxl"
    return {
        "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")),
        "tokenizer": clip_tokenizer(folder / "tokenizer"),
        f"text_encoder_{second}": T5EncoderModel(
            T5Config(
                vocab_size=32128, d_model=4096, d_kv=64, d_ff=64 if small else 10240,
                num_layers=2 if small else 24, num_heads=64, feed_forward_proj="gated-gelu",
            )
        ),
        f"tokenizer_{second}": _words(512),
        "vae": _vae_16(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }  # fmt: skip


def _sd35_medium(name: str, small: bool) -> DiffusionPipeline:
    folder, parts = CONFIGS / "sdxl", _flow_parts("3", small)
    config = CLIPTextConfig.from_pretrained(folder / "text_encoder")
    config.projection_dim = 768
    parts["text_encoder"] = CLIPTextModelWithProjection(config)
    second = CLIPTextConfig.from_pretrained(folder / "text_encoder_2")
    return StableDiffusion3Pipeline(
        **parts,
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer_2=clip_tokenizer(folder / "tokenizer_2"),
        transformer=SD3Transformer2DModel(
            sample_size=128, num_layers=24, attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096,
            caption_projection_dim=1536, pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
        ),
    )  # fmt: skip


def _flux_dev(name: str, small: bool) -> DiffusionPipeline:
    return FluxPipeline(**_flow_parts("2", small), transformer=FluxTransformer2DModel(guidance_embeds=True))


ARCHITECTURES: dict[str, Callable[[str, bool], DiffusionPipeline]] = {
    **dict.fromkeys(("sd15", "sd21", "sdxl"), _stable_diffusion),
    "sd35-medium": _sd35_medium,
    "flux-dev": _flux_dev,
    "flux2-klein": _flux2_klein,
    "z-image": _z_image,
    "qwen-image": _qwen_image,
    "mini": _mini,
}


def random_pipeline(name: str, device: torch.device, dtype: torch.dtype, small_text: bool = False) -> DiffusionPipeline:
    """A pipeline of one of `ARCHITECTURES` ("sd21" is 2.1-base), made on `device`. Raises `ModelError` for another.

    Texts are cut into other pieces than the published vocabularies of T5 and Qwen would; their length is the architecture's.
    small_text: T5 and Qwen get few and narrow layers; what they give the network has the same shape and is as random.
    """
    if name not in ARCHITECTURES:
        raise ModelError(f"the architecture {name!r} is not known; there are {', '.join(ARCHITECTURES)}.")
    torch.manual_seed(0)
    with device, default_dtype(dtype):  # made in place, without a copy in float32
        return ARCHITECTURES[name](name, small_text).to(device, dtype)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _words(length: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )
