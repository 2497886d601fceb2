"""Rectified flows of all five families against diffusers' own pipelines and plain loops."""

from __future__ import annotations

import copy
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinInpaintPipeline,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close
from typer.testing import CliRunner

from conftest import (
    tiny_flux2_pipeline,
    tiny_flux_pipeline,
    tiny_pipeline,
    tiny_qwen_pipeline,
    tiny_sd3_pipeline,
    tiny_z_image_pipeline,
)
from diffmorpher import FitConfig, Morpher, MorphPath, Recipe, SampleConfig
from diffmorpher.cli.app import app
from diffmorpher.errors import ConfigError, ModelError
from diffmorpher.evaluation.freemorph import freemorph
from diffmorpher.files.loras import save_lora
from diffmorpher.method.interpolate import Between, noise_between
from diffmorpher.method.invert import invert
from diffmorpher.models.catalog import FLOW, ModelSpec
from diffmorpher.models.flux import Flux
from diffmorpher.models.flux2 import Flux2
from diffmorpher.models.loading import as_backbone, load_pipeline
from diffmorpher.models.qwen_image import QwenImage
from diffmorpher.models.stable_diffusion_3 import StableDiffusion3
from diffmorpher.models.z_image import ZImage

STEPS, PROMPTS = 6, ["a red apple", "a house", "a cat"]
LONG = "a red house with a cat beside it and an apple on its roof"  # in Z-Image more than 32 tokens
PICTURES = [np.random.default_rng(k).integers(0, 256, (32, 32, 3), dtype=np.uint8) for k in range(3)]
OWN_SAMPLER = SampleConfig(steps=STEPS, attention_lambda=0, adain=False, exact_ends=False)
MAKERS: dict[str, Callable[..., Any]] = {
    "flux": tiny_flux_pipeline,
    "flux2": tiny_flux2_pipeline,
    "sd3": tiny_sd3_pipeline,
    "z-image": tiny_z_image_pipeline,
    "qwen": tiny_qwen_pipeline,
}
families = pytest.mark.parametrize("family", MAKERS)
Z_IMAGE_SIZE = ZImage.native_size


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Z-Image's own size stands in no pipeline, so that a tiny one cannot say a smaller."""
    monkeypatch.setattr(ZImage, "native_size", (32, 32))


def own(pipe: Any, prompt: str, noise: Tensor, guidance: float = 1.0, told: Any = None) -> Tensor:
    """What diffusers' pipeline makes of a noise at our levels, unpacked: (1, C, h, w)."""
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    height, width = noise.shape[-2:]
    klein = isinstance(pipe, Flux2KleinPipeline)  # packs by itself
    packs = hasattr(pipe, "_pack_latents") and not klein
    called = {
        "latents": pipe._pack_latents(noise, 1, noise.shape[1], height, width) if packs else noise,
        "sigmas": [1 - i / STEPS for i in range(STEPS)],
        "num_inference_steps": STEPS,
        "output_type": "latent",
        "height": (8 if klein else 4) * height,
        "width": (8 if klein else 4) * width,
        **(told or words(pipe, prompt, guidance)),
    }
    latents = pipe(**called).images
    if klein:
        return patches(pipe, latents)
    if not packs:
        return latents
    x = latents.reshape(1, height // 2, width // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(1, -1, height, width)


def words(pipe: Any, prompt: str, guidance: float) -> dict[str, Any]:
    """What the pipeline is called with of the text. Qwen-Image's is padded to the longest, all rows of it being text."""
    if not isinstance(pipe.transformer, QwenImageTransformer2DModel):
        z_image = isinstance(pipe, ZImagePipeline)  # guidance comes on top of the prompt's own share
        limit = 24 if getattr(pipe, "tokenizer_3", pipe) and not z_image else 256
        return {"prompt": prompt, "guidance_scale": guidance - z_image, "max_sequence_length": limit}
    text, empty = (pipe.encode_prompt(each)[0] for each in (prompt, ""))
    length = pipe.encode_prompt(PROMPTS[0])[0].shape[1]
    padded = [torch.cat([x, torch.zeros(1, length - x.shape[1], x.shape[2])], 1) for x in (text, empty)]
    return {"prompt_embeds": padded[0], "negative_prompt_embeds": padded[1], "true_cfg_scale": guidance}


def patches(pipe: Flux2KleinPipeline, latents: Tensor) -> Tensor:
    """What FLUX.2's VAE says, (B, C, 2h, 2w), as its network knows it, (B, 4C, h, w)."""
    norm = pipe.vae.bn
    mean, variance = norm.running_mean.reshape(1, -1, 1, 1), norm.running_var.reshape(1, -1, 1, 1)
    return (pipe._patchify_latents(latents) - mean) / (variance + norm.eps).sqrt()


def near(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).abs().max() < 1e-4 * want.abs().max())


# ---- the model's own sampler


@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
@pytest.mark.parametrize("guidance", [1.0, 3.5])
@pytest.mark.parametrize("make", [*MAKERS.values(), lambda: tiny_sd3_pipeline(t5=False)])
def test_the_ends_are_what_diffusers_makes_of_the_same_noise(make: Any, size: tuple[int, int], guidance: float) -> None:
    pipe = make()
    path = Morpher(pipe).prepare(PICTURES[:2], PROMPTS[:2], fit=None, steps=STEPS, size=size)
    config = SampleConfig(steps=STEPS, attention_lambda=0, adain=False, guidance_scale=guidance)
    got = path.sample([0, 1], config, output="latent")
    for k in range(2):
        assert near(got[k : k + 1], own(pipe, PROMPTS[k], path.noises[k : k + 1], guidance))


def test_z_image_captions_of_unlike_length_are_padded_alike_and_as_the_network_pads() -> None:
    pipe = tiny_z_image_pipeline()
    path = Morpher(pipe).prepare(PICTURES[:2], [PROMPTS[0], LONG], fit=None, steps=STEPS)
    a, b = (len(x) for x in pipe.encode_prompt([PROMPTS[0], LONG], do_classifier_free_guidance=False)[0])
    assert a < 32 < b and path.conditioning.length == 64 == path.backbone.unconditional(64).length
    assert near(path.sample([1], OWN_SAMPLER, "latent"), own(pipe, LONG, path.noises[1:]))
    seen: list[Tensor] = []
    refiner = pipe.transformer.context_refiner[0]
    handle = refiner.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    rows = path.conditioning.lerp(torch.tensor([0, 0, 0]), torch.tensor([1, 1, 1]), torch.tensor([0, 1, 0.5]))
    with torch.no_grad():
        path.backbone.output(path.noises[[0, 1, 0]], path.backbone.schedule(2).levels[1], rows)
    handle.remove()
    (short, long, between), padding = seen[0], pipe.transformer.cap_pad_token.data
    assert all(torch.equal(x, padding.expand_as(x)) for x in (short[a:], long[b:], between[b:]))
    assert_close(between[a:b], (padding + long[a:b]) / 2, rtol=0, atol=1e-4)  # an RMS norm's eps
    with pytest.warns(UserWarning, match="the model reads the first 512"):
        assert path.backbone.encode_prompts([LONG * 20]).length == 512


def test_qwen_is_told_what_its_pipeline_tells_it_of_prompts_of_one_length() -> None:
    pipe, prompts = tiny_qwen_pipeline(), ["a house", "a cat"]
    path = Morpher(pipe).prepare(PICTURES[:2], prompts, fit=None, steps=STEPS)
    got = path.sample([0, 1], OWN_SAMPLER, output="latent")
    for k in range(2):
        assert near(got[k], own(pipe, prompts[k], path.noises[k : k + 1], told={"prompt": prompts[k]})[0])


def test_qwen_s_prompts_end_in_zeros_and_a_long_one_is_cut_with_a_warning() -> None:
    backbone = QwenImage(tiny_qwen_pipeline())
    with torch.no_grad():
        text = backbone.encode_prompts(PROMPTS)["text"]
        alone = backbone.encode_prompts(PROMPTS[1:2])["text"]
        assert text.shape[1] == 8 and alone.shape[1] == 7
        assert_close(text[1:2, :7], alone)
        assert torch.equal(text[1:, 7:], torch.zeros(2, 1, 24))
        assert torch.equal(backbone.unconditional(8)["text"][:, 5:], torch.zeros(1, 3, 24))
        with pytest.warns(UserWarning, match="has 600 tokens; the model reads the first 512"):
            assert backbone.encode_prompts([" house" * 600])["text"].shape == (1, 512, 24)


@pytest.mark.parametrize("low_memory", [False, True])
def test_qwen_s_pictures_are_films_of_one_frame(low_memory: bool) -> None:
    pipe = tiny_qwen_pipeline()
    backbone = QwenImage(pipe, low_memory=low_memory)
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean, std = backbone.encode(pixels)
        draw = torch.Generator().manual_seed(1)
        want = QwenImageImg2ImgPipeline(**pipe.components)._encode_vae_image(pixels[:, :, None], draw)[:, :, 0]
        assert_close(
            mean + std * torch.randn(2, 4, 1, 8, 12, generator=torch.Generator().manual_seed(1))[:, :, 0], want
        )
        shown = {"output_type": "pt", "num_inference_steps": 1, "sigmas": [1e-9], "height": 32, "width": 48}
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        pipe.set_progress_bar_config(disable=True)
        packed = pipe._pack_latents(mean[:1], 1, 4, 8, 12)
        assert_close(backbone.decode(mean[:1]), pipe("a", latents=packed, **shown).images * 2 - 1, rtol=1e-4, atol=1e-4)


def test_a_model_with_a_film_s_vae_is_loaded_for_a_gpu(tmp_path: Path) -> None:
    """Weights of five dimensions cannot lie in channels_last; the device here holds shapes alone."""
    tiny_qwen_pipeline().save_pretrained(tmp_path / "model")
    pipe, _ = load_pipeline(str(tmp_path / "model"), torch.device("meta"), torch.float32)
    assert pipe.vae.device.type == "meta"


@pytest.mark.parametrize("low_memory", [False, True])
def test_the_latents_of_flux2_are_what_diffusers_makes_of_pictures(low_memory: bool) -> None:
    pipe = tiny_flux2_pipeline()
    backbone = Flux2(pipe, low_memory=low_memory)
    pixels = torch.rand(3, 3, 48, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean, std = backbone.encode(pixels)
        posterior = pipe.vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
        assert near(mean, pipe._encode_vae_image(pixels, None))  # type: ignore[arg-type]
        drawn = mean + std * torch.nn.functional.pixel_unshuffle(noise, 2)
        assert near(drawn, patches(pipe, posterior.mean + posterior.std * noise))
        assert near(backbone.decode(mean), pipe.vae.decode(posterior.mean).sample.clamp(-1, 1))


def test_flux2_is_told_of_a_long_prompt_what_diffusers_tells_it_and_the_user_that_it_is_cut() -> None:
    pipe, prompts = tiny_flux2_pipeline(), ["a cat and a dog " * 5, "a cat"]
    with torch.no_grad(), pytest.warns(UserWarning, match="reads the first 24 of them"):
        got = Flux2(pipe).encode_prompts(prompts)["text"]
        assert near(got, pipe.encode_prompt(prompts, max_sequence_length=24)[0])


@pytest.mark.parametrize("make", [tiny_flux_pipeline, tiny_sd3_pipeline, lambda: tiny_sd3_pipeline(t5=False)])
def test_a_prompt_that_is_too_long_is_cut_with_one_sentence(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    diffusers_log = logging.getLogger("diffusers")
    diffusers_log.addHandler(caplog.handler)
    try:
        with torch.no_grad(), pytest.warns(UserWarning) as caught:
            told = Morpher(make()).backbone.encode_prompts([" ".join(["apple"] * 40), "a cat"])
    finally:
        diffusers_log.removeHandler(caplog.handler)
    said = r"the prompt 'apple apple .* tokens; the model reads the first 24 of them\."
    assert len(caught) == 1 and re.match(said, str(caught[0].message)) and not caplog.records
    assert len(told["text"]) == 2


@pytest.mark.parametrize("t5", [True, False])
def test_stable_diffusion_3s_prompts_are_encoded_as_the_pipeline_does(t5: bool) -> None:
    pipe = tiny_sd3_pipeline(t5=t5)
    prompts = ["a red apple", " ".join(["apple"] * 40), ""]
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        got = StableDiffusion3(pipe).encode_prompts(prompts)
        text, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, "cpu", 1, False, max_sequence_length=24 if t5 else 256
        )
    assert_close(got["text"], text)
    assert_close(got["pooled"], pooled)


# ---- the fit's levels and its target


@families
def test_the_target_as_the_networks_output_is_the_picture_and_the_noise_it_was_made_of(family: str) -> None:
    backbone = Morpher(MAKERS[family]()).backbone
    x_0, eps = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 400, 999])
    said = backbone.prediction(backbone.training_target(x_0, eps, t), backbone.noised(x_0, eps, t), backbone.level(t))
    assert_close(said.clean, x_0, rtol=1e-4, atol=1e-4)
    assert_close(said.noise, eps, rtol=1e-4, atol=1e-4)


@families
def test_the_fits_levels_are_the_middles_of_a_thousand_equal_parts(family: str) -> None:
    backbone = Morpher(MAKERS[family]()).backbone
    level = backbone.level(torch.tensor([0, 499, 999]))
    want = torch.tensor([0.0005, 0.4995, 0.9995])
    for value, wanted in ((level.s, want), (level.a, 1 - want), (level.time, want * backbone.time_scale)):
        assert_close(torch.as_tensor(value).flatten(), wanted)
    assert isinstance(level.s, Tensor) and level.s.shape == (3, 1, 1, 1)  # one for each row


# ---- inversion


def smooth(pipe: Any) -> Any:
    """A random network is rougher than a trained one: its last layer is made smaller, so that steps can be called small."""
    as_backbone(pipe).ends()[1].data.mul_(0.2)
    return pipe


@families
def test_uni_inversion_falls_as_the_square_of_the_step_and_the_plain_rule_as_the_step(family: str) -> None:
    path = Morpher(smooth(MAKERS[family]())).prepare(PICTURES[:2], PROMPTS[:2], fit=None, steps=2)
    backbone = path.backbone

    def lost(z: Tensor) -> tuple[float, float]:
        """Of the latents, and of the pictures that they are."""
        differences = (z - path.latents, backbone.decode(z) - backbone.decode(path.latents))
        return tuple(float(x.square().mean().sqrt()) for x in differences)  # type: ignore[return-value]

    def there_and_back(rule: Any, steps: int) -> tuple[float, float]:
        schedule = backbone.schedule(steps)
        z = invert(backbone, path.latents, path.conditioning, steps, rule=rule)[-1]
        for level in range(steps, 0, -1):
            z = schedule.down(backbone.predict(z, schedule.levels[level], path.conditioning), level)
        return lost(z)

    with torch.no_grad():
        unis, plains = ([there_and_back(rule, steps) for steps in (10, 20, 40)] for rule in ("uni", "plain"))
        exact = lost(path.sample([0, 1], SampleConfig(steps=10, exact_ends=True), "latent"))
    for uni, plain, none in zip(zip(*unis, strict=True), zip(*plains, strict=True), exact, strict=True):
        assert uni[0] / uni[2] > 10 and 3 < plain[0] / plain[2] < 6  # 16 and 4
        assert uni[1] < plain[1] / 3
        assert none < 1e-5 < uni[0]


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
    rows, stored = 16, []  # of 32 x 32 pixels
    for i in range(STEPS):
        seen: dict[str, Tensor] = {}

        def hook(module: nn.Linear, args: Any, output: Tensor, name: str, i: int, seen: dict[str, Tensor]) -> Tensor:
            seen[name] = args[0].clone() if mode == "features" else output.clone()
            if not 0 < a < 1 or i / STEPS >= window:
                return output
            mixed = (1 - a) * ends[left][i][name] + a * ends[right][i][name]
            if mode == "features":
                mixed = nn.functional.linear(mixed, module.weight, module.bias)
            image = slice(rows) if isinstance(path.backbone, ZImage) else slice(output.shape[1] - rows, None)
            columns = slice(32, 96) if name.endswith(".to_qkv_mlp_proj") else slice(None)
            output = output.clone()
            output[:, image, columns] = mixed[:, image, columns]
            return output

        handles = [
            module.register_forward_hook(lambda m, x, y, n=name, i=i, s=seen: hook(m, x, y, n, i, s))
            for name, module in net.named_modules()
            if name.endswith(
                (
                    *(".attn.to_k", ".attn.to_v", ".attn2.to_k", ".attn2.to_v", ".attention.to_k", ".attention.to_v"),
                    ".attn.to_qkv_mlp_proj",
                )
            )
            and "context" not in name
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
    prompts = [PROMPTS[0], LONG if family == "z-image" else PROMPTS[1], PROMPTS[2]][:images]
    path = Morpher(MAKERS[family]()).prepare(PICTURES[:images], prompts, fit=fit, steps=STEPS)
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
    """What we write, the pipeline loads; its output with it is ours."""
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
    made = Recipe.read(tmp_path / "x.mp4")  # with what suits a flow
    assert made.fit == replace(FLOW.fit, steps=2) and made.sample == replace(FLOW.sample, steps=3)


@families
def test_what_suits_a_flow_is_recommended_however_it_comes(family: str, tmp_path: Path) -> None:
    pipe = MAKERS[family]()
    pipe.save_pretrained(tmp_path)
    for morpher in (Morpher(pipe), Morpher.from_pretrained(str(tmp_path), device="cpu")):
        assert morpher.spec == FLOW and FLOW.sample.exact_ends
        path = morpher.prepare(PICTURES[:2], "x", fit=None, steps=2)
        assert path.sample_config == replace(FLOW.sample, steps=2)
        assert_close(path.sample([0, 1], output="latent"), path.latents, rtol=1e-4, atol=1e-4)
    assert Morpher(tiny_pipeline()).spec == ModelSpec()


@families
def test_a_quick_film_takes_the_attention_that_a_flow_can_have(family: str, tmp_path: Path) -> None:
    MAKERS[family]().save_pretrained(tmp_path / "model")
    for k, picture in enumerate(PICTURES[:2]):
        Image.fromarray(picture).save(tmp_path / f"{k}.png")
    arguments = [
        "morph",
        *(str(tmp_path / f"{k}.png") for k in range(2)),
        "--model",
        str(tmp_path / "model"),
        "--preview",
    ]
    options = ["-o", str(tmp_path / "x.mp4"), "--frames", "4", "--steps", "2", "--device", "cpu", "--size", "32x32"]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 0, result.output
    made = Recipe.read(tmp_path / "x.mp4")
    assert made.fit is None and made.sample == replace(FLOW.sample, steps=2, attention_mode="kv")
    assert "--preview" in made.command() and "--attention-mode" not in made.command()


@families
def test_a_film_leaves_the_pipeline_as_it_was(family: str) -> None:
    pipe = MAKERS[family]()
    before = copy.deepcopy({n: p.state_dict() for n, p in pipe.components.items() if isinstance(p, nn.Module)})
    settings = dict(pipe.scheduler.config), dict(pipe.config), getattr(pipe, "default_sample_size", 0)
    Morpher(pipe)(PICTURES[:2], "x", 3, fit=FitConfig(rank=2, steps=2), sample=SampleConfig(steps=3))
    for name, weights in before.items():
        module = pipe.components[name]
        assert all(torch.equal(weights[n], p) for n, p in module.state_dict().items())
        assert not module.training and all(p.requires_grad for p in module.parameters())
        if not name.startswith("text_encoder"):  # where transformers leaves hooks of its own
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert settings == (dict(pipe.scheduler.config), dict(pipe.config), getattr(pipe, "default_sample_size", 0))


@families
@pytest.mark.parametrize("stage", ["fit", "invert", "sample", "write"])
def test_the_pipeline_comes_back_unchanged_after_an_interruption(family: str, stage: str) -> None:
    pipe = MAKERS[family]()
    pipe.transformer.train()
    before = {n: p.clone() for n, p in pipe.transformer.state_dict().items()}

    def stop(at: str, done: int, total: int) -> None:
        if at == stage and done >= 2:
            raise KeyboardInterrupt

    def write(frames: Iterable[Image.Image], settings: dict[str, Any]) -> None:
        for i, _ in enumerate(frames):
            if stage == "write" and i == 1:
                raise KeyboardInterrupt

    morpher, fit = Morpher(pipe), FitConfig(rank=2, steps=3)
    with pytest.raises(KeyboardInterrupt):
        morpher(PICTURES[:2], "x", 4, fit=fit, sample=OWN_SAMPLER, progress=stop, write=write)
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
        pipe.text_encoder = None
        with pytest.raises(ModelError, match="lacks text_encoder"):
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
    with pytest.raises(ModelError, match=r"Z-Image-Turbo is distilled .* use Tongyi-MAI/Z-Image\."):
        ZImage(tiny_z_image_pipeline(), "Tongyi-MAI/Z-Image-Turbo")
    omni = tiny_z_image_pipeline()
    omni.transformer.register_to_config(siglip_feat_dim=1152)
    with pytest.raises(
        ModelError, match=r"reads pictures, as Z-Image-Omni and Z-Image-Edit do; use Tongyi-MAI/Z-Image\."
    ):
        Morpher(omni)
    qwen = tiny_qwen_pipeline()
    for pipe in (QwenImageInpaintPipeline(**qwen.components), QwenImageEditPipeline(processor=None, **qwen.components)):
        with pytest.raises(ModelError, match=rf"{type(pipe).__name__} holds no .*take Qwen/Qwen-Image with"):
            Morpher(pipe)
    for mark in ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
        qwen.transformer.register_to_config(**{mark: True})
        with pytest.raises(ModelError, match="take Qwen/Qwen-Image with"):
            Morpher(qwen)
        qwen.transformer.register_to_config(**{mark: False})
    with pytest.raises(ModelError, match="owner/Qwen-Image-Lightning is distilled to a few steps"):
        QwenImage(qwen, "owner/Qwen-Image-Lightning")
    qwen.scheduler = FlowMatchEulerDiscreteScheduler(base_shift=math.log(3), max_shift=math.log(3))
    with pytest.raises(ModelError, match="is distilled .* use Qwen/Qwen-Image as it is"):
        Morpher(qwen)
    with pytest.raises(ModelError, match=r"Klein is distilled to a few steps, .*; use .*FLUX\.2-klein-base-4B\."):
        Morpher(tiny_flux2_pipeline(is_distilled=True))
    klein = tiny_flux2_pipeline()
    for kind in (Flux2Pipeline, Flux2KleinKVPipeline, Flux2KleinInpaintPipeline):
        other = kind(klein.scheduler, klein.vae, klein.text_encoder, klein.tokenizer, klein.transformer)
        with pytest.raises(ModelError, match=rf"^{kind.__name__} cannot be used: .*; take .*FLUX\.2-klein-base-4B\."):
            Morpher(other)
    unknown = tiny_flux_pipeline()
    unknown.transformer = nn.Linear(1, 1)
    with pytest.raises(ModelError, match=r"not supported; there are Stable Diffusion 1\.x or 2\.x, .*FLUX\.1"):
        Morpher(unknown)


@pytest.mark.gpu
@families
@pytest.mark.parametrize("low_memory", [False, True])
def test_on_a_gpu(family: str, low_memory: bool) -> None:
    pipe = MAKERS[family]().to("cuda", torch.bfloat16)
    morpher = Morpher(pipe, low_memory=low_memory)
    result = morpher(PICTURES[:2], "x", 4, fit=FitConfig(rank=2, steps=2), sample=OWN_SAMPLER)
    assert len(result.frames) == 4 and all(d == d for d in result.distances)


# ---- the published architectures, on the meta device


QKVO = ("to_q", "to_k", "to_v", "to_out.0")


def layers(blocks: str, numbers: Iterable[int], ends: Iterable[str], attention: str = "attn") -> list[str]:
    return [f"{blocks}.{i}.{attention}.{end}" for i in numbers for end in ends]


def test_flux_has_19_joint_and_38_single_blocks() -> None:
    backbone = Flux(tiny_flux_pipeline())
    with torch.device("meta"):
        backbone.network = FluxTransformer2DModel(guidance_embeds=True)
    assert sum(p.numel() for p in backbone.network.parameters()) == 11_901_408_320
    single = "single_transformer_blocks"
    assert {*backbone.projections()} == {
        *layers("transformer_blocks", range(19), QKVO),
        *layers(single, range(38), QKVO[:3]),
    }
    assert len(backbone.projections()) == 19 * 4 + 38 * 3
    sites = backbone.attention_sites()
    assert [site.rows for site in sites] == ["all"] * 38 + ["last"] * 76
    kv = (layers(blocks, range(n), QKVO[1:3]) for blocks, n in (("transformer_blocks", 19), (single, 38)))
    assert [site.layer for site in sites] == [name for names in kv for name in names]


def test_flux2_klein_has_5_joint_and_20_single_blocks() -> None:
    backbone = Flux2(tiny_flux2_pipeline())
    with torch.device("meta"):
        backbone.network = Flux2Transformer2DModel(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
        )
    assert sum(p.numel() for p in backbone.network.parameters()) == 3_875_544_576
    assert len(backbone.projections()) == 5 * 4 + 20 * 2
    single = "single_transformer_blocks"
    assert {*backbone.projections()} == {
        *layers("transformer_blocks", range(5), QKVO),
        *layers(single, range(20), ("to_qkv_mlp_proj", "to_out")),
    }
    assert all(isinstance(layer, nn.Linear) for layer in backbone.projections().values())
    sites = backbone.attention_sites()
    assert [(site.rows, site.columns) for site in sites] == [("all", None)] * 10 + [("last", (3072, 9216))] * 20
    kv, fused = layers("transformer_blocks", range(5), QKVO[1:3]), layers(single, range(20), ("to_qkv_mlp_proj",))
    assert [site.layer for site in sites] == kv + fused


def test_stable_diffusion_35_medium_has_24_blocks_13_of_which_attend_to_the_image_twice() -> None:
    backbone = StableDiffusion3(tiny_sd3_pipeline())
    with torch.device("meta"):
        backbone.network = SD3Transformer2DModel(
            sample_size=128, num_layers=24, attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096,
            caption_projection_dim=1536, pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
        )  # fmt: skip
    names = {
        end: {
            *layers("transformer_blocks", range(24), (end,)),
            *layers("transformer_blocks", range(13), (end,), "attn2"),
        }
        for end in QKVO
    }
    assert {*backbone.projections()} == set().union(*names.values())
    assert len(backbone.projections()) == (24 + 13) * 4
    sites = backbone.attention_sites()
    assert {site.layer for site in sites} == names["to_k"] | names["to_v"]
    assert len(sites) == (24 + 13) * 2 and {(site.rows, site.columns) for site in sites} == {("all", None)}


def test_z_image_has_30_joint_blocks_and_2_of_the_image_alone() -> None:
    backbone = ZImage(tiny_z_image_pipeline())
    with torch.device("meta"):
        backbone.network = ZImageTransformer2DModel()
    assert sum(p.numel() for p in backbone.network.parameters()) == 6_154_908_736
    assert len(backbone.network.context_refiner) == 2  # of the caption alone
    names = {
        end: {
            *layers("layers", range(30), (end,), "attention"),
            *layers("noise_refiner", range(2), (end,), "attention"),
        }
        for end in QKVO
    }
    assert {*backbone.projections()} == set().union(*names.values())
    assert len(backbone.projections()) == (30 + 2) * 4
    sites = backbone.attention_sites()
    assert {site.layer for site in sites} == names["to_k"] | names["to_v"]
    assert [site.rows for site in sites] == ["first"] * (30 + 2) * 2
    assert Z_IMAGE_SIZE == (1024, 1024)


def test_qwen_image_has_60_joint_blocks() -> None:
    backbone = QwenImage(tiny_qwen_pipeline())
    with torch.device("meta"):
        backbone.network = QwenImageTransformer2DModel()
    assert sum(p.numel() for p in backbone.network.parameters()) == 20_430_401_088
    assert {*backbone.projections()} == {*layers("transformer_blocks", range(60), QKVO)}
    sites = backbone.attention_sites()
    assert len(sites) == 60 * 2 and {site.rows for site in sites} == {"all"}
    assert {site.layer for site in sites} == {*layers("transformer_blocks", range(60), QKVO[1:3])}
