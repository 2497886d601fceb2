"""Stable Diffusion XL against diffusers' own pipeline."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close
from typer.testing import CliRunner

from conftest import tiny_xl_pipeline
from diffmorpher import FitConfig, Morpher, SampleConfig
from diffmorpher.cli.app import app
from diffmorpher.errors import ModelError
from diffmorpher.files.loras import load_lora, save_lora
from diffmorpher.method.lora import LoraBank
from diffmorpher.models.stable_diffusion_xl import StableDiffusionXL

STEPS, PROMPTS = 6, ["a red apple", "a house"]
PICTURES = [np.random.default_rng(k).integers(0, 256, (32, 32, 3), dtype=np.uint8) for k in range(3)]
OWN_SAMPLER = SampleConfig(steps=STEPS, attention_lambda=0, adain=False, exact_ends=False)


def ddim(pipe: object) -> None:
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)  # type: ignore[attr-defined]
    pipe.set_progress_bar_config(disable=True)  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
def test_the_ends_are_what_diffusers_makes_of_the_same_noise(size: tuple[int, int]) -> None:
    pipe = tiny_xl_pipeline()
    path = Morpher(pipe).prepare(PICTURES[:2], PROMPTS, fit=None, steps=STEPS, size=size)
    got = path.sample([0, 1], OWN_SAMPLER, output="latent")
    ddim(pipe)
    for k in range(2):
        want = pipe(
            PROMPTS[k], latents=path.noises[k : k + 1], num_inference_steps=STEPS, guidance_scale=1.0,
            output_type="latent", width=size[0], height=size[1],
        ).images  # fmt: skip
        assert (got[k : k + 1] - want).abs().max() < 1e-4 * want.abs().max()


def test_guidance_is_diffusers_guidance_with_its_zeros_for_no_prompt() -> None:
    pipe = tiny_xl_pipeline()
    path = Morpher(pipe).prepare(PICTURES[:2], PROMPTS, fit=None, steps=STEPS)
    config = SampleConfig(steps=STEPS, attention_lambda=0, adain=False, guidance_scale=4.0)
    got = path.sample([0], config, output="latent")
    ddim(pipe)
    want = pipe(
        PROMPTS[0], latents=path.noises[:1], num_inference_steps=STEPS, guidance_scale=4.0, output_type="latent"
    ).images
    assert (got - want).abs().max() < 1e-4 * want.abs().max()


def test_prompts_are_encoded_as_the_pipeline_does() -> None:
    pipe = tiny_xl_pipeline()
    with torch.no_grad():
        got = StableDiffusionXL(pipe).encode_prompts(PROMPTS)
        text, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, "cpu", 1, False)
    assert_close(got["text"], text)
    assert_close(got["pooled"], pooled)
    middle = got.lerp(torch.tensor([0]), torch.tensor([1]), torch.tensor([0.25]))
    assert_close(middle["pooled"], 0.75 * pooled[:1] + 0.25 * pooled[1:])


def test_an_inverted_noise_leads_diffusers_back_to_the_picture_and_exact_ends_all_the_way() -> None:
    """Half as long steps lose half as much in the end, of a network that is smooth, as a trained one."""
    pipe = tiny_xl_pipeline()
    pipe.unet.conv_out.weight.data.mul_(0.05)
    path = Morpher(pipe).prepare(PICTURES[:2], PROMPTS, fit=None, steps=10)
    ddim(pipe)
    with torch.no_grad():
        pictures = pipe.vae.decode(path.latents / pipe.vae.config.scaling_factor).sample.clamp(-1, 1)
    lost = []
    for steps in (10, 20, 40):
        called = {"num_inference_steps": steps, "guidance_scale": 1.0, "width": 32, "height": 32, "output_type": "pt"}
        theirs = pipe(PROMPTS, latents=path.noises_at(steps), **called).images * 2 - 1
        lost.append(float((theirs - pictures).square().mean().sqrt()))
    assert 1.4 < lost[0] / lost[1] < lost[1] / lost[2] < 2.1  # towards 2
    exact = path.sample([0, 1], SampleConfig(steps=10, exact_ends=True), "latent")
    with torch.no_grad():
        ours = path.backbone.decode(exact)
    assert float((ours - pictures).square().mean().sqrt()) < 1e-5 < lost[2]


def test_a_lora_file_is_diffusers_own(tmp_path: Path) -> None:
    """What we write, the pipeline loads; its output with it is ours."""
    pipe = tiny_xl_pipeline()
    morpher = Morpher(pipe)
    lora = morpher.fit(PICTURES[0], PROMPTS[0], FitConfig(rank=2, steps=3, learning_rate=1e-2))
    file = save_lora(lora, tmp_path / "apple.safetensors")
    path = morpher.prepare(PICTURES[:2], PROMPTS, loras=[file, file], steps=STEPS)
    got = path.sample([0], OWN_SAMPLER, output="latent")
    without = morpher.prepare(PICTURES[:2], PROMPTS, fit=None, steps=STEPS)
    ddim(pipe)
    pipe.load_lora_weights(str(file))
    want = pipe(
        PROMPTS[0], latents=path.noises[:1], num_inference_steps=STEPS, guidance_scale=1.0, output_type="latent"
    ).images
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    assert (without.noises[:1] - path.noises[:1]).abs().max() > 1e-3


@torch.no_grad()
def changed_by(file: Path, theirs: StableDiffusionXLPipeline) -> tuple[Tensor, Tensor]:
    """What our network says of a noise with a file as the method adds it, and what theirs says as it is."""
    backbone = StableDiffusionXL(tiny_xl_pipeline())
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    told, level = backbone.encode_prompts(["a house"]), backbone.schedule(2).levels[1]
    without = backbone.output(noise, level, told)
    with LoraBank.stack([load_lora(file)], backbone.network, ["it"]).attached(backbone.network):
        ours = backbone.output(noise, level, told)
    assert (ours - without).abs().max() > 1e-2
    return ours, StableDiffusionXL(theirs).output(noise, level, told)


def with_adapter() -> StableDiffusionXLPipeline:
    """A pipeline with a random LoRA of PEFT's, whose alpha is three times its rank."""
    pipe = tiny_xl_pipeline()
    torch.manual_seed(3)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False))
    return pipe


def test_a_lora_that_diffusers_writes_is_read(tmp_path: Path) -> None:
    """With its alpha, which the header has."""
    theirs = with_adapter()
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(theirs.unet)),
        unet_lora_adapter_metadata=theirs.unet.peft_config["default"].to_dict(),
    )
    assert_close(*changed_by(tmp_path / "pytorch_lora_weights.safetensors", theirs), rtol=1e-4, atol=1e-5)


#: OneTrainer's name of a block of SDXL's in its files of the Open Model Initiative's form: Stability's, with dots.
OMI = {
    f"{side}_blocks.{block}.attentions.{layer}": f"{name}_blocks.{3 * block + layer + offset}.1"
    for side, name, offset in (("down", "input", 1), ("up", "output", 0))
    for block in range(3)
    for layer in range(3)
} | {"mid_block.attentions.0": "middle_block.1"}


@pytest.mark.parametrize("form", ["usual", "OMI"])
def test_a_lora_that_onetrainer_writes_is_read(tmp_path: Path, form: str) -> None:
    theirs, tensors = with_adapter(), {}
    for key, matrix in get_peft_model_state_dict(theirs.unet).items():
        layer, side = key.removesuffix(".weight").split(".lora_")
        block, rest = layer.split(".transformer_blocks.")
        name = (
            f"unet.{OMI[block]}.transformer_blocks.{rest}" if form == "OMI" else f"lora_unet_{layer.replace('.', '_')}"
        )
        tensors[f"{name}.lora_{ {'A': 'down', 'B': 'up'}[side] }.weight"] = matrix.clone()
        tensors[f"{name}.alpha"] = torch.tensor(6.0)
    save_file(tensors, tmp_path / "x.safetensors")
    assert_close(*changed_by(tmp_path / "x.safetensors", theirs), rtol=1e-4, atol=1e-5)


def test_kohyas_names_of_stabilitys_blocks_are_read(tmp_path: Path) -> None:
    """Every attention projection under the name that kohya's trainer gives it for SDXL."""
    backbone = StableDiffusionXL(tiny_xl_pipeline())
    names = {}
    for name in backbone.projections():
        side, *rest = name.split(".")
        tail = "_".join(rest[3:] if side != "mid_block" else rest[2:])
        if side == "down_blocks":
            block = f"input_blocks_{1 + 3 * int(rest[0]) + int(rest[2])}_1"
        elif side == "up_blocks":
            block = f"output_blocks_{3 * int(rest[0]) + int(rest[2])}_1"
        else:
            block = "middle_block_1"
        names[f"lora_unet_{block}_{tail}"] = name
    assert len(names) == len(backbone.projections()) > 0
    bank = LoraBank.create(backbone.projections(), 1, 2, seed=0)
    tensors = {}
    for theirs, ours in names.items():
        tensors[f"{theirs}.lora_down.weight"] = bank.down[ours][0].clone()
        tensors[f"{theirs}.lora_up.weight"] = torch.randn(bank.up[ours][0].shape)
        tensors[f"{theirs}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "kohya.safetensors")
    lora = load_lora(tmp_path / "kohya.safetensors")
    assert set(lora.down) == set(names.values())
    for theirs, ours in names.items():
        assert_close(lora.up[ours], tensors[f"{theirs}.lora_up.weight"] / 2)
    LoraBank.stack([lora], backbone.network, ["kohya"])


def test_films_through_the_command_line(tmp_path: Path) -> None:
    from PIL import Image

    tiny_xl_pipeline().save_pretrained(tmp_path / "xl")
    files = [tmp_path / f"{k}.png" for k in range(3)]
    for file, picture in zip(files, PICTURES, strict=True):
        Image.fromarray(picture).save(file)
    arguments = ["morph", *map(str, files), "--model", str(tmp_path / "xl"), "-o", str(tmp_path / "x.mp4")]
    result = CliRunner().invoke(
        app, [*arguments, "--frames", "6", "--steps", "3", "--lora-steps", "2", "--device", "cpu"]
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "x.mp4").stat().st_size > 0


def test_a_path_file_holds_all_that_the_network_is_told(tmp_path: Path) -> None:
    morpher = Morpher(tiny_xl_pipeline())
    path = morpher.prepare(PICTURES, "a cat", fit=None, steps=3)
    path.save(tmp_path / "x.morph")
    loaded = type(path).load(tmp_path / "x.morph", morpher)
    config = SampleConfig(steps=3)
    assert torch.equal(path.sample([0.5, 1.3], config, "latent"), loaded.sample([0.5, 1.3], config, "latent"))


@pytest.mark.parametrize("stage", ["fit", "invert", "sample", "write"])
def test_the_pipeline_comes_back_unchanged_after_an_exception(stage: str) -> None:
    """One whose VAE overflows in float16, and whose owner trains the U-Net and the second text encoder."""
    pipe = tiny_xl_pipeline()
    pipe.vae.half()
    pipe.vae.register_to_config(force_upcast=True)
    pipe.unet.train()
    pipe.text_encoder_2.train()
    pipe.text_encoder.requires_grad_(False)
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    assert len(parts) == 4

    def weights() -> dict[str, Tensor]:
        return {f"{name}.{n}": p for name, part in parts.items() for n, p in part.state_dict().items()}

    def switches() -> list[bool]:
        trained = [m.training for part in parts.values() for m in part.modules()]
        return trained + [p.requires_grad for part in parts.values() for p in part.parameters()]

    before, as_they_were = {n: p.clone() for n, p in weights().items()}, switches()

    def stop(at: str, done: int, total: int) -> None:
        if at == stage and done >= 2:
            raise KeyboardInterrupt

    def write(frames: Iterable[Image.Image], settings: dict[str, Any]) -> None:
        for i, _ in enumerate(frames):
            if stage == "write" and i == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Morpher(pipe)(
            PICTURES[:2],
            "x",
            4,
            fit=FitConfig(rank=2, steps=3),
            sample=SampleConfig(steps=3),
            progress=stop,
            write=write,
        )
    after = weights()
    assert all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before)
    assert switches() == as_they_were and before.keys() == after.keys()
    hooked = (
        part for name, part in parts.items() if not name.startswith("text_encoder")
    )  # which has transformers' own
    assert not any(m._forward_hooks or m._forward_pre_hooks for part in hooked for m in part.modules())


def test_a_float16_vae_that_overflows_works_in_float32() -> None:
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for overflows, works_in in ((True, torch.float32), (False, torch.float16)):
        pipe = tiny_xl_pipeline()
        pipe.vae.half().register_to_config(force_upcast=overflows)
        seen = set()
        for part in (pipe.vae.encoder, pipe.vae.decoder):
            part.register_forward_hook(lambda m, x, y, seen=seen: seen.add((x[0].dtype, y.dtype)))
        backbone = StableDiffusionXL(pipe)
        with torch.no_grad():
            for call, x in ((backbone.encode, pixels), (backbone.decode, torch.zeros(1, 4, 8, 8))):
                call(x)
                assert seen == {(works_in, works_in)} and pipe.vae.dtype == torch.float16
                seen.clear()


def test_the_refiner_and_a_part_that_lacks_are_named() -> None:
    refiner = tiny_xl_pipeline()
    refiner.text_encoder = None
    with pytest.raises(ModelError, match="refiner"):
        Morpher(refiner)
    lacking = tiny_xl_pipeline()
    lacking.tokenizer_2 = None
    with pytest.raises(ModelError, match="lacks tokenizer_2"):
        Morpher(lacking)


def test_the_published_architecture_has_70_blocks_and_36_of_them_mix() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128, cross_attention_dim=2048, block_out_channels=(320, 640, 1280), layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    pipe = tiny_xl_pipeline()
    backbone = StableDiffusionXL(pipe)
    backbone.network = unet
    blocks = [
        f"down_blocks.{b}.attentions.{i}.transformer_blocks.{t}"
        for b, n in ((1, 2), (2, 10))
        for i in range(2)
        for t in range(n)
    ]
    up = [
        f"up_blocks.{b}.attentions.{i}.transformer_blocks.{t}"
        for b, n in ((0, 10), (1, 2))
        for i in range(3)
        for t in range(n)
    ]
    blocks += [*up, *(f"mid_block.attentions.0.transformer_blocks.{t}" for t in range(10))]
    assert len(blocks) == 70
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    assert {*backbone.projections()} == {
        f"{x}.{attn}.{end}" for x in blocks for attn in ("attn1", "attn2") for end in ends
    }
    sites = backbone.attention_sites()
    assert [site.layer for site in sites] == [f"{x}.attn1.{end}" for x in up for end in ("to_k", "to_v")]
    assert len(sites) == 36 * 2 and {(site.rows, site.columns) for site in sites} == {("all", None)}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    pictures = [Image.effect_noise((64, 64), spread).convert("RGB") for spread in (20, 60)]
    morpher = Morpher(tiny_xl_pipeline().to("cuda", dtype))
    result = morpher(pictures, "x", 4, fit=FitConfig(rank=2, steps=2), sample=SampleConfig(steps=2))
    assert len(result.frames) == 4 and all(d == d for d in result.distances)
