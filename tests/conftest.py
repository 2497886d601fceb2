"""Real models at tiny size, shared by the tests."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["DIFFMORPHER_CACHE_GB"] = "0"  # films are made, not found; tests of the cache ask for one
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait do not take the other test process's core

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    EulerDiscreteScheduler,
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
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

import diffmorpher
from diffmorpher import Morpher

torch.set_num_threads(1)  # for tiny models a second thread only waits; see `mini`
BESIDE_OTHERS = "PYTEST_XDIST_WORKER" in os.environ
if BESIDE_OTHERS:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start

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


def second_tokenizer() -> CLIPTokenizer:
    """As the second of Stable Diffusion XL and 3, which pads with "!" where the first pads with its end."""
    return CLIPTokenizer.from_pretrained(ASSETS / "mini" / "tokenizer", pad_token="!")


def clip_with_projection(base: StableDiffusionPipeline, **changes: Any) -> CLIPTextModelWithProjection:
    """Another random CLIP, of the base's vocabulary."""
    return CLIPTextModelWithProjection(CLIPTextConfig(**base.text_encoder.config.to_dict() | changes)).eval()


#: The second CLIP is wider and deeper than the first, and has another activation, so that one in the other's place is seen.
SECOND_CLIP = {"hidden_size": 40, "num_hidden_layers": 3, "projection_dim": 24, "hidden_act": "gelu"}


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
        cross_attention_dim=32 + 40,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )
    second = clip_with_projection(base, **SECOND_CLIP)
    scheduler = EulerDiscreteScheduler.from_config(  # the published one, with what it has for schedulers of other classes
        {
            "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "epsilon",
            "timestep_spacing": "leading", "steps_offset": 1, "num_train_timesteps": 1000, "trained_betas": None,
            "interpolation_type": "linear", "use_karras_sigmas": False,
            "clip_sample": False, "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True,
        }
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        base.vae, base.text_encoder, second, base.tokenizer, second_tokenizer(), base.unet, scheduler,
        add_watermarker=False,
    )  # fmt: skip


def tiny_t5(width: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    """A T5 encoder with random weights, and a tokenizer of its kind that knows a few words, and others by their letters.

    It is written, not trained: the trainer's vocabulary is another in every run.
    """
    words = ["\u2581a", "\u2581red", "\u2581apple", "\u2581house", "\u2581cat", "\u2581and", "\u2581dog"]
    pieces = [(piece, -2.0) for piece in words] + [(letter, -8.0) for letter in "\u2581abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5Tokenizer([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces], extra_ids=0, model_max_length=24)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval(), tokenizer


def tiny_flux_pipeline(seed: int = 0, guidance_embeds: bool = True) -> FluxPipeline:
    """A pipeline of FLUX.1's layout with random weights: 32 x 32 pixels, 4 x 8 x 8 latents, 16 image rows."""
    base = tiny_pipeline(seed=seed, shift_factor=0.1)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=32, guidance_embeds=guidance_embeds, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    t5, t5_tokenizer = tiny_t5(24)
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    pipe = FluxPipeline(scheduler, base.vae, base.text_encoder, base.tokenizer, t5, t5_tokenizer, transformer)
    pipe.default_sample_size = 8  # the class says 128
    return pipe


def tiny_qwen3(hidden_size: int, layers: int) -> tuple[Qwen3ForCausalLM, Qwen2TokenizerFast]:
    """A Qwen3 with random weights, and a tokenizer of its kind trained on a few words, whose chats have Qwen3's form."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=marks, initial_alphabet=letters, show_progress=False)
    words.train_from_iterator(["user assistant", "a red apple", "a house", "a cat and a dog"], trainer)
    learnt = json.loads(words.to_str())["model"]
    tokenizer = Qwen2TokenizerFast(
        vocab=learnt["vocab"],
        merges=[tuple(pair) for pair in learnt["merges"]],
        model_max_length=24,
        additional_special_tokens=marks[1:],
        chat_template="{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}",
    )
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=16, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4, initializer_range=0.2,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval(), tokenizer


def tiny_flux2_pipeline(seed: int = 0, is_distilled: bool = False) -> Flux2KleinPipeline:
    """A pipeline of FLUX.2 Klein's layout with random weights: 32 x 32 pixels, 16 x 4 x 4 latents, 16 image rows."""
    torch.manual_seed(seed)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    ).eval()  # fmt: skip
    for name, layer in transformer.named_children():
        if name.endswith(("_modulation", "_modulation_img", "_modulation_txt")):
            layer.linear.weight.data *= 7  # else the blocks add next to nothing, and tests would not see what they do
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 16, 16), latent_channels=4, norm_num_groups=8, layers_per_block=1, sample_size=32,
    ).eval()  # fmt: skip
    vae.bn.running_mean.normal_(0, 0.3)
    vae.bn.running_var.uniform_(0.1, 2)
    encoder, tokenizer = tiny_qwen3(hidden_size=8, layers=28)  # of which the 9th, 18th and 27th are read
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = Flux2KleinPipeline(scheduler, vae, encoder, tokenizer, transformer, is_distilled)
    pipe.default_sample_size = 8  # the class says 128
    return pipe


def tiny_sd3_pipeline(seed: int = 0, t5: bool = True) -> StableDiffusion3Pipeline:
    """A pipeline of Stable Diffusion 3.5-medium's layout with random weights: one block of two attends to the image twice."""
    base = tiny_pipeline(seed=seed, shift_factor=0.1)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=80, caption_projection_dim=32, pooled_projection_dim=16 + 24, out_channels=4,
        pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
    ).eval()  # fmt: skip
    first, second = clip_with_projection(base, projection_dim=16), clip_with_projection(base, **SECOND_CLIP)
    third, third_tokenizer = tiny_t5(80) if t5 else (None, None)  # wider than both others together, as it is
    return StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), base.vae, first, base.tokenizer,
        second, second_tokenizer(), third, third_tokenizer,
    )  # fmt: skip


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Qwen's tokenizer of a small vocabulary, with the part of Qwen3's chat template that a prompt goes through."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    learner.train_from_iterator(
        ["user", "assistant", "think", "a red apple", "a house", "a cat"],
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    learnt = json.loads(learner.to_str())["model"]
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    return Qwen2Tokenizer(
        learnt["vocab"], [tuple(merge) for merge in learnt["merges"]], chat_template=template,
        additional_special_tokens=special[1:], model_max_length=512,
    )  # fmt: skip


def tiny_z_image_pipeline(seed: int = 0) -> ZImagePipeline:
    """A pipeline of Z-Image's layout with random weights: 16 image rows for 32 x 32 pixels, padded to 32."""
    base, tokenizer = tiny_pipeline(seed=seed, shift_factor=0.1), qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=24,
        axes_dims=[4, 6, 6], axes_lens=[640, 16, 16],
    ).eval()  # fmt: skip
    for padding in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(padding)  # the class has zeros
    qwen = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, initializer_range=1.0,  # as large as a trained one's
        )
    ).eval()  # fmt: skip
    return ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=6.0), base.vae, qwen, tokenizer, transformer)


def tiny_qwen_pipeline(seed: int = 0) -> QwenImagePipeline:
    """A pipeline of Qwen-Image's layout with random weights: 32 x 32 pixels, 4 x 8 x 8 latents, 16 image rows.

    Its tokenizer knows the words of the pipeline's own template, so that this is as long as in the real one.
    """
    torch.manual_seed(seed)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[-0.3, 0.1, 0.2, 0.4], latents_std=[0.5, 1.5, 0.8, 1.2],
    ).eval()  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2, "intermediate_size": 48}
    rope = {"rope_type": "default", "mrope_section": [1, 2, 3], "rope_theta": 1e6}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    text = {"vocab_size": 512, "hidden_size": 24, "rope_parameters": rope, **heads, **ids}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 24}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192,
        shift_terminal=0.02,
    )  # fmt: skip
    encoder = Qwen2_5_VLForConditionalGeneration(config).eval()
    pipe = QwenImagePipeline(scheduler, vae, encoder, Qwen2Tokenizer(), transformer)
    pipe.default_sample_size = 8  # the class says 128
    pipe.tokenizer = trained_tokenizer([pipe.prompt_template_encode, "a red apple", "a house", "a cat"])
    return pipe


def trained_tokenizer(texts: list[str]) -> Qwen2Tokenizer:
    """Qwen's tokenizer with a vocabulary in which every word of the texts is one token."""
    special = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    model = Qwen2Tokenizer(**special).backend_tokenizer
    model.model = models.BPE()
    trainer = trainers.BpeTrainer(
        vocab_size=480, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    vocab = json.loads(model.to_str())["model"]
    ids = {"<|endoftext|>": 0}
    ids |= {token: len(ids) + i for i, token in enumerate(sorted(vocab["vocab"], key=vocab["vocab"].get))}
    return Qwen2Tokenizer(ids, [tuple(merge) for merge in vocab["merges"]], **special)


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
    """The bundled model, on two threads where this is the only test process."""
    torch.set_num_threads(1 if BESIDE_OTHERS else 2)
    yield loaded_mini
    torch.set_num_threads(1)
