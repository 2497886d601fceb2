"""Models of every supported kind, by every way of naming one, and clear words for the others."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from huggingface_hub.errors import GatedRepoError
from PIL import Image
from safetensors.torch import save_file
from torch.testing import assert_close
from typer.testing import CliRunner

from conftest import ASSETS, tiny_flux_pipeline, tiny_pipeline, tiny_xl_pipeline
from diffmorpher import FitConfig, Morpher, Recipe, SampleConfig
from diffmorpher.cli.app import app
from diffmorpher.errors import ConfigError, ModelError
from diffmorpher.models.catalog import CATALOG, FLOW, ModelSpec, check_model, look_up, spec_of
from diffmorpher.models.conditioning import Conditioning
from diffmorpher.models.loading import LARGE, choose_device, choose_dtype, count_parameters, load_pipeline
from diffmorpher.models.stable_diffusion import StableDiffusion
from diffmorpher.web.jobs import Studio

PICTURES = [Image.effect_noise((40, 32), s).convert("RGB") for s in (20, 90)]
QUICK: dict[str, Any] = {"num_frames": 3, "fit": FitConfig(rank=2, steps=1), "sample": SampleConfig(steps=2)}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("linear", [False, True], ids=["sd1", "sd2"])
def test_sd1_and_sd2_load_from_a_folder_and_morph(tmp_path: Path, prediction_type: str, linear: bool) -> None:
    tiny_pipeline(prediction_type, linear=linear).save_pretrained(tmp_path / "model")
    morpher = Morpher.from_pretrained(str(tmp_path / "model"), device="cpu")
    assert morpher.backbone.prediction_type == prediction_type
    result = morpher(PICTURES, "noise", **QUICK)
    assert [f.size for f in result.frames] == [(32, 32)] * 3


def test_a_checkpoint_that_ships_pndm_is_sampled_with_ddim() -> None:
    pipe = tiny_pipeline()
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    with_pndm, with_ddim = Morpher(pipe).backbone.schedule(10), StableDiffusion(tiny_pipeline()).schedule(10)
    assert with_pndm.levels == with_ddim.levels
    assert isinstance(pipe.scheduler, PNDMScheduler)


def test_a_single_safetensors_file_in_the_original_layout_is_the_same_model(tmp_path: Path) -> None:
    """The tiny model's weights under the original Stable Diffusion's names, its configuration in a folder beside it."""
    pipe = tiny_pipeline(cross_attention_dim=32, layers_per_block=2, down_block_types=("CrossAttnDownBlock2D",) * 2)
    pipe.unet, pipe.vae = pipe.unet.eval(), pipe.vae.eval()
    file = tmp_path / "model.safetensors"
    save_file(original_layout(pipe), file)
    pipe.save_pretrained(tmp_path / "model")
    for weights in (tmp_path / "model").glob("*/*.safetensors"):
        weights.unlink()  # only the configuration may come from there
    loaded = Morpher.from_pretrained(str(file), device="cpu")
    z, c = torch.randn(1, 4, 8, 8), Conditioning({"text": torch.randn(1, 6, 32)})
    ours, own = loaded.backbone, StableDiffusion(pipe)
    level = own.schedule(5).levels[3]
    with torch.no_grad():
        assert_close(ours.predict(z, level, c).noise, own.predict(z, level, c).noise)
        assert_close(ours.encode_prompts(["a cat"])["text"], own.encode_prompts(["a cat"])["text"])
        assert_close(loaded.backbone.decode(z), StableDiffusion(pipe).decode(z))


def put_renamed(
    out: dict[str, torch.Tensor], prefix: str, module: torch.nn.Module, names: dict[str, str] | None = None
) -> None:
    for key, value in module.state_dict().items():
        for ours, theirs in (names or {}).items():
            if key.startswith(ours + "."):
                key = theirs + key.removeprefix(ours)
                break
        out[f"{prefix}.{key}"] = value.contiguous()


def original_vae(vae: AutoencoderKL) -> dict[str, torch.Tensor]:
    """An autoencoder's weights by the original names."""
    out: dict[str, torch.Tensor] = {}
    put = partial(put_renamed, out)
    levels = len(vae.config.block_out_channels)
    shortcut = {"conv_shortcut": "nin_shortcut"}
    for side, half in (("encoder", vae.encoder), ("decoder", vae.decoder)):
        put(f"{side}.conv_in", half.conv_in)
        put(f"{side}.norm_out", half.conv_norm_out)
        put(f"{side}.conv_out", half.conv_out)
        put(f"{side}.mid.block_1", half.mid_block.resnets[0])
        put(f"{side}.mid.block_2", half.mid_block.resnets[1])
        attention = half.mid_block.attentions[0]
        put(f"{side}.mid.attn_1.norm", attention.group_norm)
        projections = {"q": attention.to_q, "k": attention.to_k, "v": attention.to_v, "proj_out": attention.to_out[0]}
        for name, linear in projections.items():
            out[f"{side}.mid.attn_1.{name}.weight"] = linear.weight.detach()[:, :, None, None].contiguous()
            out[f"{side}.mid.attn_1.{name}.bias"] = linear.bias.detach()
    for i, block in enumerate(vae.encoder.down_blocks):
        for j, layer in enumerate(block.resnets):
            put(f"encoder.down.{i}.block.{j}", layer, shortcut)
        if block.downsamplers:
            put(f"encoder.down.{i}.downsample.conv", block.downsamplers[0].conv)
    for i, block in enumerate(vae.decoder.up_blocks):
        for j, layer in enumerate(block.resnets):
            put(f"decoder.up.{levels - 1 - i}.block.{j}", layer, shortcut)
        if block.upsamplers:
            put(f"decoder.up.{levels - 1 - i}.upsample.conv", block.upsamplers[0].conv)
    for name in ("quant_conv", "post_quant_conv"):
        if (layer := getattr(vae, name)) is not None:
            put(name, layer)
    return {k: v.clone() for k, v in out.items()}


def original_layout(pipe: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    """Diffusers' names to the original ones, written from the original U-Net's and autoencoder's numbering."""
    out: dict[str, torch.Tensor] = {}
    resnet = {
        "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
    }  # fmt: skip
    per_block = pipe.unet.config.layers_per_block

    put = partial(put_renamed, out)
    unet, model = pipe.unet, "model.diffusion_model"
    put(f"{model}.time_embed.0", unet.time_embedding.linear_1)
    put(f"{model}.time_embed.2", unet.time_embedding.linear_2)
    if hasattr(unet, "add_embedding"):
        put(f"{model}.label_emb.0.0", unet.add_embedding.linear_1)
        put(f"{model}.label_emb.0.2", unet.add_embedding.linear_2)
    put(f"{model}.input_blocks.0.0", unet.conv_in)
    put(f"{model}.out.0", unet.conv_norm_out)
    put(f"{model}.out.2", unet.conv_out)
    for i, block in enumerate(unet.down_blocks):
        for j, layer in enumerate(block.resnets):
            n = i * (per_block + 1) + 1 + j
            put(f"{model}.input_blocks.{n}.0", layer, resnet)
            if hasattr(block, "attentions"):
                put(f"{model}.input_blocks.{n}.1", block.attentions[j])
        if block.downsamplers:
            put(f"{model}.input_blocks.{(i + 1) * (per_block + 1)}.0.op", block.downsamplers[0].conv)
    put(f"{model}.middle_block.0", unet.mid_block.resnets[0], resnet)
    put(f"{model}.middle_block.1", unet.mid_block.attentions[0])
    put(f"{model}.middle_block.2", unet.mid_block.resnets[1], resnet)
    for i, block in enumerate(unet.up_blocks):
        attended = hasattr(block, "attentions")
        for j, layer in enumerate(block.resnets):
            n = i * (per_block + 1) + j
            put(f"{model}.output_blocks.{n}.0", layer, resnet)
            if attended:
                put(f"{model}.output_blocks.{n}.1", block.attentions[j])
        if block.upsamplers:
            last = i * (per_block + 1) + per_block
            put(f"{model}.output_blocks.{last}.{2 if attended else 1}.conv", block.upsamplers[0].conv)

    out |= {f"first_stage_model.{k}": v for k, v in original_vae(pipe.vae).items()}
    put("cond_stage_model.transformer", pipe.text_encoder)
    if not any(k.startswith("cond_stage_model.transformer.text_model.") for k in out):
        put("cond_stage_model.transformer.text_model", pipe.text_encoder)
    return {k: v.clone() for k, v in out.items()}


def test_latents_are_scaled_and_shifted_by_the_config() -> None:
    pipe = tiny_pipeline(shift_factor=0.7)
    backbone, pixels = StableDiffusion(pipe), torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        mean, std = backbone.encode(pixels)
        raw = pipe.vae.encode(pixels).latent_dist
        assert_close(mean, (raw.mean - 0.7) * 0.31)
        assert_close(std, raw.std * 0.31)
        assert_close(backbone.decode(mean), pipe.vae.decode(raw.mean).sample.clamp(-1, 1), rtol=1e-4, atol=1e-4)


def test_prompts_are_encoded_as_the_pipeline_does_and_cut_with_a_warning() -> None:
    pipe = tiny_pipeline()
    backbone = StableDiffusion(pipe)
    with torch.no_grad():
        got = backbone.encode_prompts(["a red apple", ""])["text"]
        want = pipe.encode_prompt(["a red apple", ""], "cpu", 1, False)[0]
        assert_close(got, want)
        text = " ".join(["apple"] * 40)
        count = len(pipe.tokenizer(text).input_ids)
        assert count >= 42  # start, end, and a token or more for each word
        with pytest.warns(UserWarning, match=f"has {count} tokens; the model reads the first 24"):
            long = backbone.encode_prompts([text])["text"]
    assert long.shape == (1, 24, 32)


def test_sizes_follow_the_model_and_are_checked() -> None:
    morpher = Morpher(tiny_pipeline())
    fit = None
    assert morpher.prepare(PICTURES, fit=fit, steps=1).latents.shape == (2, 4, 8, 8)
    assert morpher.prepare(PICTURES, fit=fit, steps=1, size=(48, 20)).latents.shape == (2, 4, 5, 12)
    for size, near in (((33, 32), "33 take 32"), ((32, 0), "0 take 8"), ((32, 10000), "10000 take 4096")):
        with pytest.raises(ConfigError, match=f"multiple of 4 .* for {near}"):
            morpher.prepare(PICTURES, fit=fit, size=size)


def test_half_precision_weights_morph_too() -> None:
    pipe = tiny_pipeline()
    pipe.to(torch.bfloat16)
    result = Morpher(pipe)(PICTURES, "noise", **QUICK)
    assert len(result.frames) == 3 and all(d == d for d in result.distances)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("minni", "did you mean 'mini'"),
        ("no-such-model", "use one of mini"),
        ("./nowhere", "not known"),
        ("nowhere.safetensors", "does not exist"),
        ("model.ckpt", "can run code"),
        ("{empty}", "no model_index.json"),
        ("{text}.safetensors", "could not be loaded"),
        ("{broken}", "could not be loaded"),
    ],
)
def test_a_model_that_cannot_be_is_said_so(tmp_path: Path, model: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("not a model")
    tiny_pipeline().save_pretrained(tmp_path / "broken")
    (tmp_path / "broken" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"0" * 100)
    model = model.format(**{n: str(tmp_path / n) for n in ("empty", "text", "broken")})
    with pytest.raises(ModelError, match=message) as caught:
        Morpher.from_pretrained(model, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_folder_that_lacks_a_part_is_said_so(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    """Such as a model without a VAE."""
    pipe.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "vae")
    with pytest.raises(ModelError, match=r"lacks vae: copy what is so called"):
        Morpher.from_pretrained(tmp_path, device="cpu")
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"vae": [None, None]}))
    with pytest.raises(ModelError, match=r"lacks vae: copy what is so called"):
        Morpher.from_pretrained(tmp_path, device="cpu")


def test_pipelines_of_other_kinds_are_refused() -> None:
    inpainting = tiny_pipeline(in_channels=9)
    with pytest.raises(ModelError, match="9 channels where the VAE gives 4"):
        Morpher(inpainting)
    sdxl = tiny_pipeline()
    sdxl.text_encoder_2 = sdxl.text_encoder
    with pytest.raises(ModelError, match="lacks tokenizer_2"):
        Morpher(sdxl)
    with pytest.raises(ModelError, match="lacks unet, vae"):
        Morpher(SimpleNamespace())
    sample_prediction = tiny_pipeline("sample")
    with pytest.raises(ModelError, match="'sample'"):
        Morpher(sample_prediction)


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_xl_pipeline])
def test_schedulers_of_other_models_are_refused(make: Any) -> None:
    """Their sigmas are no Stable Diffusion's: taken for DDIM's, they make a film of noise."""
    flows = [FlowMatchEulerDiscreteScheduler(), FlowMatchHeunDiscreteScheduler()]
    others = [EDMEulerScheduler(), DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")]
    for scheduler in (*flows, *others):
        pipe = make()
        pipe.scheduler = scheduler
        with pytest.raises(ModelError, match=f"the scheduler {type(scheduler).__name__} is for other models"):
            Morpher(pipe)
    for scheduler in (EulerDiscreteScheduler(), DPMSolverMultistepScheduler(), LCMScheduler()):
        pipe = make()
        pipe.scheduler = scheduler
        assert Morpher(pipe).backbone.num_train_timesteps == 1000


def test_an_autoencoders_own_mean_and_spread_are_applied_as_diffusers_does() -> None:
    pipe = tiny_xl_pipeline()
    pipe.vae.register_to_config(latents_mean=[0.5, -0.3, 0.1, 0.7], latents_std=[0.5, 1.5, 2.0, 0.8])
    backbone = Morpher(pipe).backbone
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    same = {
        "prompt": "a",
        "latents": latents,
        "num_inference_steps": 2,
        "height": 32,
        "width": 32,
        "guidance_scale": 1.0,
    }
    clean = pipe(**same, output_type="latent").images
    with torch.no_grad():
        assert_close(backbone.decode(clean) / 2 + 0.5, pipe(**same, output_type="pt").images, rtol=0, atol=1e-5)
        pixels = backbone.decode(clean)
        mean, std = backbone.encode(pixels)
    with torch.no_grad():  # image to image, in diffusers, takes a sample of the posterior: two, to tell mean and spread
        other = StableDiffusionXLImg2ImgPipeline(**pipe.components)
        generator = torch.Generator().manual_seed(1)
        theirs = other.prepare_latents(
            pixels, torch.tensor([0]), 1, 1, torch.float32, "cpu", generator, add_noise=False
        )
    draw = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    assert_close(mean + std * draw, theirs, rtol=1e-4, atol=1e-4)


def test_an_autoencoder_without_a_posterior_works() -> None:
    """TAESD gives latents where others give a distribution."""
    pipe = tiny_pipeline()
    torch.manual_seed(0)
    widths = (16, 16, 16)
    pipe.vae = AutoencoderTiny(
        encoder_block_out_channels=widths, decoder_block_out_channels=widths, num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1), latent_channels=4,
    ).eval()  # fmt: skip
    morpher = Morpher(pipe)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        mean, std = morpher.backbone.encode(pixels)
        assert_close(mean, pipe.vae.encode(pixels).latents)
    assert not std.any() and mean.shape == (2, 4, 8, 8)
    result = morpher(PICTURES, "noise", **QUICK)
    assert len(result.frames) == 3 and all(d == d for d in result.distances)


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_xl_pipeline])
def test_a_textual_inversion_of_several_vectors_is_used_whole(make: Any) -> None:
    pipe = make()
    encoders = [(pipe.text_encoder, pipe.tokenizer)]
    if hasattr(pipe, "text_encoder_2"):
        encoders.append((pipe.text_encoder_2, pipe.tokenizer_2))
    generator = torch.Generator().manual_seed(0)
    for encoder, tokenizer in encoders:
        vectors = torch.randn(3, encoder.config.hidden_size, generator=generator)
        pipe.load_textual_inversion({"<cat>": vectors}, token="<cat>", text_encoder=encoder, tokenizer=tokenizer)
    backbone = Morpher(pipe).backbone
    with torch.no_grad():
        theirs = pipe.encode_prompt(prompt="a <cat> here", device="cpu", num_images_per_prompt=1,
                                    do_classifier_free_guidance=False)[0]  # fmt: skip
        ours = backbone.encode_prompts(["a <cat> here"])["text"]
        first = backbone.encode_prompts(["a <cat>"])["text"]
    assert_close(ours, theirs)
    assert "<cat>_2" in pipe.maybe_convert_prompt("a <cat> here", pipe.tokenizer)
    assert (first - ours).abs().max() > 1e-3


def test_devices_and_dtypes_are_checked() -> None:
    with pytest.raises(ModelError, match="'gpu'.*try"):
        choose_device("gpu")
    with pytest.raises(ModelError, match="'float8'.*float32"):
        choose_dtype("float8", torch.device("cpu"))
    assert choose_dtype(None, torch.device("cpu")) == torch.float32
    assert choose_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize(
    ("capabilities", "parameters", "dtype"),
    [
        ({"avx512_bf16": True}, LARGE + 1, torch.bfloat16),
        ({"amx_bf16": True}, LARGE + 1, torch.bfloat16),
        ({"avx512_bf16": True}, LARGE, torch.float32),
        ({"avx512_f": True}, LARGE + 1, torch.float32),
        ({}, LARGE + 1, torch.float32),
    ],
)
def test_a_large_network_is_in_bfloat16_on_a_cpu_that_has_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], parameters: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert choose_dtype(None, torch.device("cpu"), parameters) == dtype
    assert choose_dtype("float16", torch.device("cpu"), parameters) == torch.float16


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_flux_pipeline])
def test_a_models_size_is_read_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]
) -> None:
    pipe = make()
    pipe.save_pretrained(tmp_path)
    network = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    pipe.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    (folder,) = (f.parent for f in tmp_path.glob("[ut]*/diffusion_pytorch_model.safetensors"))
    network.save_pretrained(folder, variant="fp16")  # which is not asked for
    size = sum(p.numel() for p in network.parameters())
    assert count_parameters(tmp_path) == count_parameters(tmp_path / "shards") == size
    weights = {f"model.diffusion_model.{name}": x for name, x in network.state_dict().items()}
    save_file({**weights, "first_stage_model.x": torch.zeros(9)}, tmp_path / "whole.safetensors")
    assert count_parameters(tmp_path / "whole.safetensors") == size
    assert count_parameters(tmp_path / "nowhere") == 0
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    for large, dtype in ((size, "float32"), (size - 1, "bfloat16")):
        monkeypatch.setattr("diffmorpher.models.loading.LARGE", large)
        made = Morpher.from_pretrained(str(tmp_path), device="cpu")(PICTURES, "noise", **QUICK)
        assert made.settings["dtype"] == dtype  # so the film is made again as it was


def test_the_catalogs_names_and_hub_ids_pass_without_loading() -> None:
    for name in [*CATALOG, "owner/name", "stable-diffusion-v1-5/stable-diffusion-v1-5"]:
        check_model(name)


def test_a_catalogs_model_is_known_by_where_it_is_too() -> None:
    for name, spec in CATALOG.items():
        assert spec_of(name) is spec_of(spec.source) is spec


def test_what_suits_a_model_is_read_from_what_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformer is a flow's: in a folder, in the hub's cache, in a single file's keys or the configuration beside it."""
    monkeypatch.chdir(tmp_path)
    index = {"transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    for folder, parts in (("flow", index), ("unet", {"unet": ["diffusers", "UNet2DConditionModel"]}), ("other", index)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model_index.json").write_text(json.dumps(parts))
    flux = {
        "double_blocks.0.img_attn.norm.key_norm.scale": (1,),
        "img_in.weight": (8, 64),
        "guidance_in.in_layer.weight": (1, 1),
    }
    half = {key: torch.zeros(shape, dtype=torch.bfloat16) for key, shape in flux.items()}
    save_file(half, tmp_path / "flux.safetensors")
    save_file({"input_blocks.0.0.weight": torch.zeros(8, 4, 1, 1)}, tmp_path / "sd.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("{")
    for model in ("flow", str(tmp_path / "flow"), "flux.safetensors", "other.safetensors"):
        assert spec_of(model) == FLOW, model
    for model in ("unet", "sd.safetensors", "broken", "nowhere", "no.safetensors", "a/b", "-/-", "x" * 999, "x\0"):
        assert spec_of(model) == ModelSpec(), model


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that has the flow a/flow, and an empty cache; what it was asked for."""
    snapshot = tmp_path / "models--a--flow" / "snapshots" / "1"
    models: list[str] = []

    def download(model: str, file: str) -> None:
        models.append(model)
        if model != "a/flow":
            raise OSError("no such model\nand more")
        for folder in (snapshot, tmp_path / "models--a--flow" / "refs"):
            folder.mkdir(parents=True)
        (snapshot / file).write_text('{"transformer": ["diffusers", "X"]}')
        (tmp_path / "models--a--flow" / "refs" / "main").write_text("1")

    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return models


def test_what_suits_a_hub_id_is_read_from_the_cache_and_looked_up_before(tmp_path: Path, asked: list[str]) -> None:
    assert spec_of("a/flow") == ModelSpec()
    assert [look_up("a/flow"), look_up("a/flow")] == [True, False]  # once
    assert spec_of("a/flow") == FLOW
    for model in (*CATALOG, CATALOG["sdxl"].source, str(tmp_path), "./a", "x.safetensors"):
        assert not look_up(model)
    with pytest.raises(ModelError, match=r"'a/typo' could not be loaded, and the hub .*: no such model$"):
        look_up("a/typo")
    assert asked == ["a/flow", "a/typo"]


@pytest.mark.parametrize(("model", "place"), [("flux-dev", "black-forest-labs/FLUX.1-dev"), ("a/gated", "a/gated")])
def test_a_gated_model_says_where_its_licence_is_and_how_to_log_in(
    monkeypatch: pytest.MonkeyPatch, model: str, place: str
) -> None:
    """As the hub answers without a login; diffusers makes an error of its own of it."""

    def refuse(*args: Any, **options: Any) -> None:
        answer: Any = SimpleNamespace(headers={}, request=None, status_code=401)
        raise GatedRepoError("401 Client Error", response=answer)

    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    said = rf"{model!r} is gated: accept its licence at https://huggingface\.co/{place}, .*'hf auth login'"
    with pytest.raises(ModelError, match=said):
        load_pipeline(model, torch.device("cpu"))
    if "/" in model:
        with pytest.raises(ModelError, match=said):
            look_up(model)


def test_the_command_line_and_the_page_look_a_hub_id_up_before_they_settle_a_recipe(
    tmp_path: Path, asked: list[str]
) -> None:
    files = [str(ASSETS / "demo" / name) for name in ("pear.png", "rose.png")]
    out = tmp_path / "r.toml"
    result = CliRunner().invoke(app, ["morph", *files, "--model", "a/flow", "--save-recipe", str(out)])
    assert result.exit_code == 0, result.output
    assert (Recipe.read(out).fit, Recipe.read(out).sample, asked) == (FLOW.fit, FLOW.sample, ["a/flow"])
    shutil.rmtree(tmp_path / "models--a--flow")
    studio = Studio(tmp_path / "web")
    assert (studio.recipe({"model": "a/flow", "steps": 5}).sample) == replace(FLOW.sample, steps=5)
    with pytest.raises(ConfigError, match="cannot be chosen here"):  # nor asked for
        Studio(tmp_path / "web", {"mini"}).recipe({"model": "a/other"})
    assert asked == ["a/flow", "a/flow"]


def test_signatures_tell_models_apart_in_any_dtype() -> None:
    signature = StableDiffusion(tiny_pipeline(seed=0)).signature()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        pipe = tiny_pipeline(seed=0)
        pipe.to(dtype)
        assert StableDiffusion(pipe).has_signature(signature)
    assert not StableDiffusion(tiny_pipeline(seed=1)).has_signature(signature)
    assert not StableDiffusion(tiny_pipeline(seed=0, block_out_channels=(16, 32))).has_signature(signature)


def test_the_schedule_does_not_move_to_the_samples_device() -> None:
    """Diffusers' scheduler carries its table to the device of what it noises; then a later schedule would mix devices."""
    backbone = StableDiffusion(tiny_pipeline("v_prediction"))
    before = backbone.schedule(5).levels
    z, t = torch.zeros(1, 4, 8, 8), torch.tensor([5])
    backbone.noised(z, z, t)
    backbone.training_target(z, z, t)
    assert backbone._abar.device.type == "cpu" and backbone.schedule(5).levels == before


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_target_as_the_networks_output_is_the_picture_and_the_noise_it_was_made_of(prediction_type: str) -> None:
    backbone = StableDiffusion(tiny_pipeline(prediction_type))
    x_0, eps = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 400, 999])
    said = backbone.prediction(backbone.training_target(x_0, eps, t), backbone.noised(x_0, eps, t), backbone.level(t))
    assert_close(said.clean, x_0, rtol=1e-4, atol=1e-4)
    assert_close(said.noise, eps, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 999, 1000])
def test_extreme_step_counts_have_a_schedule(steps: int) -> None:
    schedule = StableDiffusion(tiny_pipeline()).schedule(steps)
    assert len(schedule) == steps == len(schedule.levels) - 1 and max(level.time for level in schedule.levels) <= 999


def test_a_pipeline_that_was_loaded_from_a_path_has_a_text_for_a_name(tmp_path: Path) -> None:
    """diffusers keeps the `Path` that it was given; names are searched, and written to files."""
    tiny_pipeline().save_pretrained(tmp_path / "model")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    assert Morpher(pipe).backbone.name == str(tmp_path / "model")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    pipe = tiny_pipeline()
    pipe.to("cuda", dtype)
    result = Morpher(pipe)(PICTURES, "noise", **QUICK)
    assert len(result.frames) == 3 and all(d == d for d in result.distances)


def test_model_offload_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under offload the weights lie on the CPU between calls; inputs must go where the pipeline says it runs."""
    pipe = tiny_pipeline()
    monkeypatch.setattr(type(pipe), "_execution_device", property(lambda self: torch.device("meta")))
    assert StableDiffusion(pipe).device.type == "meta"


def test_nothing_brings_torchvision_in() -> None:
    Morpher(tiny_pipeline())(PICTURES, "noise", **QUICK)
    assert not {"torchvision", "stlpips_pytorch", "lpips"} & set(sys.modules)


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_used_only_when_asked_for(tf32: bool) -> None:
    """torch rounds float32 convolutions on a GPU to TF32 unless told not to; what was set is set again afterwards."""
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    assert before == [False, True]
    morpher, seen = Morpher(tiny_pipeline(), tf32=tf32), set()
    for part in (morpher.pipe.unet, morpher.pipe.vae.decoder):
        part.register_forward_hook(lambda *_: seen.add(tuple(place.allow_tf32 for place in places)))
    morpher(PICTURES, "noise", **QUICK)
    assert seen == {(tf32, tf32)}
    assert [place.allow_tf32 for place in places] == before
