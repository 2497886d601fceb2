"""LoRA files of transformers under every name in use, against what diffusers makes of them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from conftest import (
    tiny_flux2_pipeline,
    tiny_flux_pipeline,
    tiny_pipeline,
    tiny_qwen_pipeline,
    tiny_sd3_pipeline,
    tiny_xl_pipeline,
    tiny_z_image_pipeline,
)
from diffmorpher import Morpher
from diffmorpher.errors import LoraError
from diffmorpher.files.lora_families import made_for
from diffmorpher.files.loras import Lora, load_lora, save_lora
from diffmorpher.method.lora import LoraBank
from diffmorpher.models.backbone import Backbone

MAKERS: dict[str, Callable[[], Any]] = {
    "Stable Diffusion 1.x or 2.x": tiny_pipeline,
    "Stable Diffusion XL": tiny_xl_pipeline,
    "Stable Diffusion 3": tiny_sd3_pipeline,
    "FLUX.1": tiny_flux_pipeline,
    "FLUX.2 Klein": tiny_flux2_pipeline,
    "Z-Image": tiny_z_image_pipeline,
    "Qwen-Image": tiny_qwen_pipeline,
}
FLOWS = {name: make for name, make in MAKERS.items() if "Diffusion 1" not in name and "XL" not in name}
flows = pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
GENERATOR = torch.Generator().manual_seed(0)
PICTURE = torch.zeros(32, 32, 3, dtype=torch.uint8).numpy()
#: Layers of FLUX.1's joint blocks in its first code: outputs and inputs, in widths of a block.
DOUBLE = {
    f"{stream}_{layer}": size
    for stream in ("img", "txt")
    for layer, size in {
        "attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.0": (4, 1), "mlp.2": (1, 4), "mod.lin": (6, 1),
    }.items()
}  # fmt: skip


def pair(layer: str, out: int, width: int) -> dict[str, Tensor]:
    """A LoRA's two matrices of rank 2, by kohya's keys."""
    shapes = {"down": (2, width), "up": (out, 2)}
    return {
        f"{layer}.lora_{side}.weight": torch.randn(shape, generator=GENERATOR) / 8 for side, shape in shapes.items()
    }


def written(tensors: dict[str, Tensor], file: Path) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    return file


def random_lora(backbone: Backbone) -> Lora:
    """One of rank 2 over all layers that a LoRA is fitted to."""
    down, up = {}, {}
    for name, layer in backbone.projections().items():
        down[name], up[name] = pair("", layer.out_features, layer.in_features).values()
    return Lora(down, up, {})


@torch.no_grad()
def assert_is_what_the_pipeline_loads(make: Callable[[], Any], file: Path) -> None:
    """What the network says of noise with a LoRA as the method adds it, and as the pipeline does."""
    pipe = make()
    backbone = Morpher(pipe).backbone
    noise = torch.randn(1, backbone.latent_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    told, level = backbone.encode_prompts(["a house"]), backbone.schedule(2).levels[1]
    without = backbone.output(noise, level, told)
    with LoraBank.stack([load_lora(file)], backbone.network, ["it"]).attached(backbone.network):
        ours = backbone.output(noise, level, told)
    pipe.load_lora_weights(str(file))
    assert_close(ours, backbone.output(noise, level, told), rtol=1e-4, atol=1e-5)
    assert (ours - without).abs().max() > 1e-2


# ---- FLUX.1


@pytest.mark.parametrize("alpha", [None, 1.0])
@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
def test_kohyas_and_comfyuis_joint_blocks_are_what_the_pipeline_loads(
    tmp_path: Path, prefix: str, alpha: float | None
) -> None:
    tensors: dict[str, Tensor] = {}
    for i in range(2):
        for layer, (out, width) in DOUBLE.items():
            name = f"double_blocks.{i}.{layer}"
            name = prefix + (name.replace(".", "_") if prefix == "lora_unet_" else name)
            tensors |= pair(name, 32 * out, 32 * width)
            tensors |= {f"{name}.alpha": torch.tensor(alpha)} if alpha else {}
    file = written(tensors, tmp_path / "x.safetensors")
    assert len(load_lora(file).down) == 2 * 14
    assert_is_what_the_pipeline_loads(tiny_flux_pipeline, file)


@pytest.mark.parametrize("prefix", ["diffusion_model.", "base_model.model.", ""])
def test_the_ends_of_keys_that_peft_writes_mean_the_same(tmp_path: Path, prefix: str) -> None:
    """Diffusers' pipeline reads these names with kohya's ends alone."""
    ours = pair("double_blocks.1.img_attn.qkv", 96, 32)
    theirs = {prefix + key.replace("down", "A").replace("up", "B"): x for key, x in ours.items()}
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 2}')
    want = load_lora(written({f"diffusion_model.{key}": x for key, x in ours.items()}, tmp_path / "a.safetensors"))
    got = load_lora(written(theirs, tmp_path / "b.safetensors"))
    assert sorted(got.down) == [f"transformer_blocks.1.attn.to_{name}" for name in "kqv"]
    for name in want.up:
        assert torch.equal(got.up[name] @ got.down[name], want.up[name] @ want.down[name])


@pytest.mark.parametrize("prefix", ["diffusion_model.", ""])
def test_xlabs_names_are_what_the_pipeline_loads(tmp_path: Path, prefix: str) -> None:
    """Of the processors of both kinds of blocks: queries, keys and values together, and what follows the attention."""
    tensors: dict[str, Tensor] = {}
    double = {"proj_lora1": (1, 1), "proj_lora2": (1, 1), "qkv_lora1": (3, 1), "qkv_lora2": (3, 1)}
    for blocks, layers in (("double", double), ("single", {"proj_lora": (1, 5), "qkv_lora": (3, 1)})):
        for layer, (out, width) in layers.items():
            made = pair(f"{prefix}{blocks}_blocks.0.processor.{layer}", 32 * out, 32 * width)
            tensors |= {re.sub(r"lora_(down|up)", r"\1", key): tensor for key, tensor in made.items()}
    file = written(tensors, tmp_path / "x.safetensors")
    assert len(load_lora(file).down) == 2 + 6 + 1 + 3
    assert_is_what_the_pipeline_loads(tiny_flux_pipeline, file)
    del tensors[next(key for key in tensors if "qkv_lora1.up" in key)]
    with pytest.raises(LoraError, match="no LoRA for it that diffusers can convert"):
        load_lora(written(tensors, tmp_path / "half.safetensors"))


def test_single_blocks_of_the_published_width_are_cut_where_their_layers_end(tmp_path: Path) -> None:
    """Diffusers' converter knows no other width, so that it fails on a tiny model."""
    layers = pair("lora_unet_single_blocks_3_linear1", 21504, 3072)
    layers |= pair("lora_unet_single_blocks_3_linear2", 3072, 15360) | pair("lora_unet_final_layer_linear", 64, 3072)
    lora = load_lora(written(layers, tmp_path / "x.safetensors"))
    down, up = (layers[f"lora_unet_single_blocks_3_linear1.lora_{side}.weight"] for side in ("down", "up"))
    parts = dict(
        zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), up.split([3072, 3072, 3072, 12288]), strict=True)
    )
    for name, part in parts.items():
        assert torch.equal(lora.down[f"single_transformer_blocks.3.{name}"], down)
        assert torch.equal(lora.up[f"single_transformer_blocks.3.{name}"], part)
    assert set(lora.down) == {f"single_transformer_blocks.3.{name}" for name in (*parts, "proj_out")} | {"proj_out"}
    file = written(pair("lora_unet_single_blocks_0_linear1", 7 * 32, 32), tmp_path / "tiny.safetensors")
    with pytest.raises(
        LoraError, match=r"FLUX.1's names but is no LoRA for it that diffusers can convert \(AssertionError\)"
    ):
        load_lora(file)


def test_text_encoders_are_left_out_with_a_warning(tmp_path: Path) -> None:
    tensors = pair("lora_unet_double_blocks_0_img_attn_qkv", 96, 32) | pair("lora_te3_encoder_block_0_layer_0_q", 4, 4)
    tensors |= pair("text_encoders.t5xxl.transformer.encoder.block.0.q", 4, 4)
    tensors |= pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", 4, 4)
    with pytest.warns(UserWarning, match="skipped: 3 text-encoder; only layers of the U-Net or transformer"):
        lora = load_lora(written(tensors, tmp_path / "x.safetensors"))
    assert len(lora.down) == 3


# ---- Stable Diffusion 3


def sd3_layers(width: int) -> dict[str, tuple[int, int]]:
    """(out, in) of the linear layers of `tiny_sd3_pipeline`'s three joint blocks in the first code."""
    sizes = {
        "attn.qkv": (3, 1),
        "attn.proj": (1, 1),
        "mlp.fc1": (4, 1),
        "mlp.fc2": (1, 4),
        "adaLN_modulation.1": (6, 1),
    }
    twice = sizes | {"attn2.qkv": (3, 1), "attn2.proj": (1, 1), "adaLN_modulation.1": (9, 1)}
    last = {"attn.qkv": (3, 1), "adaLN_modulation.1": (2, 1)}
    return {
        f"joint_blocks.{i}.{stream}.{layer}": (width * out, width * into)
        for i, streams in enumerate(((twice, sizes), (sizes, sizes), (sizes, last)))
        for stream, of in zip(("x_block", "context_block"), streams, strict=True)
        for layer, (out, into) in of.items()
    }


@pytest.mark.parametrize("form", ["kohya", "comfyui"])
def test_joint_blocks_are_what_diffusers_makes_of_a_checkpoint_with_the_lora_added(tmp_path: Path, form: str) -> None:
    """Diffusers has no converter for such LoRAs, but one for whole checkpoints, which is linear: it is given `up @ down`."""
    tensors: dict[str, Tensor] = {}
    checkpoint: dict[str, Tensor] = {"context_embedder.weight": torch.zeros(32, 64), "pos_embed": torch.zeros(1)}
    kohya = form == "kohya"
    for layer, (out, width) in sd3_layers(32).items():
        name = f"lora_unet_{layer.replace('.', '_')}" if kohya else f"diffusion_model.{layer}"
        made = pair(name, out, width)
        down, up = made.values()
        if kohya:
            tensors |= made | {f"{name}.alpha": torch.tensor(0.5)}
        else:
            tensors |= {key.replace("down", "A").replace("up", "B"): x for key, x in made.items()}
        checkpoint |= {f"{layer}.weight": (0.25 if kohya else 1) * up @ down, f"{layer}.bias": torch.zeros(out)}
    for layer in ("x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "context_embedder", "y_embedder.mlp.0",
                  "y_embedder.mlp.2", "final_layer.linear", "final_layer.adaLN_modulation.1"):  # fmt: skip
        checkpoint = {f"{layer}.{what}": torch.zeros(64, 1) for what in ("weight", "bias")} | checkpoint
    theirs = convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    lora = load_lora(written(tensors, tmp_path / "x.safetensors"))
    changed = {
        key.removesuffix(".weight"): x for key, x in theirs.items() if key.endswith(".weight") and x.count_nonzero()
    }
    assert lora.down.keys() == changed.keys()
    for name, delta in changed.items():
        assert_close(lora.up[name] @ lora.down[name], delta)
    LoraBank.stack([lora], tiny_sd3_pipeline().transformer, ["it"])  # it fits


# ---- FLUX.2


#: Layers of `tiny_flux2_pipeline` in FLUX.2's first code: outputs and inputs.
FLUX2 = {
    **{
        f"double_blocks.{i}.{stream}_{layer}": (32 * out, 32 * width)
        for i in range(2)
        for stream in ("img", "txt")
        for layer, (out, width) in {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.0": (6, 1), "mlp.2": (1, 3)}.items()
    },
    **{f"single_blocks.{i}.linear1": (288, 32) for i in range(2)},
    **{f"single_blocks.{i}.linear2": (32, 128) for i in range(2)},
    "img_in": (32, 16), "txt_in": (32, 24), "time_in.in_layer": (32, 256), "time_in.out_layer": (32, 32),
    "final_layer.linear": (16, 32),
}  # fmt: skip
#: Those of which diffusers' own converters know nothing in kohya's layout, or (the last) forget to turn the halves round.
FLUX2_MORE = {
    "single_stream_modulation.lin": (96, 32), "double_stream_modulation_img.lin": (192, 32),
    "double_stream_modulation_txt.lin": (192, 32), "final_layer.adaLN_modulation.1": (64, 32),
}  # fmt: skip
#: Names that trainers give to the two matrices of a layer in the first code, and whether they write an alpha.
FORMS = {
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", True),
    "ai-toolkit": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight", False),
    "PEFT": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight", False),
}


def in_form(form: str, layers: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    down, up, alpha = FORMS[form]
    tensors: dict[str, Tensor] = {}
    for layer, sizes in layers.items():
        name = layer.replace(".", "_") if form == "kohya" else layer
        matrices = pair("", *sizes).values()
        tensors |= {key.format(name): matrix for key, matrix in zip((down, up), matrices, strict=True)}
        if alpha:
            tensors[down.format(name).replace("lora_down.weight", "alpha")] = torch.tensor(1.0)
    return tensors


@pytest.mark.parametrize("form", FORMS)
def test_flux2s_first_names_are_what_the_pipeline_loads(tmp_path: Path, form: str) -> None:
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 2}')
    file = written(in_form(form, FLUX2), tmp_path / "x.safetensors")
    assert len(load_lora(file).down) == 2 * (2 * (3 + 1 + 2) + 2) + 5
    assert_is_what_the_pipeline_loads(tiny_flux2_pipeline, file)


def changes(
    tensors: dict[str, Tensor], layers: dict[str, tuple[int, int]], convert: Callable[[Any], Any], scale: float
) -> dict[str, Tensor]:
    """`up @ down` of every layer as diffusers converts a whole checkpoint, which is linear."""
    checkpoint = {}
    for layer in layers:
        down, up = (tensors[f"lora_unet_{layer.replace('.', '_')}.lora_{side}.weight"] for side in ("down", "up"))
        checkpoint[f"{layer}.weight"] = scale * up @ down
    return {key.removesuffix(".weight"): delta for key, delta in convert(checkpoint).items()}


def assert_are(file: Path, expected: dict[str, Tensor], make: Callable[[], Any]) -> None:
    lora = load_lora(file)
    assert lora.down.keys() == expected.keys()
    for name, delta in expected.items():
        assert_close(lora.up[name] @ lora.down[name], delta)
    LoraBank.stack([lora], make().transformer, ["it"])  # it fits


def test_all_of_flux2s_layers_are_what_diffusers_makes_of_a_checkpoint_with_the_lora_added(tmp_path: Path) -> None:
    layers = FLUX2 | FLUX2_MORE
    tensors = in_form("kohya", layers)
    expected = changes(tensors, layers, convert_flux2_transformer_checkpoint_to_diffusers, 0.5)
    assert_are(written(tensors, tmp_path / "x.safetensors"), expected, tiny_flux2_pipeline)


# ---- Z-Image

Z_IMAGE = {
    **{
        f"{block}.0.{layer}": sizes
        for block in ("layers", "noise_refiner", "context_refiner")
        for layer, sizes in {
            "attention.qkv": (96, 32), "attention.out": (32, 32), "feed_forward.w1": (85, 32), "feed_forward.w2": (32, 85),
        }.items()
    },
    "layers.1.adaLN_modulation.0": (128, 32), "cap_embedder.1": (32, 24), "x_embedder": (32, 16),
    "t_embedder.mlp.0": (1024, 256), "final_layer.linear": (16, 32), "final_layer.adaLN_modulation.1": (32, 32),
}  # fmt: skip


def test_z_images_first_names_are_what_diffusers_makes_of_a_checkpoint_with_the_lora_added(tmp_path: Path) -> None:
    """Of kohya's layout diffusers' converter for LoRAs cuts what is fused only where keys have dots."""
    tensors = in_form("kohya", Z_IMAGE)
    expected = changes(tensors, Z_IMAGE, convert_z_image_transformer_checkpoint_to_diffusers, 0.5)
    assert_are(written(tensors, tmp_path / "x.safetensors"), expected, tiny_z_image_pipeline)


def test_a_z_image_file_that_has_its_attention_fused_and_apart_is_what_the_pipeline_loads(tmp_path: Path) -> None:
    tensors = {}
    for layer in ("to_q", "to_k", "to_v", "to_out_0", "qkv", "out"):
        made = pair(f"lora_unet_layers_0_attention_{layer}", 96 if layer == "qkv" else 32, 32)
        tensors |= {key.replace("lora_down", "lora.down").replace("lora_up", "lora.up"): x for key, x in made.items()}
    file = written(tensors, tmp_path / "x.safetensors")
    assert set(load_lora(file).down) == {f"layers.0.attention.to_{end}" for end in ("q", "k", "v", "out.0")}


# ---- every family


@flows
@pytest.mark.parametrize("prefix", ["lora_transformer_", "lora_unet_"])
def test_diffusers_names_of_every_layer_without_their_dots(
    tmp_path: Path, make: Callable[[], Any], prefix: str
) -> None:
    """As OneTrainer writes them, and musubi-tuner: the oracle is the transformer itself."""
    linears = {n: m for n, m in make().transformer.named_modules() if isinstance(m, nn.Linear)}
    tensors: dict[str, Tensor] = {}
    for name, layer in linears.items():
        tensors |= pair(f"{prefix}{name.replace('.', '_')}", layer.out_features, layer.in_features)
    lora = load_lora(written(tensors, tmp_path / "x.safetensors"))
    assert list(lora.down) == sorted(linears) and len(linears) > 30
    LoraBank.stack([lora], make().transformer, ["it"])


#: How trainers write diffusers' names of attention, with an alpha in all but PEFT's.
WRITERS: dict[str, Callable[[str, str], str]] = {
    "OneTrainer": lambda name, side: f"lora_transformer_{name.replace('.', '_')}.lora_{side}.weight",
    "OneTrainer, dots": lambda name, side: f"transformer.{name}.lora_{side}.weight",
    "musubi-tuner": lambda name, side: f"lora_unet_{name.replace('.', '_')}.lora_{side}.weight",
    "ai-toolkit": lambda name, side: f"diffusion_model.{name}.lora_{AB[side]}.weight",
    "PEFT": lambda name, side: f"base_model.model.{name}.lora_{AB[side]}.weight",
    "PEFT, named": lambda name, side: f"base_model.model.{name}.lora_{AB[side]}.default.weight",
    "diffusers": lambda name, side: f"transformer.{name}.lora_{AB[side]}.weight",
}
AB = {"down": "A", "up": "B"}


@flows
@pytest.mark.parametrize("writer", WRITERS)
def test_every_trainers_file_is_the_same_lora(tmp_path: Path, make: Callable[[], Any], writer: str) -> None:
    pipe = make()
    lora = random_lora(Morpher(pipe).backbone)
    with_alpha = "diffusers" != writer and "PEFT" not in writer
    tensors = {}
    for name in lora.down:
        for side, matrix in (("down", lora.down[name]), ("up", lora.up[name])):
            tensors[WRITERS[writer](name, side)] = matrix * (2 if with_alpha and side == "up" else 1)
        if with_alpha:
            key = WRITERS[writer](name, "down")
            tensors[key[: key.index(".lora_")] + ".alpha"] = torch.tensor(1.0)
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 2}')
    with warnings.catch_warnings(action="error"):
        read = load_lora(written(tensors, tmp_path / "x.safetensors"))
    assert read.down.keys() == lora.down.keys()
    for name in lora.down:
        assert_close(read.up[name] @ read.down[name], lora.up[name] @ lora.down[name])


@pytest.mark.parametrize(
    ("family", "writer"),
    [("FLUX.1", "OneTrainer"), *(("Qwen-Image", w) for w in ("musubi-tuner", "ai-toolkit", "diffusers")),
     *(("Z-Image", w) for w in ("musubi-tuner", "ai-toolkit", "diffusers")), ("FLUX.2 Klein", "ai-toolkit")],
)  # fmt: skip
def test_a_trainers_file_is_what_the_pipeline_loads(tmp_path: Path, family: str, writer: str) -> None:
    """Where diffusers reads that layout."""
    tensors = {}
    for name, layer in Morpher(MAKERS[family]()).backbone.projections().items():
        for key, matrix in pair(name, layer.out_features, layer.in_features).items():
            tensors[WRITERS[writer](name, "down" if "down" in key else "up")] = matrix
        if writer != "diffusers" and family != "FLUX.2 Klein":  # where diffusers does not expect one
            key = WRITERS[writer](name, "down")
            tensors[key[: key.index(".lora_")] + ".alpha"] = torch.tensor(1.0)
    assert_is_what_the_pipeline_loads(MAKERS[family], written(tensors, tmp_path / "x.safetensors"))


@flows
def test_an_alpha_in_diffusers_header_counts(tmp_path: Path, make: Callable[[], Any]) -> None:
    pipe = make()
    torch.manual_seed(0)
    pipe.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    kind: Any = type(pipe)
    kind.save_lora_weights(
        tmp_path,
        transformer_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.transformer)),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
    )
    assert_is_what_the_pipeline_loads(make, tmp_path / "pytorch_lora_weights.safetensors")


# ---- which family a LoRA is for


@pytest.fixture(scope="module")
def backbones() -> dict[str, Backbone]:
    return {family: Morpher(make()).backbone for family, make in MAKERS.items()}


#: Families whose names are theirs alone, whatever the widths.
TELLING = [family for family in MAKERS if family != "Qwen-Image"]


@pytest.mark.parametrize("family", TELLING)
def test_a_lora_of_another_family_is_refused_by_both_names(
    tmp_path: Path, backbones: dict[str, Backbone], family: str
) -> None:
    lora = random_lora(backbones[family])
    assert made_for(lora.down) == family == backbones[family].family
    file = save_lora(lora, tmp_path / "x.safetensors")
    for other, backbone in backbones.items():
        if other != family:
            with pytest.raises(LoraError) as error:
                Morpher(backbone.pipe).prepare([PICTURE, PICTURE], loras=[file, file], steps=1, size=(32, 32))
            assert str(error.value) == f"{file} is a LoRA for {family}, the model is {other}: give one made for that."


@pytest.mark.parametrize(
    ("layers", "width", "family"),
    [
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", 2048, "Stable Diffusion XL"),
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", 768, "Stable Diffusion 1.x or 2.x"),
        ("down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_k", 640, "Stable Diffusion XL"),
        ("transformer_blocks.0.attn.to_q", 1536, "Stable Diffusion 3"),
        ("transformer_blocks.0.attn.to_q", 2432, "Stable Diffusion 3"),
        ("transformer_blocks.18.attn.to_q", 3072, "FLUX.1"),
        ("transformer_blocks.19.attn.to_q", 3072, "Qwen-Image"),
        ("transformer_blocks.0.img_mlp.net.2", 12288, "Qwen-Image"),
        ("single_transformer_blocks.0.attn.to_qkv_mlp_proj", 3072, "FLUX.2 Klein"),
        ("single_transformer_blocks.0.attn.to_qkv_mlp_proj", 6144, "FLUX.2"),
        ("transformer_blocks.0.ff.linear_in", 3072, "FLUX.2 Klein"),
        ("transformer_blocks.0.attn.to_q", 4096, "FLUX.2 Klein"),
        ("transformer_blocks.0.attn.to_q", 6144, "FLUX.2"),
        ("context_refiner.0.attention.to_q", 3840, "Z-Image"),
        ("transformer_blocks.0.attn1.to_q", 2048, "LTX-Video or PixArt"),
        ("transformer_blocks.0.attn.to_q", 64, ""),
        ("layers.0.attention.to_q", 3840, "Z-Image"),
    ],
)
def test_families_are_told_by_names_and_widths(layers: str, width: int, family: str) -> None:
    assert made_for({layers: torch.zeros(1, width)}) == family


@pytest.mark.parametrize(
    ("layer", "family"),
    [
        ("diffusion_model.blocks.3.self_attn.q", "Wan"),
        ("lora_unet_blocks_3_cross_attn_k", "Wan"),
        ("diffusion_model.double_stream_blocks.0.block.attn1.to_q", "HiDream"),
    ],
)
def test_a_lora_of_a_family_without_a_backbone_is_named(tmp_path: Path, layer: str, family: str) -> None:
    file = written(pair(layer, 8, 8), tmp_path / "x.safetensors")
    with pytest.raises(LoraError, match=rf"no LoRA for the network of .*, but one for {family}; give one"):
        load_lora(file)
