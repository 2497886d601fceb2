"""Stable Diffusion 3 against diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from torch.testing import assert_close
from transformers import T5Config, T5EncoderModel

from conftest import tiny_pipeline, tiny_xl_pipeline
from diffmorpher import FitConfig, Morpher, SampleConfig
from diffmorpher.errors import ModelError
from diffmorpher.files.loras import save_lora
from diffmorpher.models.stable_diffusion_3 import StableDiffusion3

STEPS, PROMPTS = 6, ["a red apple", "a house", "a cat"]
PICTURES = [np.random.default_rng(k).integers(0, 256, (32, 32, 3), dtype=np.uint8) for k in range(3)]


def tiny_sd3_pipeline(t5: bool = True) -> StableDiffusion3Pipeline:
    """A pipeline of Stable Diffusion 3.5-medium's layout with random weights: one block of two attends to the image twice."""
    xl, base = tiny_xl_pipeline(), tiny_pipeline(shift_factor=0.1)
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


def own(pipe: Any, prompt: str, noise: Tensor, guidance: float = 1.0) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return pipe(
        prompt, latents=noise, sigmas=[1 - i / STEPS for i in range(STEPS)], num_inference_steps=STEPS,
        guidance_scale=guidance, output_type="latent", max_sequence_length=24 if pipe.tokenizer_3 else 256,
        height=4 * noise.shape[-2], width=4 * noise.shape[-1],
    ).images  # fmt: skip


@pytest.mark.parametrize("t5", [True, False])
@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_ends_are_what_diffusers_makes_of_the_same_noise(t5: bool, size: tuple[int, int], guidance: float) -> None:
    pipe = tiny_sd3_pipeline(t5)
    path = Morpher(pipe).prepare(PICTURES[:2], PROMPTS[:2], fit=None, steps=STEPS, size=size)
    config = SampleConfig(steps=STEPS, attention_lambda=0, adain=False, guidance_scale=guidance)
    got = path.sample([0, 1], config, output="latent")
    for k in range(2):
        want = own(pipe, PROMPTS[k], path.noises[k : k + 1], guidance)
        assert (got[k : k + 1] - want).abs().max() < 1e-4 * want.abs().max()


def test_a_lora_file_is_diffusers_own(tmp_path: Path) -> None:
    pipe = tiny_sd3_pipeline()
    morpher = Morpher(pipe)
    lora = morpher.fit(PICTURES[0], PROMPTS[0], FitConfig(rank=2, steps=3, learning_rate=1e-2))
    file = save_lora(lora, tmp_path / "apple.safetensors")
    path = morpher.prepare(PICTURES[:2], PROMPTS[:2], loras=[file, file], steps=STEPS)
    got = path.sample([0], SampleConfig(steps=STEPS, attention_lambda=0, adain=False), output="latent")
    without = own(pipe, PROMPTS[0], path.noises[:1])
    pipe.load_lora_weights(str(file))
    want = own(pipe, PROMPTS[0], path.noises[:1])
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    assert (without - want).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["features", "kv"])
def test_frames_do_not_depend_on_the_batch_and_exact_ends_are_the_pictures(mode: Any, tmp_path: Path) -> None:
    morpher = Morpher(tiny_sd3_pipeline())
    path = morpher.prepare(PICTURES, PROMPTS, fit=FitConfig(rank=2, steps=2), steps=STEPS)
    positions = [0, 0.3, 0.6, 1.2, 2]
    one, all_ = (SampleConfig(steps=STEPS, attention_mode=mode, exact_ends=True, batch_size=b) for b in (1, 8))
    got = path.sample(positions, one, "latent")
    assert_close(got, path.sample(positions, all_, "latent"), rtol=1e-4, atol=1e-4)
    assert_close(got[[0, 4]], path.latents[[0, 2]], rtol=1e-4, atol=1e-4)
    path.save(tmp_path / "x.morph")
    loaded = type(path).load(tmp_path / "x.morph", morpher)
    assert torch.equal(got, loaded.sample(positions, one, "latent"))


def test_sites_projections_and_what_cannot_be_used() -> None:
    backbone = StableDiffusion3(tiny_sd3_pipeline())
    assert len(backbone.attention_sites()) == (3 + 1) * 2  # attention of three blocks, the second attention of one
    assert len(backbone.projections()) == (3 + 1) * 4
    with pytest.raises(ModelError, match="distilled"):
        StableDiffusion3(tiny_sd3_pipeline(), "stabilityai/stable-diffusion-3.5-large-turbo")
    lacking = tiny_sd3_pipeline()
    lacking.text_encoder_2 = None
    with pytest.raises(ModelError, match="lacks text_encoder_2"):
        Morpher(lacking)
