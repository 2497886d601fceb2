"""FLUX.1 against diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from typer.testing import CliRunner

from conftest import tiny_flux_pipeline, tiny_pipeline
from diffmorpher import FitConfig, Morpher, MorphPath, SampleConfig
from diffmorpher.cli.app import app
from diffmorpher.errors import ConfigError, LoraError, ModelError
from diffmorpher.files.loras import save_lora
from diffmorpher.method.interpolate import Between, noise_between
from diffmorpher.models.flux import Flux

STEPS, PROMPTS = 6, ["a red apple", "a house", "a cat"]
PICTURES = [np.random.default_rng(k).integers(0, 256, (32, 32, 3), dtype=np.uint8) for k in range(3)]
OWN_SAMPLER = SampleConfig(steps=STEPS, attention_lambda=0, adain=False, exact_ends=False)


def own(pipe: Any, prompt: str, noise: Tensor, guidance: float = 1.0) -> Tensor:
    """What diffusers makes of a noise at our levels, unpacked: (1, C, h, w)."""
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    height, width = noise.shape[-2:]
    packed = pipe._pack_latents(noise, 1, noise.shape[1], height, width)
    latents = pipe(
        prompt, latents=packed, sigmas=[1 - i / STEPS for i in range(STEPS)], num_inference_steps=STEPS,
        guidance_scale=guidance, output_type="latent", max_sequence_length=24, height=4 * height, width=4 * width,
    ).images  # fmt: skip
    x = latents.reshape(1, height // 2, width // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(1, -1, height, width)


@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_the_ends_are_what_diffusers_makes_of_the_same_noise(size: tuple[int, int], guidance: float) -> None:
    pipe = tiny_flux_pipeline()
    path = Morpher(pipe).prepare(PICTURES[:2], PROMPTS[:2], fit=None, steps=STEPS, size=size)
    config = SampleConfig(steps=STEPS, attention_lambda=0, adain=False, guidance_scale=guidance)
    got = path.sample([0, 1], config, output="latent")
    for k in range(2):
        want = own(pipe, PROMPTS[k], path.noises[k : k + 1], guidance)
        assert (got[k : k + 1] - want).abs().max() < 1e-4 * want.abs().max()


def test_a_lora_file_is_diffusers_own(tmp_path: Path) -> None:
    pipe = tiny_flux_pipeline()
    morpher = Morpher(pipe)
    lora = morpher.fit(PICTURES[0], PROMPTS[0], FitConfig(rank=2, steps=3, learning_rate=1e-2))
    file = save_lora(lora, tmp_path / "apple.safetensors")
    path = morpher.prepare(PICTURES[:2], PROMPTS[:2], loras=[file, file], steps=STEPS)
    got = path.sample([0], OWN_SAMPLER, output="latent")
    without = own(pipe, PROMPTS[0], path.noises[:1])
    pipe.load_lora_weights(str(file))
    want = own(pipe, PROMPTS[0], path.noises[:1])
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    assert (without - want).abs().max() > 1e-3
    with pytest.raises(LoraError, match="another model"):
        Morpher(tiny_pipeline()).prepare(PICTURES[:2], "x", loras=[file, file], steps=2)


def alone(path: MorphPath, position: float, mode: str, ends: list[list[dict[str, Tensor]]], window: float) -> Any:
    """One frame by itself in a plain loop of Euler's steps; the ends' inputs and outputs of every to_k and to_v stored."""
    at = Between.images([position], path.num_images)
    left, right, a = int(at.left), int(at.right), float(at.alpha)
    backbone, net = path.backbone, path.backbone.network
    z = noise_between(path.noises_at(STEPS), at)
    text = {n: (1 - a) * x[left : left + 1] + a * x[right : right + 1] for n, x in path.conditioning.tensors.items()}
    rows, stored = z.shape[-1] * z.shape[-2] // 4, []
    for i in range(STEPS):
        seen: dict[str, Tensor] = {}
        handles = []
        for name, module in net.named_modules():
            if name.endswith((".attn.to_k", ".attn.to_v")):

                def hook(
                    module: Any, args: Any, output: Tensor, name: str = name, i: int = i, seen: Any = seen
                ) -> Tensor:
                    seen[name] = args[0].clone() if mode == "features" else output.clone()
                    if 0 < a < 1 and i / STEPS < window:
                        mixed = (1 - a) * ends[left][i][name] + a * ends[right][i][name]
                        if mode == "features":
                            mixed = torch.nn.functional.linear(mixed, module.weight, module.bias)
                        output = output.clone()
                        output[:, -rows:] = mixed[:, -rows:]
                    return output

                handles.append(module.register_forward_hook(hook))
        with torch.no_grad():
            v = backbone.output(z, backbone.schedule(STEPS).levels[STEPS - i], type(path.conditioning)(text))
        for handle in handles:
            handle.remove()
        stored.append(seen)
        z = z + (-1 / STEPS) * v
    return z[0], stored


@pytest.mark.parametrize("mode", ["features", "kv"])
@pytest.mark.parametrize("images", [2, 3])
def test_the_batched_run_is_a_sequential_one(mode: Any, images: int) -> None:
    path = Morpher(tiny_flux_pipeline()).prepare(PICTURES[:images], PROMPTS[:images], fit=None, steps=STEPS)
    positions = [0.3, 0.5, images - 1.25]
    got = path.sample(positions, SampleConfig(steps=STEPS, attention_mode=mode, attention_lambda=0.6), output="latent")
    ends = [alone(path, float(k), mode, [], 0.6)[1] for k in range(images)]
    off = path.sample(positions, SampleConfig(steps=STEPS, attention_lambda=0), output="latent")
    for k, position in enumerate(positions):
        want = alone(path, position, mode, ends, 0.6)[0]
        assert (got[k] - want).abs().max() < 1e-4 * want.abs().max()
    assert (got - off).abs().max() > 1e-3


def test_films_through_the_command_line(tmp_path: Path) -> None:
    tiny_flux_pipeline().save_pretrained(tmp_path / "flux")
    files = [tmp_path / f"{k}.png" for k in range(2)]
    for file, picture in zip(files, PICTURES, strict=False):
        Image.fromarray(picture).save(file)
    arguments = ["morph", *map(str, files), "--model", str(tmp_path / "flux"), "-o", str(tmp_path / "x.mp4")]
    options = ["--frames", "5", "--steps", "3", "--lora-steps", "2", "--device", "cpu", "--size", "32x32"]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "x.mp4").stat().st_size > 0


def test_exact_ends_and_a_path_file(tmp_path: Path) -> None:
    morpher = Morpher(tiny_flux_pipeline())
    path = morpher.prepare(PICTURES, "a cat", fit=None, steps=3)
    path.save(tmp_path / "x.morph")
    loaded = MorphPath.load(tmp_path / "x.morph", morpher)
    config = SampleConfig(steps=3, exact_ends=True)
    got = path.sample([0, 0.5, 1.3, 2], config, "latent")
    assert torch.equal(got, loaded.sample([0, 0.5, 1.3, 2], config, "latent"))
    assert_close(got[[0, 3]], path.latents[[0, 2]], rtol=1e-4, atol=1e-4)


def test_outer_attention_is_refused_before_the_slow_part() -> None:
    seen: list[str] = []
    with pytest.raises(ConfigError, match='"outer" is for U-Nets'):
        Morpher(tiny_flux_pipeline())(
            PICTURES, "x", 5, sample=SampleConfig(attention_mode="outer"), progress=lambda stage, *_: seen.append(stage)
        )
    assert not seen


def test_what_cannot_be_used_is_named() -> None:
    pipe = tiny_flux_pipeline()
    pipe.text_encoder_2 = None
    with pytest.raises(ModelError, match="lacks text_encoder_2"):
        Morpher(pipe)
    schnell = tiny_flux_pipeline(guidance_embeds=False)
    schnell.transformer.register_to_config(num_layers=19)
    with pytest.raises(ModelError, match="schnell is distilled"):
        Morpher(schnell)


def test_the_published_architecture_has_19_and_38_blocks() -> None:
    backbone = Flux(tiny_flux_pipeline())
    with torch.device("meta"):
        backbone.network = FluxTransformer2DModel(guidance_embeds=True)
    assert sum(p.numel() for p in backbone.network.parameters()) == 11_901_408_320
    assert len(backbone.projections()) == 19 * 4 + 38 * 3
    assert len(backbone.attention_sites()) == (19 + 38) * 2
