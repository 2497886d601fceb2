"""LoHa, LoKr, DoRA, IA3 and whole differences of weights; the oracle is PEFT, which trains and merges the first four."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import tiny_pipeline
from diffmorpher import Morpher, SampleConfig
from diffmorpher.errors import ConfigError, LoraError
from diffmorpher.files.loras import load_lora, save_lora
from diffmorpher.method.lora import LoraBank

LINEAR = ["to_q", "to_k", "ff.net.2"]
#: Those with a 3 x 3 kernel, one with another stride, and a 1 x 1.
LAYERS = [*LINEAR, "conv1", "downsamplers.0.conv", "conv_shortcut"]
KINDS: dict[str, Any] = {
    "LoHa": LoHaConfig(r=2, alpha=3, target_modules=LAYERS, init_weights=False),
    "LoHa of a high rank": LoHaConfig(r=8, alpha=8, target_modules=LAYERS, init_weights=False),
    "LoHa in kernels": LoHaConfig(r=3, alpha=2, target_modules=LAYERS, init_weights=False, use_effective_conv2d=True),
    "LoKr": LoKrConfig(r=2, alpha=3, target_modules=LAYERS, init_weights=False),
    "LoKr in kernels": LoKrConfig(r=2, alpha=3, target_modules=LAYERS, init_weights=False, use_effective_conv2d=True),
    "LoKr of both": LoKrConfig(r=2, alpha=3, target_modules=LAYERS, init_weights=False, decompose_both=True),
    "LoKr without low rank": LoKrConfig(r=64, alpha=16, target_modules=LAYERS, init_weights=False),
    "DoRA": LoraConfig(r=2, lora_alpha=3, target_modules=LAYERS, use_dora=True, init_lora_weights=False),
    "IA3": IA3Config(
        target_modules=["to_q", "to_k", "ff.net.2"], feedforward_modules=["ff.net.2"], init_ia3_weights=False
    ),
}
#: How the names of their tensors begin.
PARTS = {kind: {"LoH": "hada_", "LoK": "lokr_", "DoR": "lora_", "IA3": "ia3_"}[kind[:3]] for kind in KINDS}


@functools.cache
def made_once() -> UNet2DConditionModel:
    return tiny_pipeline().unet.eval()


def tiny_unet() -> UNet2DConditionModel:
    return copy.deepcopy(made_once())


@torch.no_grad()
def output(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    sample = torch.randn(2, unet.config.in_channels, 8, 8, generator=generator)
    text = torch.randn(2, 3, unet.config.cross_attention_dim, generator=generator)
    return unet(sample, 500, text).sample


@torch.no_grad()
def trained(config: Any, folder: Path) -> tuple[Path, nn.Module]:
    """A file as PEFT saves it, and the network with the same merged by PEFT."""
    torch.manual_seed(3)
    model = get_peft_model(tiny_unet(), config)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
        elif any(part in name for part in ("hada", "lokr", "lora_", "ia3")):
            parameter.copy_(torch.randn_like(parameter) * 0.3 + ("ia3" in name))
    model.save_pretrained(folder)
    return folder / "adapter_model.safetensors", model.merge_and_unload()


def output_with(lora: Any) -> Tensor:
    unet = tiny_unet()
    with LoraBank.stack([lora], unet, ["the file"]).attached(unet):
        return output(unet)


@pytest.mark.parametrize("kind", KINDS)
def test_it_does_what_peft_merges(kind: str, tmp_path: Path) -> None:
    file, merged = trained(KINDS[kind], tmp_path)
    expected, plain = output(merged), output(tiny_unet())
    assert (expected - plain).abs().max() > 0.05
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora = load_lora(file)
    torch.testing.assert_close(output_with(lora), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "LoKr without low rank", "DoRA"])
def test_kohyas_names_and_alphas_and_another_strength(kind: str, tmp_path: Path) -> None:
    """As LyCORIS' trainers write it; at half the strength each layer is half-way to what PEFT merges."""
    file, merged = trained(KINDS[kind], tmp_path)
    alpha = getattr(KINDS[kind], "lora_alpha", None) or KINDS[kind].alpha
    tensors: dict[str, Tensor] = {}
    for key, tensor in load_file(file).items():
        layer, part = key.removeprefix("base_model.model.").split("." + PARTS[kind])
        layer, part = "lora_unet_" + layer.replace(".", "_"), PARTS[kind] + part
        part = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}.get(part, part)
        if "magnitude" in part:
            part, tensor = "dora_scale", tensor.reshape(-1, 1)
        tensors[f"{layer}.{part}"] = tensor
        tensors[f"{layer}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, tmp_path / "kohyas.safetensors")
    half = tiny_unet()
    for name, weight in half.named_parameters():
        weight.data.lerp_(merged.get_parameter(name).data, 0.5)
    lora = load_lora(tmp_path / "kohyas.safetensors").scaled(0.5)
    if kind == "LoKr without low rank":  # no rank in the file: LyCORIS ignores its alpha there, PEFT divides by its own
        lora = lora.scaled(16 / 64)
    torch.testing.assert_close(output_with(lora), output(half), rtol=1e-4, atol=2e-5)


def test_a_dora_by_inputs(tmp_path: Path) -> None:
    """LyCORIS' older files give a length to each input: the columns of the whole have these lengths."""
    layer, unet = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", tiny_unet()
    weight = unet.get_submodule(layer).weight.detach()
    down, up, lengths = torch.randn(2, weight.shape[1]), torch.randn(len(weight), 2), 1 + torch.rand(1, weight.shape[1])
    key = "lora_unet_" + layer.replace(".", "_")
    save_file(
        {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.dora_scale": lengths}, tmp_path / "x"
    )
    bank = LoraBank.stack([load_lora(tmp_path / "x")], unet, ["x"])
    whole = weight + bank.up[layer][0] @ bank.down[layer][0]
    torch.testing.assert_close(whole.norm(dim=0), lengths[0])
    torch.testing.assert_close(whole / whole.norm(dim=0), torch.nn.functional.normalize(weight + up @ down, dim=0))


def test_whole_differences(tmp_path: Path) -> None:
    """`.diff` of matrices and kernels, wide and tall; norms that change nothing pass."""
    torch.manual_seed(4)
    unet, changed = tiny_unet(), tiny_unet()
    tensors: dict[str, Tensor] = {}
    for name, module in changed.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and name.endswith((*LAYERS, "ff.net.0.proj")):
            difference = torch.randn_like(module.weight) * 0.1
            module.weight.data += difference
            tensors[f"diffusion_model.{name}.diff"] = difference
    tensors["diffusion_model.conv_norm_out.diff"] = torch.zeros(32)
    save_file(tensors, tmp_path / "x")
    torch.testing.assert_close(output_with(load_lora(tmp_path / "x")), output(changed), rtol=1e-4, atol=2e-5)
    assert (output(changed) - output(unet)).abs().max() > 0.05
    save_file(tensors | {"diffusion_model.conv_norm_out.diff": torch.ones(32)}, tmp_path / "y")
    with pytest.raises(LoraError, match="conv_norm_out, which is no matrix"):
        load_lora(tmp_path / "y")


def test_films_are_made_with_them(tmp_path: Path) -> None:
    """One for each picture, mixed between them, through the whole program."""
    files = []
    for kind in ("DoRA", "LoKr"):
        files.append(trained(KINDS[kind], tmp_path / kind)[0])
    pictures = [Image.effect_noise((32, 32), s).convert("RGB") for s in (20, 60)]
    path = Morpher(tiny_pipeline()).prepare(pictures, ["a", "b"], loras=files, steps=2)
    assert len(path.sample([0.0, 0.5, 1.0], SampleConfig(steps=2))) == 3


def test_one_that_needs_its_model_is_not_saved_without(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only beside its model"):
        save_lora(load_lora(trained(KINDS["DoRA"], tmp_path)[0]), tmp_path / "y.safetensors")


KEY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"hada_w1_a": (4, 2)}, "parts that do not fit"),
        ({"hada_w1_a": (4, 2), "hada_w1_b": (2, 4), "hada_w2_a": (4, 3), "hada_w2_b": (2, 4)}, "parts that do not fit"),
        ({"hada_w1_a": (4, 2), "hada_w1_b": (2, 4), "hada_w2_a": (5, 2), "hada_w2_b": (2, 4)}, "parts that do not fit"),
        ({"lokr_w1": (2, 2)}, "parts that do not fit"),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (4, 3)}, "rank 8 and 4"),
        ({"lokr_w1": (1, 2**15), "lokr_w2": (1, 2**15)}, "parts that do not fit"),
        ({"lokr_w1": (2, 2, 2), "lokr_w2": (1, 2)}, r"shape \(2, 2, 2\)"),
        ({"diff": (2, 2), "lora_down.weight": (2, 2), "lora_up.weight": (2, 2)}, "twice"),
        ({"diff_b": (3,), "diff": (2, 2)}, "with a bias"),
        ({"lora_down.weight": (2, 64), "lora_up.weight": (64, 2), "dora_scale": (5, 1)}, "5 factors there"),
        ({"lora_down.weight": (2, 64), "lora_up.weight": (64, 2), "dora_scale": (5, 5)}, r"shape \(5, 5\)"),
        ({"dora_scale": (32, 1)}, "lacks the down matrix"),
    ],
)
def test_damaged_ones_are_named(parts: dict[str, tuple[int, ...]], message: str, tmp_path: Path) -> None:
    save_file({f"{KEY}.{part}": torch.ones(shape) for part, shape in parts.items()}, tmp_path / "x")
    with pytest.raises(LoraError, match=message):
        output_with(load_lora(tmp_path / "x"))
