"""Single files of the rectified flows: the transformer under its first names, the rest from the folder beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file
from test_models import original_vae
from test_single_file import SMALL, build, original_sd3
from torch import Tensor

from conftest import tiny_flux2_pipeline, tiny_flux_pipeline, tiny_pipeline, tiny_qwen_pipeline, tiny_z_image_pipeline
from diffmorpher import Morpher, SampleConfig, ScheduleConfig
from diffmorpher.errors import ModelError
from diffmorpher.models.loading import load_pipeline

PICTURES = [np.random.default_rng(k).integers(0, 256, (32, 32, 3), dtype=np.uint8) for k in range(2)]
UNET = "model.diffusion_model."
Weights = dict[str, Tensor]


# ---- the first names of each family's weights


class Renamed:
    """The weights of a transformer on their way to other names; each is to be taken once."""

    def __init__(self, transformer: Any) -> None:
        self.left: Weights = dict(transformer.state_dict())
        self.out: Weights = {}

    def move(self, theirs: str, ours: str, change: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        """A layer; the norms' weights are called scale."""
        for kind in [kind for kind in ("weight", "bias") if f"{ours}.{kind}" in self.left]:
            name = "scale" if theirs.endswith("_norm") else kind
            self.out[f"{theirs}.{name}"] = change(self.left.pop(f"{ours}.{kind}"))

    def fuse(self, theirs: str, ours: Iterable[str]) -> None:
        """Several layers as one matrix."""
        ours = list(ours)
        for kind in [kind for kind in ("weight", "bias") if f"{ours[0]}.{kind}" in self.left]:
            self.out[f"{theirs}.{kind}"] = torch.cat([self.left.pop(f"{each}.{kind}") for each in ours])

    def done(self) -> Weights:
        assert not self.left
        return {name: weight.clone().contiguous() for name, weight in self.out.items()}


def shift_first(scale_and_shift: Tensor) -> Tensor:
    return torch.cat(scale_and_shift.chunk(2)[::-1])


def joint_block(new: Renamed, i: int, fed: tuple[str, str]) -> None:
    """One of FLUX.1's and FLUX.2's blocks of picture and text; fed: the layers of its MLPs."""
    ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
    for side, qkv, out, norms, mlp in (
        ("img", ("to_q", "to_k", "to_v"), "to_out.0", ("norm_q", "norm_k"), "ff"),
        (
            "txt",
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            "to_add_out",
            ("norm_added_q", "norm_added_k"),
            "ff_context",
        ),
    ):
        new.fuse(f"{theirs}.{side}_attn.qkv", [f"{ours}.attn.{each}" for each in qkv])
        new.move(f"{theirs}.{side}_attn.proj", f"{ours}.attn.{out}")
        new.move(f"{theirs}.{side}_attn.norm.query_norm", f"{ours}.attn.{norms[0]}")
        new.move(f"{theirs}.{side}_attn.norm.key_norm", f"{ours}.attn.{norms[1]}")
        new.move(f"{theirs}.{side}_mlp.0", f"{ours}.{mlp}.{fed[0]}")
        new.move(f"{theirs}.{side}_mlp.2", f"{ours}.{mlp}.{fed[1]}")


def original_flux(transformer: Any) -> Weights:
    new = Renamed(transformer)
    for theirs, ours in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance")):
        new.move(f"{theirs}_in.in_layer", f"time_text_embed.{ours}_embedder.linear_1")
        new.move(f"{theirs}_in.out_layer", f"time_text_embed.{ours}_embedder.linear_2")
    new.move("img_in", "x_embedder")
    new.move("txt_in", "context_embedder")
    for i in range(transformer.config.num_layers):
        new.move(f"double_blocks.{i}.img_mod.lin", f"transformer_blocks.{i}.norm1.linear")
        new.move(f"double_blocks.{i}.txt_mod.lin", f"transformer_blocks.{i}.norm1_context.linear")
        joint_block(new, i, ("net.0.proj", "net.2"))
    for i in range(transformer.config.num_single_layers):
        ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        new.move(f"{theirs}.modulation.lin", f"{ours}.norm.linear")
        new.fuse(
            f"{theirs}.linear1", [f"{ours}.{each}" for each in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
        )
        new.move(f"{theirs}.linear2", f"{ours}.proj_out")
        new.move(f"{theirs}.norm.query_norm", f"{ours}.attn.norm_q")
        new.move(f"{theirs}.norm.key_norm", f"{ours}.attn.norm_k")
    new.move("final_layer.linear", "proj_out")
    new.move("final_layer.adaLN_modulation.1", "norm_out.linear", shift_first)
    return new.done()


def original_flux2(transformer: Any) -> Weights:
    new = Renamed(transformer)
    new.move("time_in.in_layer", "time_guidance_embed.timestep_embedder.linear_1")
    new.move("time_in.out_layer", "time_guidance_embed.timestep_embedder.linear_2")
    new.move("img_in", "x_embedder")
    new.move("txt_in", "context_embedder")
    for stream in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        new.move(f"{stream}.lin", f"{stream}.linear")
    for i in range(transformer.config.num_layers):
        joint_block(new, i, ("linear_in", "linear_out"))
    for i in range(transformer.config.num_single_layers):
        ours, theirs = f"single_transformer_blocks.{i}.attn", f"single_blocks.{i}"
        new.move(f"{theirs}.linear1", f"{ours}.to_qkv_mlp_proj")
        new.move(f"{theirs}.linear2", f"{ours}.to_out")
        new.move(f"{theirs}.norm.query_norm", f"{ours}.norm_q")
        new.move(f"{theirs}.norm.key_norm", f"{ours}.norm_k")
    new.move("final_layer.linear", "proj_out")
    new.move("final_layer.adaLN_modulation.1", "norm_out.linear", shift_first)
    return new.done()


def original_z_image(transformer: Any) -> Weights:
    new = Renamed(transformer)
    for block in {".".join(key.split(".")[:2]) for key in new.left if ".attention.to_q." in key}:
        new.fuse(f"{block}.attention.qkv", [f"{block}.attention.to_{each}" for each in "qkv"])
        new.move(f"{block}.attention.out", f"{block}.attention.to_out.0")
        for each in "qk":
            new.out[f"{block}.attention.{each}_norm.weight"] = new.left.pop(f"{block}.attention.norm_{each}.weight")
    for part in ("x_embedder", "final_layer"):
        for key in [key for key in new.left if key.startswith(f"all_{part}.2-1.")]:
            new.out[key.replace(f"all_{part}.2-1.", f"{part}.")] = new.left.pop(key)
    new.out |= new.left  # the others' names are the first ones
    new.left = {}
    return new.done()


def original_qwen(transformer: Any) -> Weights:
    """diffusers' names are the published ones."""
    return {name: weight.clone() for name, weight in transformer.state_dict().items()}


FAMILIES: dict[str, tuple[Callable[..., Any], Callable[[Any], Weights]]] = {
    "flux": (tiny_flux_pipeline, original_flux),
    "flux2": (tiny_flux2_pipeline, original_flux2),
    "z-image": (tiny_z_image_pipeline, original_z_image),
    "qwen": (tiny_qwen_pipeline, original_qwen),
}


@pytest.fixture(autouse=True)
def tiny_flux_converter(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' converter of FLUX.1 has the published width written into it: here it is that of the tiny one."""
    convert = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    assert 3072 in convert.__code__.co_consts
    width = tuple(32 if constant == 3072 else constant for constant in convert.__code__.co_consts)
    monkeypatch.setattr(convert, "__code__", convert.__code__.replace(co_consts=width))


def film(model: Path) -> list[Any]:
    morpher = Morpher.from_pretrained(model, device="cpu", dtype="float32")
    quick: dict[str, Any] = {"fit": None, "sample": SampleConfig(steps=2), "schedule": ScheduleConfig(enabled=False)}
    return [np.asarray(frame) for frame in morpher(PICTURES, "a cat", 3, size=(32, 32), **quick).frames]


def beside(pipe: Any, place: Path, weights: Weights, *lost: str) -> Path:
    """A file with these weights, and beside it the pipeline's folder, whose lost parts have their configuration alone."""
    pipe.save_pretrained(place)
    for part in lost:
        (weights_of_it,) = (place / part).glob("*.safetensors")
        weights_of_it.unlink()
    save_file(weights, place.with_suffix(".safetensors"))
    return place.with_suffix(".safetensors")


def same(want: list[Any], got: list[Any]) -> bool:
    assert not np.array_equal(want[0], want[-1])
    return all(np.array_equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_files_film_is_that_of_the_folder_it_belongs_to(family: str, tmp_path: Path) -> None:
    make, original = FAMILIES[family]
    pipe = make()
    pipe.save_pretrained(tmp_path / "whole")
    weights = original(pipe.transformer)
    file = beside(pipe, tmp_path / "base", weights, "transformer")
    assert same(film(tmp_path / "whole"), film(file))
    among_others = {UNET + key: weight for key, weight in weights.items()}  # as ComfyUI writes whole checkpoints
    among_others |= dict.fromkeys(("vae.decoder.conv_in.bias", "vae.double_blocks.9.x"), torch.zeros(1))
    save_file({key: weight.clone() for key, weight in among_others.items()}, file)
    loaded, _ = load_pipeline(str(file), torch.device("cpu"), "float32")
    got, want = loaded.transformer.state_dict(), pipe.transformer.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_that_lacks_weights_is_said_so_in_one_sentence(family: str, tmp_path: Path) -> None:
    make, original = FAMILIES[family]
    pipe = make()
    weights = original(pipe.transformer)
    del weights[max(key for key in weights if "blocks.1." in key or "layers.1." in key)]
    file = beside(pipe, tmp_path / "base", weights, "transformer")
    with pytest.raises(ModelError, match=r"^base\.safetensors is not a whole .*: take another copy.*\.$") as caught:
        Morpher.from_pretrained(file, device="cpu")
    assert "\n" not in str(caught.value)


def test_plain_8_bit_weights_are_read_and_scaled_ones_refused(tmp_path: Path) -> None:
    """diffusers casts the one, and drops the other's scales without a word."""
    pipe = tiny_qwen_pipeline()
    pipe.transformer.to(torch.float8_e4m3fn).to(torch.float32)  # what eight bits hold
    pipe.save_pretrained(tmp_path / "whole")
    weights = {key: w.to(torch.float8_e4m3fn) for key, w in original_qwen(pipe.transformer).items()}
    assert same(film(tmp_path / "whole"), film(beside(pipe, tmp_path / "base", weights, "transformer")))
    for mark in (
        "scaled_fp8",
        "transformer_blocks.0.attn.to_q.weight.absmax",
        "transformer_blocks.0.attn.to_q.scale_weight",
        "transformer_blocks.0.attn.to_q.weight_scale",
    ):
        save_file(weights | {UNET + mark: torch.ones(1)}, tmp_path / "base.safetensors")
        with pytest.raises(
            ModelError, match=r"base\.safetensors holds weights with scales .*: take the same model in bfloat16"
        ):
            Morpher.from_pretrained(tmp_path / "base.safetensors", device="cpu")


# ---- whole files, with text encoders and autoencoder


def small_sd3(t5: bool) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2, pos_embed_max_size=8,
        joint_attention_dim=96, caption_projection_dim=16, pooled_projection_dim=32 + 48,
    ).eval()  # fmt: skip
    base = tiny_pipeline()
    about = base.text_encoder.config.to_dict()
    first, second = (  # diffusers tells them apart by their widths
        transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(**about | {"hidden_size": width, "projection_dim": width})
        ).eval()
        for width in (32, 48)
    )
    torch.nn.init.eye_(first.text_projection.weight)  # which the files leave out
    third = transformers.T5Config(
        vocab_size=len(base.tokenizer), d_model=96, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=build("sd1", "vae", **SMALL["vae"], latent_channels=16),
        text_encoder=first,
        tokenizer=base.tokenizer,
        text_encoder_2=second,
        tokenizer_2=base.tokenizer,
        text_encoder_3=transformers.T5EncoderModel(third).eval() if t5 else None,
        tokenizer_3=base.tokenizer if t5 else None,
    )


def text_encoders(**encoders: Any) -> Weights:
    """The text encoders as Stable Diffusion 3's files have them, T5 by its own names."""
    out: Weights = {}
    for name, encoder in encoders.items():
        for key, weight in encoder.state_dict().items():
            own = key if name == "t5xxl" or key.startswith("text_") else f"text_model.{key}"
            out[f"text_encoders.{name}.transformer.{own}"] = weight.clone().contiguous()
    return out


@pytest.mark.parametrize("t5", [False, True], ids=["clips", "clips and T5"])
def test_stable_diffusion_3_with_its_text_encoders_in_the_file(t5: bool, tmp_path: Path) -> None:
    """The folder beside it has no weights at all. Without T5 the whole folder can be loaded too, which diffusers cannot."""
    pipe = small_sd3(t5)
    pipe.save_pretrained(tmp_path / "whole")
    weights = original_sd3(pipe.transformer) | {f"first_stage_model.{k}": w for k, w in original_vae(pipe.vae).items()}
    weights |= text_encoders(clip_l=pipe.text_encoder, clip_g=pipe.text_encoder_2)
    weights |= text_encoders(t5xxl=pipe.text_encoder_3) if t5 else {}
    del weights["text_encoders.clip_l.transformer.text_projection.weight"]
    lost = ("transformer", "vae", "text_encoder", "text_encoder_2", *(["text_encoder_3"] if t5 else []))
    assert same(film(tmp_path / "whole"), film(beside(pipe, tmp_path / "base", weights, *lost)))


def test_flux_with_its_text_encoders_in_the_file(tmp_path: Path) -> None:
    pipe = tiny_flux_pipeline()
    pipe.save_pretrained(tmp_path / "whole")
    weights = {UNET + key: weight for key, weight in original_flux(pipe.transformer).items()}
    weights |= {f"vae.{key}": weight for key, weight in original_vae(pipe.vae).items()}
    weights |= text_encoders(clip_l=pipe.text_encoder, t5xxl=pipe.text_encoder_2)
    file = beside(pipe, tmp_path / "base", weights, "transformer", "vae", "text_encoder", "text_encoder_2")
    assert same(film(tmp_path / "whole"), film(file))
