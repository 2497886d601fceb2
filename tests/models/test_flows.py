"""Rectified flows, Stable Diffusion 3 and FLUX.1, against diffusers' own pipelines and plain loops."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, SD3Transformer2DModel
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close
from typer.testing import CliRunner

from conftest import tiny_flux_pipeline, tiny_pipeline, tiny_sd3_pipeline
from diffmorpher import FitConfig, Morpher, MorphPath, SampleConfig
from diffmorpher.cli.app import app
from diffmorpher.errors import ConfigError, LoraError, ModelError
from diffmorpher.evaluation.freemorph import freemorph
from diffmorpher.files.loras import save_lora
from diffmorpher.method.interpolate import Between, noise_between
from diffmorpher.method.invert import invert
from diffmorpher.models.flux import Flux
from diffmorpher.models.stable_diffusion_3 import StableDiffusion3

STEPS, PROMPTS = 6, ["a red apple", "a house", "a cat"]
PICTURES = [np.random.default_rng(k).integers(0, 256, (32, 32, 3), dtype=np.uint8) for k in range(3)]
OWN_SAMPLER = SampleConfig(steps=STEPS, attention_lambda=0, adain=False, exact_ends=False)
MAKERS: dict[str, Callable[..., Any]] = {"flux": tiny_flux_pipeline, "sd3": tiny_sd3_pipeline}
families = pytest.mark.parametrize("family", MAKERS)


def own(pipe: Any, prompt: str, noise: Tensor, guidance: float = 1.0) -> Tensor:
    """What diffusers' pipeline makes of a noise at our levels, unpacked: (1, C, h, w)."""
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    height, width = noise.shape[-2:]
    packs = hasattr(pipe, "_pack_latents")
    latents = pipe(
        prompt,
        latents=pipe._pack_latents(noise, 1, noise.shape[1], height, width) if packs else noise,
        sigmas=[1 - i / STEPS for i in range(STEPS)],
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        output_type="latent",
        max_sequence_length=24 if packs or pipe.tokenizer_3 else 256,
        height=4 * height,
        width=4 * width,
    ).images
    if not packs:
        return latents
    x = latents.reshape(1, height // 2, width // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(1, -1, height, width)


def near(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).abs().max() < 1e-4 * want.abs().max())


# ---- the model's own sampler


@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
@pytest.mark.parametrize("guidance", [1.0, 3.5])
@pytest.mark.parametrize("make", [tiny_flux_pipeline, tiny_sd3_pipeline, lambda: tiny_sd3_pipeline(t5=False)])
def test_the_ends_are_what_diffusers_makes_of_the_same_noise(make: Any, size: tuple[int, int], guidance: float) -> None:
    pipe = make()
    path = Morpher(pipe).prepare(PICTURES[:2], PROMPTS[:2], fit=None, steps=STEPS, size=size)
    config = SampleConfig(steps=STEPS, attention_lambda=0, adain=False, guidance_scale=guidance)
    got = path.sample([0, 1], config, output="latent")
    for k in range(2):
        assert near(got[k : k + 1], own(pipe, PROMPTS[k], path.noises[k : k + 1], guidance))


# ---- inversion


def smooth(pipe: Any) -> Any:
    """A random network is rougher than a trained one: its last layer is made smaller, so that steps can be called small."""
    pipe.transformer.proj_out.weight.data *= 0.2
    return pipe


@families
def test_uni_inversion_falls_as_the_square_of_the_step_and_the_plain_rule_as_the_step(family: str) -> None:
    path = Morpher(smooth(MAKERS[family]())).prepare(PICTURES[:2], PROMPTS[:2], fit=None, steps=2)
    backbone = path.backbone

    def lost(rule: Any, steps: int) -> float:
        schedule = backbone.schedule(steps)
        with torch.no_grad():
            z = invert(backbone, path.latents, path.conditioning, steps, rule=rule)[-1]
            for level in range(steps, 0, -1):
                z = schedule.down(backbone.predict(z, schedule.levels[level], path.conditioning), level)
        return float((z - path.latents).square().mean().sqrt())

    uni, plain = ([lost(rule, steps) for steps in (10, 20, 40)] for rule in ("uni", "plain"))
    assert uni[0] / uni[2] > 10 and 3 < plain[0] / plain[2] < 6  # 16 and 4
    assert uni[1] < plain[1] / 3


@families
def test_exact_ends_give_the_pictures_back_and_a_path_file_the_path(family: str, tmp_path: Path) -> None:
    morpher = Morpher(MAKERS[family]())
    path = morpher.prepare(PICTURES, PROMPTS, fit=FitConfig(rank=2, steps=2), steps=3)
    path.save(tmp_path / "x.morph")
    loaded = MorphPath.load(tmp_path / "x.morph", morpher)
    config = SampleConfig(steps=3, exact_ends=True)
    got = path.sample([0, 0.5, 1.3, 2], config, "latent")
    assert torch.equal(got, loaded.sample([0, 0.5, 1.3, 2], config, "latent"))
    assert_close(got[[0, 3]], path.latents[[0, 2]], rtol=1e-4, atol=1e-4)
    assert (path.sample([0, 2], SampleConfig(steps=3), "latent") - path.latents[[0, 2]]).abs().max() > 1e-3


# ---- the batched run


def alone(path: MorphPath, position: float, mode: str, ends: list[list[dict[str, Tensor]]], window: float) -> Any:
    """One frame by itself, in a plain loop of Euler's steps: its LoRA merged into the weights, what every image projection to
    keys and values is given (or gives) stored, and between images replaced by what the ends stored.
    """
    at = Between.images([position], path.num_images)
    left, right, a = int(at.left), int(at.right), float(at.alpha)
    net = copy.deepcopy(path.backbone.network)
    for name in path.bank.down if path.bank else ():
        down, up = ((1 - a) * x[left] + a * x[right] for x in (path.bank.down[name], path.bank.up[name]))  # type: ignore[union-attr]
        net.get_submodule(name).weight.data += up @ down
    backbone = copy.copy(path.backbone)
    backbone.network = net
    z = noise_between(path.noises_at(STEPS), at)
    text = {n: (1 - a) * x[left : left + 1] + a * x[right : right + 1] for n, x in path.conditioning.tensors.items()}
    rows, stored = z.shape[-1] * z.shape[-2] // 4, []
    for i in range(STEPS):
        seen: dict[str, Tensor] = {}

        def hook(module: nn.Linear, args: Any, output: Tensor, name: str, i: int, seen: dict[str, Tensor]) -> Tensor:
            seen[name] = args[0].clone() if mode == "features" else output.clone()
            if not 0 < a < 1 or i / STEPS >= window:
                return output
            mixed = (1 - a) * ends[left][i][name] + a * ends[right][i][name]
            if mode == "features":
                mixed = nn.functional.linear(mixed, module.weight, module.bias)
            return torch.cat([output[:, :-rows], mixed[:, -rows:]], dim=1)

        handles = [
            module.register_forward_hook(lambda m, x, y, n=name, i=i, s=seen: hook(m, x, y, n, i, s))
            for name, module in net.named_modules()
            if name.endswith((".attn.to_k", ".attn.to_v", ".attn2.to_k", ".attn2.to_v"))
        ]
        with torch.no_grad():
            v = backbone.output(z, backbone.schedule(STEPS).levels[STEPS - i], type(path.conditioning)(text))
        for handle in handles:
            handle.remove()
        stored.append(seen)
        z = z - v / STEPS
    return z[0], stored


@families
@pytest.mark.parametrize("mode", ["features", "kv"])
@pytest.mark.parametrize("images", [2, 3])
def test_the_batched_run_is_a_sequential_one(family: str, mode: Any, images: int) -> None:
    fit = FitConfig(rank=2, steps=3, learning_rate=2e-2)
    path = Morpher(MAKERS[family]()).prepare(PICTURES[:images], PROMPTS[:images], fit=fit, steps=STEPS)
    positions = [0.3, 0.5, images - 1.25]
    config = SampleConfig(steps=STEPS, attention_mode=mode, attention_lambda=0.6, batch_size=2)
    got = path.sample(positions, config, output="latent")
    ends = [alone(path, float(k), mode, [], 0.6)[1] for k in range(images)]
    for k, position in enumerate(positions):
        assert near(got[k], alone(path, position, mode, ends, 0.6)[0])
    assert not near(got, path.sample(positions, SampleConfig(steps=STEPS, attention_lambda=0), output="latent"))


# ---- files, the command line, what cannot be


@families
def test_a_lora_file_is_diffusers_own(family: str, tmp_path: Path) -> None:
    """What we write, the pipeline loads; its output with it is ours. On another family it is another model's."""
    pipe = MAKERS[family]()
    morpher = Morpher(pipe)
    lora = morpher.fit(PICTURES[0], PROMPTS[0], FitConfig(rank=2, steps=3, learning_rate=1e-2))
    file = save_lora(lora, tmp_path / "apple.safetensors")
    path = morpher.prepare(PICTURES[:2], PROMPTS[:2], loras=[file, file], steps=STEPS)
    got = path.sample([0], OWN_SAMPLER, output="latent")
    without = own(pipe, PROMPTS[0], path.noises[:1])
    pipe.load_lora_weights(str(file))
    want = own(pipe, PROMPTS[0], path.noises[:1])
    assert near(got, want) and not near(without, want)
    other = MAKERS["sd3" if family == "flux" else "flux"]
    for make in (tiny_pipeline, other):
        with pytest.raises(LoraError, match="another model"):
            Morpher(make()).prepare(PICTURES[:2], "x", loras=[file, file], steps=2)


@families
def test_films_through_the_command_line(family: str, tmp_path: Path) -> None:
    MAKERS[family]().save_pretrained(tmp_path / "model")
    files = [tmp_path / f"{k}.png" for k in range(3)]
    for file, picture in zip(files, PICTURES, strict=True):
        Image.fromarray(picture).save(file)
    arguments = ["morph", *map(str, files), "--model", str(tmp_path / "model"), "-o", str(tmp_path / "x.mp4")]
    options = ["--frames", "6", "--steps", "3", "--lora-steps", "2", "--device", "cpu", "--size", "32x32"]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "x.mp4").stat().st_size > 0


@families
@pytest.mark.parametrize("stage", ["fit", "invert", "sample"])
def test_the_pipeline_comes_back_unchanged_after_an_interruption(family: str, stage: str) -> None:
    pipe = MAKERS[family]()
    pipe.transformer.train()
    before = {n: p.clone() for n, p in pipe.transformer.state_dict().items()}

    def stop(at: str, done: int, total: int) -> None:
        if at == stage and done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Morpher(pipe)(PICTURES[:2], "x", 4, fit=FitConfig(rank=2, steps=3), sample=OWN_SAMPLER, progress=stop)
    assert all(torch.equal(before[n], p) for n, p in pipe.transformer.state_dict().items())
    assert pipe.transformer.training and all(p.requires_grad for p in pipe.transformer.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.transformer.modules())


@families
def test_what_only_u_nets_have_is_refused_before_the_slow_part(family: str) -> None:
    seen: list[str] = []
    outer = SampleConfig(attention_mode="outer")
    morpher = Morpher(MAKERS[family]())
    with pytest.raises(ConfigError, match='"outer" is for U-Nets'):
        morpher(PICTURES, "x", 5, sample=outer, progress=lambda stage, *_: seen.append(stage))
    with pytest.raises(ConfigError, match="FreeMorph is for U-Nets"):
        freemorph(morpher.backbone, [Image.fromarray(p) for p in PICTURES[:2]], ["a", "b"], 5, 0, 2)
    assert not seen


def test_what_cannot_be_used_is_named() -> None:
    for make in MAKERS.values():
        pipe = make()
        pipe.text_encoder_2 = None
        with pytest.raises(ModelError, match="lacks text_encoder_2"):
            Morpher(pipe)
    schnell = tiny_flux_pipeline(guidance_embeds=False)
    schnell.transformer.register_to_config(num_layers=19)
    with pytest.raises(ModelError, match="schnell is distilled"):
        Morpher(schnell)
    fill = tiny_flux_pipeline()
    fill.transformer.register_to_config(in_channels=96)
    with pytest.raises(ModelError, match=r"fill, depth and canny models cannot be used, take FLUX\.1-dev"):
        Morpher(fill)
    with pytest.raises(ModelError, match="distilled"):
        StableDiffusion3(tiny_sd3_pipeline(), "stabilityai/stable-diffusion-3.5-large-turbo")
    unknown = tiny_flux_pipeline()
    unknown.transformer = nn.Linear(1, 1)
    with pytest.raises(ModelError, match=r"not supported; there are Stable Diffusion 1\.x or 2\.x, .*FLUX\.1"):
        Morpher(unknown)


# ---- the published architectures, on the meta device


def test_flux_has_19_joint_and_38_single_blocks() -> None:
    backbone = Flux(tiny_flux_pipeline())
    with torch.device("meta"):
        backbone.network = FluxTransformer2DModel(guidance_embeds=True)
    assert sum(p.numel() for p in backbone.network.parameters()) == 11_901_408_320
    assert len(backbone.projections()) == 19 * 4 + 38 * 3
    assert [site.rows for site in backbone.attention_sites()] == ["all"] * 38 + ["last"] * 76


def test_stable_diffusion_35_medium_has_24_blocks_13_of_which_attend_to_the_image_twice() -> None:
    backbone = StableDiffusion3(tiny_sd3_pipeline())
    with torch.device("meta"):
        backbone.network = SD3Transformer2DModel(
            sample_size=128, num_layers=24, attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096,
            caption_projection_dim=1536, pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
        )  # fmt: skip
    assert len(backbone.projections()) == (24 + 13) * 4
    assert len(backbone.attention_sites()) == (24 + 13) * 2
