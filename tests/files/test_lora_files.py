"""LoRA files: diffusers loads what is written here, and every layout is read; diffusers and PEFT are the oracle."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import diffmorpher
from conftest import tiny_xl_pipeline
from diffmorpher.errors import ConfigError, LoraError, OutputError
from diffmorpher.files.loras import Lora, load_lora, save_lora
from diffmorpher.method.lora import LoraBank

MINI = Path(diffmorpher.__file__).parent / "assets" / "mini"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
METADATA = {"prompt": "a café", "model": "mini", "rank": "4", "image_hash": "ab12", "seed": "7", "start": "f00d"}


def tiny_unet(**options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=32,
        use_linear_projection=True,
        **options,
    )


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return tiny_unet().eval()


@pytest.fixture(scope="module")
def mini() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(
        MINI, safety_checker=None, feature_extractor=None, local_files_only=True
    )


@pytest.fixture
def pipe(mini: StableDiffusionPipeline, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """A whole diffusers pipeline round a copy of the tiny U-Net."""
    parts = mini.components | {"unet": copy.deepcopy(unet), "text_encoder": copy.deepcopy(mini.text_encoder)}
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def linear_layers(module: nn.Module, suffixes: tuple[str, ...] = ("",)) -> dict[str, nn.Linear]:
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear) and n.endswith(suffixes)}


def random_lora(module: nn.Module, suffixes: tuple[str, ...] = ATTENTION, ranks: tuple[int, ...] = (4,)) -> Lora:
    generator = torch.Generator().manual_seed(1)
    down, up = {}, {}
    for i, (name, layer) in enumerate(linear_layers(module, suffixes).items()):
        rank = ranks[i % len(ranks)]
        down[name] = torch.randn(rank, layer.in_features, generator=generator) / 8
        up[name] = torch.randn(layer.out_features, rank, generator=generator) / 8
    return Lora(down, up, METADATA)


@torch.no_grad()
def output(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 3, 32, generator=generator)
    return unet(sample, 500, text).sample


@torch.no_grad()
def output_with(unet: nn.Module, lora: Lora) -> Tensor:
    """The oracle: every layer's weight with up @ down added to it."""
    unet = copy.deepcopy(unet)
    for name, up in lora.up.items():
        unet.get_submodule(name).weight += up @ lora.down[name]
    return output(unet)


def assert_same(actual: Lora, expected: Lora) -> None:
    assert actual.down.keys() == actual.up.keys() == expected.down.keys()
    for side in ("down", "up"):
        for name, tensor in getattr(expected, side).items():
            torch.testing.assert_close(getattr(actual, side)[name], tensor, rtol=0, atol=0)


# ---- written files


def test_round_trip(unet, tmp_path):
    lora = random_lora(unet)
    assert len(lora.down) > 10
    path = tmp_path / "new" / "folders" / "cat.safetensors"
    assert save_lora(lora, str(path)) == path
    loaded = load_lora(path)
    assert_same(loaded, lora)
    assert loaded.metadata == METADATA
    assert [p.name for p in path.parent.iterdir()] == ["cat.safetensors"]


def test_metadata_may_be_absent(unet, tmp_path):
    lora = Lora(random_lora(unet).down, random_lora(unet).up, {})
    assert load_lora(save_lora(lora, tmp_path / "x.safetensors")).metadata == {}


def test_layout_is_what_diffusers_writes(unet, tmp_path):
    adapted = copy.deepcopy(unet)
    adapted.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=list(ATTENTION)))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(adapted))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, weight_name="theirs.safetensors")
    ours = load_file(save_lora(random_lora(unet), tmp_path / "ours.safetensors", "diffusers"))
    theirs = load_file(tmp_path / "theirs.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
    with safe_open(tmp_path / "ours.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"} | {f"diffmorpher.{k}": v for k, v in METADATA.items()}


def test_equal_loras_give_equal_bytes(unet, tmp_path):
    lora = random_lora(unet)
    contents = {save_lora(lora, tmp_path / f"{i}.safetensors").read_bytes() for i in range(8)}
    assert len(contents) == 1
    size = struct.unpack("<Q", contents.pop()[:8])[0]
    assert size % 8 == 0  # the tensors lie aligned, as the safetensors format recommends


def test_saves_tensors_of_any_make(tmp_path):
    """Half precision, gradients, other strides, memory shared between layers: all become plain float32."""
    down = torch.randn(6, 4, dtype=torch.float16).T.requires_grad_()
    up = torch.randn(2, 5, 4)[1]
    names = [LAYER, LAYER.replace("attn1", "attn2")]
    path = save_lora(Lora({n: down for n in names}, {n: up for n in names}, {}), tmp_path / "x.safetensors")
    for tensor in load_file(path).values():
        assert tensor.dtype == torch.float32
    loaded = load_lora(path)
    for name in names:
        assert torch.equal(loaded.down[name], down.detach().float()) and torch.equal(loaded.up[name], up)


def test_save_reports_where_it_cannot_write(unet, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "x.safetensors", tmp_path / "folder"):
        with pytest.raises(OutputError, match=f"The LoRA {path} cannot be written "):
            save_lora(random_lora(unet), path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_failed_save_keeps_the_old_file(unet, tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")

    def full(self: Path, data: bytes) -> None:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left"):
        save_lora(random_lora(unet), path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# ---- diffusers reads what is written here


@pytest.mark.parametrize(("suffixes", "ranks"), [(ATTENTION, (4,)), (("",), (4, 2, 3))], ids=["attention", "all"])
def test_diffusers_loads_our_file(unet, pipe, tmp_path, suffixes, ranks):
    lora = random_lora(unet, suffixes, ranks)
    pipe.load_lora_weights(save_lora(lora, tmp_path / "x.safetensors"))
    expected = output_with(unet, lora)
    assert (expected - output(unet)).abs().max() > 1e-2
    torch.testing.assert_close(output(pipe.unet), expected, rtol=0, atol=1e-5)


def comfyuis_layers(keys: set[str], network: nn.Module) -> set[str]:
    """The layers of a file that ComfyUI's loader knows, by its rule: diffusers' paths behind `lora_unet_` without their dots,
    or with "processor" before the last part."""
    known = {}
    for path in linear_layers(network, ("",)):
        known["lora_unet_" + path.replace(".", "_")] = path
        known["unet." + path.replace(".to_", ".processor.to_").removesuffix(".0")] = path
    ends = (".lora_up.weight", "_lora.up.weight", ".lora_linear_layer.up.weight")
    return {
        key.removesuffix(end) for key in keys for end in ends if key.removesuffix(end) in known and key.endswith(end)
    }


def test_the_format_is_the_one_that_most_programs_read(unet, pipe, tmp_path):
    lora = random_lora(unet)
    kohyas = save_lora(lora, tmp_path / "kohya.safetensors")
    diffusers = save_lora(lora, tmp_path / "diffusers.safetensors", format="diffusers")
    assert len(comfyuis_layers(set(load_file(kohyas)), unet)) == len(lora.down)
    assert len(comfyuis_layers(set(load_file(diffusers)), unet)) == 0
    assert kohyas.read_bytes() == save_lora(lora, tmp_path / "k.safetensors", format="kohya").read_bytes()
    expected = output_with(unet, lora)
    for file in (kohyas, diffusers):
        assert_same(load_lora(file), lora)
        assert load_lora(file).metadata == METADATA
        pipe.load_lora_weights(file)
        torch.testing.assert_close(output(pipe.unet), expected, rtol=0, atol=1e-5)
        pipe.unload_lora_weights()


def test_sdxls_format_has_stabilitys_names(tmp_path):
    """The oracle is diffusers' own reader, whose names for SDXL's blocks are those of the U-Net that it loads into."""
    pipe = tiny_xl_pipeline()
    names = [n for n in linear_layers(pipe.unet, ATTENTION)]
    rank = {n: torch.randn(2, linear_layers(pipe.unet, ATTENTION)[n].in_features) for n in names}
    lora = Lora(rank, {n: torch.randn(linear_layers(pipe.unet, ATTENTION)[n].out_features, 2) for n in names}, {})
    file = save_lora(lora, tmp_path / "x.safetensors", format="kohya")
    keys = set(load_file(file))
    blocks = {
        re.match(r"lora_unet_(input_blocks_\d+|middle_block|output_blocks_\d+)_1_transformer_blocks_\d", k)[1]
        for k in keys
    }
    assert blocks == {
        "input_blocks_4",
        "input_blocks_5",
        "middle_block",
        "output_blocks_0",
        "output_blocks_1",
        "output_blocks_2",
    }
    assert_same(load_lora(file), lora)
    pipe.load_lora_weights(str(file))
    assert {
        n.removesuffix(".lora_A.default_0") for n, _ in pipe.unet.named_modules() if n.endswith("lora_A.default_0")
    } == set(names)


def test_kohyas_format_is_for_unets(tmp_path):
    lora = Lora(
        {"transformer_blocks.0.attn.to_q": torch.ones(1, 4)}, {"transformer_blocks.0.attn.to_q": torch.ones(4, 1)}, {}
    )
    assert next(iter(load_file(save_lora(lora, tmp_path / "x.safetensors")))).startswith(
        "transformer.transformer_blocks"
    )
    with pytest.raises(ConfigError, match="kohya's format is for U-Nets"):
        save_lora(lora, tmp_path / "y.safetensors", format="kohya")
    with pytest.raises(ConfigError, match="the format is 'comfy', but must be"):
        save_lora(lora, tmp_path / "y.safetensors", format="comfy")
    assert not (tmp_path / "y.safetensors").exists()


# ---- files that diffusers and PEFT write are read


def adapted(unet: UNet2DConditionModel, **options: Any) -> UNet2DConditionModel:
    """A copy with a PEFT adapter whose matrices are random."""
    torch.manual_seed(3)
    unet = copy.deepcopy(unet)
    unet.add_adapter(LoraConfig(target_modules=[*ATTENTION, "proj_in"], init_lora_weights=False, **options))
    return unet


SCALES = {
    "alpha": {"r": 4, "lora_alpha": 10},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"attn2.to_k": 2},
        # "attn2" names no linear layer and must match none
        "alpha_pattern": {"attn2": 99, "attn1.to_q": 1, "^" + LAYER.replace("to_q", "to_v"): 12, "to_k": 5},
    },
}


@pytest.mark.parametrize("options", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("writer", ["pipeline", "unet"])
def test_reads_what_diffusers_writes(unet, tmp_path, options, writer):
    theirs = adapted(unet, **options)
    if writer == "pipeline":
        StableDiffusionPipeline.save_lora_weights(
            tmp_path,
            unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(theirs)),
            unet_lora_adapter_metadata=theirs.peft_config["default"].to_dict(),
        )
    else:
        theirs.save_lora_adapter(tmp_path)
    lora = load_lora(tmp_path / "pytorch_lora_weights.safetensors")
    assert LAYER in lora.down and lora.metadata == {}
    torch.testing.assert_close(output_with(unet, lora), output(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", SCALES.values(), ids=SCALES)
def test_reads_what_peft_writes(unet, tmp_path, options):
    torch.manual_seed(3)
    config = LoraConfig(target_modules=[*ATTENTION, "proj_in"], init_lora_weights=False, **options)
    theirs = get_peft_model(copy.deepcopy(unet), config)
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        lora = load_lora(tmp_path / "adapter_model.safetensors")
    torch.testing.assert_close(output_with(unet, lora), output(theirs), rtol=0, atol=1e-5)
    (tmp_path / "adapter_config.json").rename(tmp_path / "elsewhere.json")
    with pytest.warns(UserWarning, match=r"adapter_model.safetensors: no adapter_config.json .* scale is taken as 1"):
        unscaled = load_lora(tmp_path / "adapter_model.safetensors")
    assert torch.equal(unscaled.up[LAYER], load_file(tmp_path / "adapter_model.safetensors")[
        f"base_model.model.{LAYER}.lora_B.weight"
    ])  # fmt: skip


def test_skips_the_text_encoder_of_a_diffusers_file(unet, mini, tmp_path):
    theirs = adapted(unet, r=4, lora_alpha=8)
    text_encoder = copy.deepcopy(mini.text_encoder)
    text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"]))
    count = len([n for n, m in mini.text_encoder.named_modules() if n.endswith(("q_proj", "v_proj"))])
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(theirs)),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(text_encoder)),
        unet_lora_adapter_metadata=theirs.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=text_encoder.peft_config["default"].to_dict(),
    )
    with pytest.warns(UserWarning) as caught:
        lora = load_lora(tmp_path / "pytorch_lora_weights.safetensors")
    assert [str(w.message) for w in caught] == [
        f"{tmp_path / 'pytorch_lora_weights.safetensors'}: LoRA layers skipped: {count} text-encoder; "
        "only layers of the U-Net or transformer are used."
    ]
    torch.testing.assert_close(output_with(unet, lora), output(theirs), rtol=0, atol=1e-5)


# ---- every layout, written here from the same tensors


def old(name: str, side: str) -> str:
    """Diffusers before PEFT, and the published DiffMorpher: the projection belongs to the attention's processor."""
    attention, projection = name.removesuffix(".0").rsplit(".", 1)
    return f"{attention}.processor.{projection}_lora.{side}.weight"


def kohya(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


AB = {"down": "A", "up": "B"}
LAYOUTS: dict[str, Callable[[str, str], str]] = {
    "diffusers": lambda name, side: f"unet.{name}.lora.{side}.weight",
    "diffusers, U-Net alone": lambda name, side: f"{name}.lora.{side}.weight",
    "old diffusers": lambda name, side: "unet." + old(name, side),
    "old diffusers, U-Net alone": old,
    "PEFT": lambda name, side: f"unet.{name}.lora_{AB[side]}.weight",
    "PEFT, U-Net alone": lambda name, side: f"{name}.lora_{AB[side]}.weight",
    "PEFT, adapter named": lambda name, side: f"unet.{name}.lora_{AB[side]}.default.weight",
    "kohya": lambda name, side: f"{kohya(name)}.lora_{side}.weight",
}


def tensors_of(lora: Lora, key: Callable[[str, str], str]) -> dict[str, Tensor]:
    return {key(n, side): t.clone() for side in ("down", "up") for n, t in getattr(lora, side).items()}


@pytest.mark.parametrize("container", ["safetensors", "zip", "pickle"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_reads_every_layout(unet, tmp_path, layout, container):
    """Whatever the file is called: its content tells what it is."""
    lora = random_lora(unet, ranks=(4, 2))
    tensors = tensors_of(lora, layout)
    path = tmp_path / ("lora.ckpt" if container == "safetensors" else "lora.safetensors")
    if container == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=container == "zip")
    with warnings.catch_warnings(action="error"):
        loaded = load_lora(path)
    assert_same(loaded, lora)
    assert loaded.metadata == {}


@pytest.mark.parametrize("adapter", ["", ".default"])
def test_reads_peft_prefix_with_adapter_name(unet, tmp_path, adapter):
    lora = random_lora(unet)
    path = tmp_path / "adapter_model.safetensors"
    save_file(tensors_of(lora, lambda n, side: f"base_model.model.unet.{n}.lora_{AB[side]}{adapter}.weight"), path)
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
    assert_same(load_lora(path), Lora(lora.down, {n: 2 * up for n, up in lora.up.items()}, {}))


def test_alpha_in_the_header_needs_no_file_beside(unet, tmp_path):
    lora = random_lora(unet)
    tensors = tensors_of(lora, lambda n, side: f"base_model.model.{n}.lora_{AB[side]}.weight")
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": '{"lora_alpha": 8}'})
    with warnings.catch_warnings(action="error"):
        alone = load_lora(tmp_path / "x.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 100}')
    for loaded in (alone, load_lora(tmp_path / "x.safetensors")):
        assert_same(loaded, Lora(lora.down, {n: 2 * up for n, up in lora.up.items()}, {}))


def test_reads_the_published_ckpt(pipe, unet, tmp_path):
    """Keys of the published DiffMorpher's files, in a torch checkpoint; diffusers' own loader agrees on the meaning."""
    lora = random_lora(unet)
    tensors = tensors_of(lora, LAYOUTS["old diffusers"])
    assert f"unet.{LAYER.removesuffix('.to_q')}.processor.to_out_lora.up.weight" in tensors
    torch.save(tensors, tmp_path / "lora_0.ckpt")
    assert_same(load_lora(tmp_path / "lora_0.ckpt"), lora)
    pipe.load_lora_weights(dict(tensors))
    torch.testing.assert_close(output(pipe.unet), output_with(unet, lora), rtol=0, atol=1e-5)


def test_kohya_alpha_means_what_diffusers_takes_it_for(pipe, unet, tmp_path):
    lora = random_lora(unet)
    tensors = tensors_of(lora, LAYOUTS["kohya"]) | {f"{kohya(n)}.alpha": torch.tensor(1.0) for n in lora.down}
    path = tmp_path / "kohya.safetensors"
    save_file(tensors, path, {"ss_network_dim": "4", "format": "pt"})
    loaded = load_lora(path)
    assert_same(loaded, Lora(lora.down, {n: up / 4 for n, up in lora.up.items()}, {}))
    pipe.load_lora_weights(path)
    torch.testing.assert_close(output(pipe.unet), output_with(unet, loaded), rtol=0, atol=1e-5)


def test_kohya_alpha_is_per_layer_and_optional(unet, tmp_path):
    lora = random_lora(unet, ranks=(4, 2))
    scaled = LAYER.replace("to_q", "to_k")
    tensors = tensors_of(lora, LAYOUTS["kohya"])
    tensors[f"{kohya(LAYER)}.alpha"] = torch.tensor(16.0, dtype=torch.float16)
    tensors[f"{kohya(scaled)}.alpha"] = torch.tensor([1])
    save_file(tensors, tmp_path / "x.safetensors")
    up = dict(lora.up)
    up[LAYER] = up[LAYER] * (16 / lora.down[LAYER].shape[0])
    up[scaled] = up[scaled] * (1 / lora.down[scaled].shape[0])
    assert_same(load_lora(tmp_path / "x.safetensors"), Lora(lora.down, up, {}))


def test_kohya_names_of_every_layer(tmp_path):
    """The oracle is the U-Net itself, SD and SDXL: the names of all its layers survive the loss of their dots."""
    sdxl = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    sdxl |= {"projection_class_embeddings_input_dim": 96, "transformer_layers_per_block": 12}
    with torch.device("meta"):
        networks = [tiny_unet(), tiny_unet(**sdxl)]
    for network in networks:
        names = [n for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        assert any("proj_in" in n for n in names) and any("ff.net.0.proj" in n for n in names)
        tensors = {f"{kohya(n)}.lora_down.weight": torch.ones(1, 2) for n in names}
        tensors |= {f"{kohya(n)}.lora_up.weight": torch.ones(3, 1) for n in names}
        path = tmp_path / "x.ckpt"
        torch.save(tensors, path)
        assert list(load_lora(path).down) == sorted(names)
    assert "add_embedding.linear_1" in names


def test_linear_layers_written_as_1x1_convolutions(unet, tmp_path):
    lora = random_lora(unet)
    tensors = tensors_of(lora, LAYOUTS["kohya"])
    save_file({k: t[..., None, None] for k, t in tensors.items()}, tmp_path / "x.safetensors")
    assert_same(load_lora(tmp_path / "x.safetensors"), lora)


def test_pickled_tensors_of_any_make(unet, tmp_path):
    """A checkpoint may hold parameters and other strides."""
    lora = random_lora(unet)
    tensors = tensors_of(lora, LAYOUTS["diffusers"])
    torch.save({k: nn.Parameter(t.T.contiguous()).T for k, t in tensors.items()}, tmp_path / "x.ckpt")
    loaded = load_lora(tmp_path / "x.ckpt")
    assert_same(loaded, lora)
    assert all(t.is_contiguous() and not t.requires_grad for t in (*loaded.down.values(), *loaded.up.values()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(unet, tmp_path, dtype):
    lora = random_lora(unet)
    save_file({k: t.to(dtype) for k, t in tensors_of(lora, LAYOUTS["diffusers"]).items()}, tmp_path / "x.safetensors")
    loaded = load_lora(tmp_path / "x.safetensors")
    assert {t.dtype for t in (*loaded.down.values(), *loaded.up.values())} == {torch.float32}
    assert torch.equal(loaded.up[LAYER], lora.up[LAYER].to(dtype).float())


def test_needs_neither_diffusers_nor_peft(unet, tmp_path):
    path = save_lora(random_lora(unet), tmp_path / "x.safetensors")
    code = f"""
import sys
from diffmorpher.files.loras import load_lora, save_lora
save_lora(load_lora({str(path)!r}), {str(tmp_path / "y.safetensors")!r})
assert not {{"diffusers", "peft", "transformers"}} & sys.modules.keys()
"""
    environment = os.environ | {"PYTHONPATH": str(Path(diffmorpher.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert (tmp_path / "y.safetensors").read_bytes() == path.read_bytes()


# ---- what is left out, and what is refused


def pair(layer: str, rank: int = 2) -> dict[str, Tensor]:
    return {f"{layer}.lora_down.weight": torch.ones(rank, 3), f"{layer}.lora_up.weight": torch.ones(5, rank)}


def test_skips_what_is_no_layer_of_the_unet(tmp_path):
    tensors = pair(kohya(LAYER)) | pair("lora_te_text_model_encoder_layers_0_self_attn_q_proj") | pair("bundle_emb")
    tensors |= {f"lora_te{i}_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0) for i in (1, 2)}
    tensors |= {f"{LAYER}.lora_A.weight.absmax": torch.ones(1)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    with pytest.warns(UserWarning) as caught:
        lora = load_lora(path)
    assert list(lora.down) == list(lora.up) == [LAYER]
    assert [str(w.message) for w in caught] == [
        f"{path}: LoRA layers skipped: 2 other, 3 text-encoder; only layers of the U-Net or transformer are used."
    ]
    assert caught[0].filename == __file__


def random_locon(unet: nn.Module) -> Lora:
    """Of linear layers and convolutions."""
    generator, lora = torch.Generator().manual_seed(2), random_lora(unet)
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Conv2d):
            kernel = layer.kernel_size if max(layer.kernel_size) > 1 else ()
            lora.down[name] = torch.randn(3, layer.in_channels, *kernel, generator=generator) / 16
            lora.up[name] = torch.randn(layer.out_channels, 3, generator=generator) / 16
    return lora


def locon_tensors(lora: Lora, unet: nn.Module) -> dict[str, Tensor]:
    """In LyCORIS' form: the factors of a convolution are convolutions, the second one of 1 x 1."""
    tensors = {}
    for name, down in lora.down.items():
        tensors[f"{kohya(name)}.alpha"] = torch.tensor(2.0)
        for side, factor in (("down", down), ("up", lora.up[name])):
            if isinstance(unet.get_submodule(name), nn.Conv2d) and factor.ndim == 2:
                factor = factor[:, :, None, None]
            tensors[f"{kohya(name)}.lora_{side}.weight"] = factor.clone()
    return tensors


def test_convolutions_mean_what_diffusers_takes_them_for(pipe, unet, tmp_path):
    """LoCon, LCM's own and others: the picture is another one without their convolutions."""
    locon = random_locon(unet)
    file = tmp_path / "locon.safetensors"
    save_file(locon_tensors(locon, unet), file)
    with warnings.catch_warnings(action="error"):
        loaded = load_lora(file)
    assert {n for n, m in unet.named_modules() if isinstance(m, nn.Conv2d)} < set(loaded.down)
    pipe.load_lora_weights(file)
    theirs = output(pipe.unet)
    bank = LoraBank.stack([loaded], unet, ["locon"])
    with bank.attached(unet):
        ours = output(unet)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    for name in loaded.down:
        if loaded.down[name].ndim == 4:
            loaded.up[name].zero_()
    with LoraBank.stack([loaded], unet, ["locon"]).attached(unet):
        assert (output(unet) - theirs).abs().max() > 0.05


def test_convolutions_round_trip_and_load_in_diffusers(pipe, unet, tmp_path):
    locon = random_locon(unet)
    for name in [name for name in locon.down if name.endswith("conv_shortcut")]:  # of 1 x 1, written as linear layers
        del locon.down[name], locon.up[name]
    file = save_lora(locon, tmp_path / "locon.safetensors")
    assert_same(load_lora(file), locon)
    pipe.load_lora_weights(file)
    with LoraBank.stack([locon], unet, ["locon"]).attached(unet):
        torch.testing.assert_close(output(unet), output(pipe.unet), rtol=0, atol=2e-5)


def test_a_convolution_in_three_factors_is_their_product(tmp_path):
    generator = torch.Generator().manual_seed(0)
    conv = "lora_unet_down_blocks_0_resnets_0_conv2"
    down, mid, up = (torch.randn(shape, generator=generator) for shape in ((2, 6, 1, 1), (4, 2, 3, 3), (5, 4, 1, 1)))
    save_file(
        {f"{conv}.lora_{n}.weight": t for n, t in (("down", down), ("mid", mid), ("up", up))},
        tmp_path / "x.safetensors",
    )
    lora = load_lora(tmp_path / "x.safetensors")
    x = torch.randn(1, 6, 8, 8, generator=generator)
    conv2d = nn.functional.conv2d
    expected = conv2d(conv2d(conv2d(x, down), mid, padding=1), up)
    (name,) = lora.down
    ours = conv2d(conv2d(x, lora.down[name], padding=1), lora.up[name][:, :, None, None])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


#: Names of Stability's own code for Stable Diffusion 1's U-Net, and diffusers', as the published conversion pairs them.
SGM_NAMES = {
    "input_blocks.0.0": "conv_in",
    "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
    "input_blocks.1.0.emb_layers.1": "down_blocks.0.resnets.0.time_emb_proj",
    "input_blocks.1.1.proj_in": "down_blocks.0.attentions.0.proj_in",
    "input_blocks.2.1.transformer_blocks.0.attn1.to_q": "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.8.1.transformer_blocks.0.ff.net.0.proj": "down_blocks.2.attentions.1.transformer_blocks.0.ff.net.0.proj",
    "input_blocks.11.0.out_layers.3": "down_blocks.3.resnets.1.conv2",
    "middle_block.0.out_layers.3": "mid_block.resnets.0.conv2",
    "middle_block.1.transformer_blocks.0.attn2.to_out.0": "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "middle_block.2.emb_layers.1": "mid_block.resnets.1.time_emb_proj",
    "output_blocks.0.0.skip_connection": "up_blocks.0.resnets.0.conv_shortcut",
    "output_blocks.2.1.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.5.1.proj_out": "up_blocks.1.attentions.2.proj_out",
    "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks.11.1.transformer_blocks.0.attn2.to_k": "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_k",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.2": "conv_out",
}


@pytest.mark.parametrize(
    "form",
    [
        "lora_unet_{}.lora_{}.weight",
        "diffusion_model.{}.lora_{}.weight",
        "model.diffusion_model.{}.lora_{}.weight",
        "unet.{}.lora_{}.weight",
    ],
)
def test_reads_stabilitys_own_names(tmp_path, form):
    tensors, expected = {}, {}
    for i, (original, name) in enumerate(SGM_NAMES.items()):
        called = original.replace(".", "_") if form.startswith("lora_unet") else original
        tensors |= {
            form.format(called, "down"): torch.full((1, 2), i + 1.0),
            form.format(called, "up"): torch.ones(3, 1),
        }
        expected[name] = i + 1.0
    save_file(tensors, tmp_path / "x.safetensors")
    with warnings.catch_warnings(action="error"):
        lora = load_lora(tmp_path / "x.safetensors")
    assert {name: float(down[0, 0]) for name, down in lora.down.items()} == expected


def test_reads_diffusers_names_behind_that_of_the_original_model(unet, tmp_path):
    lora = random_lora(unet)
    save_file(
        tensors_of(lora, lambda n, side: f"diffusion_model.{n}.lora_{AB[side]}.weight"), tmp_path / "x.safetensors"
    )
    assert_same(load_lora(tmp_path / "x.safetensors"), lora)


def test_reads_a_checkpoint_that_nests_its_tensors(unet, tmp_path):
    lora = random_lora(unet)
    tensors = tensors_of(lora, LAYOUTS["kohya"])
    for content in ({"state_dict": tensors, "epoch": 3}, {"state_dict": {"state_dict": tensors}}):
        torch.save(content, tmp_path / "x.ckpt")
        assert_same(load_lora(tmp_path / "x.ckpt"), lora)
    itself: dict[str, Any] = {}
    itself["state_dict"] = {"state_dict": {"epoch": 1}}
    torch.save(itself, tmp_path / "x.ckpt")
    with pytest.raises(LoraError, match="holds no LoRA weights"):
        load_lora(tmp_path / "x.ckpt")


def test_an_embedding_is_named_for_what_it_is(tmp_path):
    vectors = torch.ones(2, 8)
    for tensors in ({"emb_params": vectors}, {"clip_l": vectors, "clip_g": vectors}, {"<cat>": vectors}):
        save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / "x.safetensors")
        with pytest.raises(LoraError, match="is a textual inversion .*load_textual_inversion"):
            load_lora(tmp_path / "x.safetensors")
    torch.save({"string_to_param": {"*": vectors}, "name": "cat"}, tmp_path / "x.pt")
    with pytest.raises(LoraError, match="is a textual inversion"):
        load_lora(tmp_path / "x.pt")


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


def raw_pickle(evil: Evil, path: Path) -> None:
    path.write_bytes(pickle.dumps(evil))


def raw_pickle_of_protocol_0(evil: Evil, path: Path) -> None:
    path.write_bytes(pickle.dumps(evil, protocol=0))


def torch_zip(evil: Evil, path: Path) -> None:
    torch.save(evil, path)


def torch_zip_among_tensors(evil: Evil, path: Path) -> None:
    torch.save(pair(kohya(LAYER)) | {"x": evil}, path)


def torch_pickle_among_tensors(evil: Evil, path: Path) -> None:
    torch.save(pair(kohya(LAYER)) | {"x": evil}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    "write",
    [raw_pickle, raw_pickle_of_protocol_0, torch_zip, torch_zip_among_tensors, torch_pickle_among_tensors],
)
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_never_runs_pickled_code(tmp_path, write, suffix):
    marker = tmp_path / "marker"
    path = tmp_path / f"lora.{suffix}"
    write(Evil(marker), path)
    expected = "neither a safetensors" if write is raw_pickle_of_protocol_0 else "might run code and was refused"
    with pytest.raises(LoraError, match=f"{path} is .*{expected}"):
        load_lora(path)
    assert not marker.exists()
    # The attack is live: a careless reader falls for it.
    if write in (raw_pickle, raw_pickle_of_protocol_0):
        pickle.loads(path.read_bytes())
    else:
        with path.open("rb") as file:
            torch.load(file, weights_only=False)
    assert marker.exists()


def whole_model(path: Path) -> None:
    save_file({"down_blocks.0.attentions.0.to_q.weight": torch.ones(2, 2), "x.alpha": torch.ones(1)}, path)


def without_tensors(path: Path) -> None:
    save_file({}, path)


def truncated(path: Path) -> None:
    save_file(pair(kohya(LAYER)), path)
    path.write_bytes(path.read_bytes()[:-8])


def header_cut_off(path: Path) -> None:
    save_file(pair(kohya(LAYER)), path)
    path.write_bytes(path.read_bytes()[:40])


def torch_zip_cut_off(path: Path) -> None:
    torch.save(pair(kohya(LAYER)), path)
    path.write_bytes(path.read_bytes()[:-200])


def torch_pickle_cut_off(path: Path) -> None:
    torch.save(pair(kohya(LAYER)), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:60])


def safetensors_of(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Callable[[Path], None]:
    return lambda path: save_file(tensors, path, metadata)


def of_pair(**changes: Tensor | None) -> Callable[[Path], None]:
    """A file with one layer, some of its tensors changed or left out."""
    tensors = pair(kohya(LAYER))
    tensors |= {f"{kohya(LAYER)}.{k if k == 'alpha' else f'lora_{k}.weight'}": t for k, t in changes.items()}
    return lambda path: torch.save({k: t for k, t in tensors.items() if t is not None}, path)


def settings(text: str) -> Callable[[Path], None]:
    return safetensors_of(pair(f"unet.{LAYER}"), {"lora_adapter_metadata": text})


NAN, INF = float("nan"), float("inf")
BAD_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "does not exist"),
    "folder": (lambda path: path.mkdir(), "is not a file"),
    "empty": (lambda path: path.touch(), "is empty"),
    "name too long": (lambda path: None, "cannot be read"),
    "text": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "neither a safetensors"),
    "short text": (lambda path: path.write_text("x"), "neither a safetensors"),
    "JSON": (lambda path: path.write_text('{"a": 1, "b": {}}'), "neither a safetensors"),
    "truncated": (truncated, "damaged safetensors"),
    "header cut off": (header_cut_off, "damaged safetensors"),
    "zip cut off": (torch_zip_cut_off, "damaged torch checkpoint"),
    "pickle cut off": (torch_pickle_cut_off, "damaged torch checkpoint|refused"),
    "a list": (lambda path: torch.save([torch.ones(2)], path), "holds a list"),
    "whole model": (whole_model, r"no LoRA weights \(.*down_blocks.*whole model"),
    "whole model, pickled": (lambda path: torch.save({"a.weight": torch.ones(2)}, path), "no LoRA weights"),
    "no tensors": (without_tensors, "holds no tensors"),
    "numbers only": (lambda path: torch.save({"step": 1, 2: torch.ones(1)}, path), "holds no tensors"),
    "text encoder only": (
        safetensors_of(pair("lora_te_text_model_encoder_layers_0_mlp_fc1")),
        "no LoRA for the network of a Stable Diffusion or FLUX model",
    ),
    "another network": (
        safetensors_of(pair("prior.transformer_blocks.0.attn.to_q")),
        "no LoRA for the network of a Stable Diffusion or FLUX model",
    ),
    "another network, kohya": (
        safetensors_of(pair("lora_unet_double_blocks_0_img_attn")),
        r"no LoRA for it that diffusers can convert \(Incompatible keys detected\)",
    ),
    "down alone": (of_pair(up=None), f"lacks the up matrix of layer {LAYER}"),
    "up alone": (of_pair(down=None), f"lacks the down matrix of layer {LAYER}"),
    "ranks differ": (of_pair(up=torch.ones(5, 3)), f"rank 2 and 3 in layer {LAYER}"),
    "NaN": (of_pair(down=torch.tensor([[1, NAN, 1], [1, 1, 1]])), f"NaN or infinite numbers in layer {LAYER}"),
    "infinite": (of_pair(up=torch.full((5, 2), INF)), f"NaN or infinite numbers in layer {LAYER}"),
    "NaN alpha": (of_pair(alpha=torch.tensor(NAN)), "NaN or infinite numbers"),
    "vectors": (of_pair(down=torch.ones(2)), r"shape \(2,\)"),
    "rank 0": (of_pair(down=torch.ones(0, 3), up=torch.ones(5, 0)), r"shape \(0, 3\)"),
    "integers": (of_pair(down=torch.ones(2, 3, dtype=torch.int8)), "torch.int8 tensor"),
    "sparse": (of_pair(down=torch.ones(2, 3).to_sparse()), r"torch.float32 tensor of shape \(2, 3\)"),
    "no data": (of_pair(down=torch.ones(2, 3, device="meta")), r"torch.float32 tensor of shape \(2, 3\)"),
    "many alphas": (of_pair(alpha=torch.ones(2)), r"alpha of shape \(2,\)"),
    "a layer twice": (safetensors_of(pair(f"unet.{LAYER}") | pair(LAYER)), f"has layer {LAYER} twice"),
    "OFT": (safetensors_of({f"{kohya(LAYER)}.oft_blocks": torch.ones(2, 2)}), "OFT file, which is not supported"),
    "LyCORIS IA3": (
        safetensors_of({f"{kohya(LAYER)}.weight": torch.ones(5, 1), f"{kohya(LAYER)}.on_input": torch.tensor(False)}),
        "LyCORIS IA3 file, which is not supported",
    ),
    "LyCORIS IA3 beside a LoRA": (
        safetensors_of(
            pair("down_blocks.0.x.to_q")
            | {f"{kohya(LAYER)}.weight": torch.ones(5, 1), f"{kohya(LAYER)}.on_input": torch.tensor(False)}
        ),
        "LyCORIS IA3 file, which is not supported",
    ),
    "bias": (
        safetensors_of(pair(LAYER) | {f"{LAYER}.lora_B.default.bias": torch.ones(5)}),
        "LoRA with a bias file, which is not supported",
    ),
    "settings are no JSON": (settings("{"), "settings of .* cannot be read"),
    "settings are no table": (settings("[1]"), "settings of .* cannot be read"),
    "alpha is no number": (settings('{"unet.lora_alpha": "much"}'), "settings of .* cannot be read"),
    "alpha pattern is no pattern": (settings('{"unet.alpha_pattern": {"(": 1}}'), "settings of .* cannot be read"),
}


@pytest.mark.parametrize(("write", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_reported(request, tmp_path, write, message):
    path = tmp_path / ("x" * 300 if "name too long" in request.node.name else "lora.safetensors")
    write(path)
    with pytest.raises(LoraError, match=message) as caught:
        load_lora(path)
    text = str(caught.value)
    assert str(path) in text and text.endswith(".") and ";" in text and "\n" not in text


def test_peft_settings_that_do_not_decode(tmp_path):
    save_file(pair(f"base_model.model.{LAYER}"), tmp_path / "x.safetensors")
    (tmp_path / "adapter_config.json").write_bytes(json.dumps({"lora_alpha": 1}).encode("utf-16"))
    with pytest.raises(LoraError, match=r"settings of .* cannot be read"):
        load_lora(tmp_path / "x.safetensors")


def test_a_whole_model_is_refused_before_it_is_read(tmp_path, monkeypatch):
    """It may be gigabytes: the keys tell."""
    path = tmp_path / "model.safetensors"
    whole_model(path)

    class KeysOnly:
        def __init__(self, *args: Any, **options: Any):
            self.file = safe_open(*args, **options)

        def __enter__(self) -> KeysOnly:
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def keys(self) -> list[str]:
            return list(self.file.keys())

    monkeypatch.setattr("diffmorpher.files.loras.safe_open", KeysOnly)
    with pytest.raises(LoraError, match="whole model"):
        load_lora(path)


@pytest.mark.parametrize("text", ['{"unet.lora_alpha": 1%s}' % ("0" * 400), '{"unet.r": Infinity}', "[" * 100_000])
def test_settings_out_of_all_bounds(tmp_path: Path, text: str) -> None:
    """Found by tests/fuzz: OverflowError, RecursionError."""
    save_file(pair(f"unet.{LAYER}"), tmp_path / "x", {"lora_adapter_metadata": text})
    with pytest.raises(LoraError, match="settings of .* cannot be read"):
        load_lora(tmp_path / "x")
