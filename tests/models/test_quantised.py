"""Networks whose linear layers are quantised, against the same networks with what these layers make of it written out.

Of the packages only gguf comes with `make test`: the others are tested where somebody has installed them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, GGUFQuantizationConfig
from torch import Tensor, nn
from torch.testing import assert_close

from conftest import (
    tiny_flux2_pipeline,
    tiny_flux_pipeline,
    tiny_pipeline,
    tiny_qwen_pipeline,
    tiny_sd3_pipeline,
    tiny_z_image_pipeline,
)
from diffmorpher import FitConfig, Morpher, MorphPath, SampleConfig
from diffmorpher.errors import PathFileError
from diffmorpher.models.z_image import ZImage

PICTURES = [np.random.default_rng(k).integers(0, 256, (32, 32, 3), dtype=np.uint8) for k in range(2)]
FIT = FitConfig(rank=2, steps=3, learning_rate=1e-2)


def gguf(layer: nn.Linear) -> nn.Linear:
    """8 bits, as a .gguf file loaded by diffusers has it."""
    package = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = package.GGMLQuantizationType.Q8_0
    made = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.float32)
    packed = torch.from_numpy(package.quants.quantize(layer.weight.detach().numpy(), kind))
    made.weight, made.bias = GGUFParameter(packed, quant_type=kind), layer.bias
    return made


def bitsandbytes(layer: nn.Linear) -> nn.Linear:
    """4 bits, "nf4"; diffusers' own loader asks for a GPU."""
    package = pytest.importorskip("bitsandbytes")
    made = package.nn.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.float32, quant_type="nf4"
    )
    made.weight = package.nn.Params4bit(layer.weight.detach().clone(), requires_grad=False, quant_type="nf4")
    made.bias = layer.bias
    return made.to("cpu")


def torchao(layer: nn.Linear) -> nn.Linear:
    """8 bits: the layer stays what it is, with a weight of a class of its own."""
    package = pytest.importorskip("torchao.quantization")
    package.quantize_(layer, package.Int8WeightOnlyConfig())
    return layer


def wide_flux(seed: int = 0) -> Any:
    """FLUX.1 with layers of 64 inputs, the least that bitsandbytes packs."""
    pipe = tiny_flux_pipeline(seed)
    pipe.transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(8, 12, 12),
    ).eval()  # fmt: skip
    return pipe


def part_of(pipe: Any) -> str:
    return "transformer" if hasattr(pipe, "transformer") else "unet"


def quantised(pipe: Any, how: Callable[[nn.Linear], nn.Linear], width: int = 64) -> int:
    """Quantise every linear layer of the pipeline's network that can be, of inputs in multiples of `width`; how many."""
    net = getattr(pipe, part_of(pipe))
    outs = 32 if how is bitsandbytes else 1  # it packs as many at a time
    layers = {n: m for n, m in net.named_modules() if isinstance(m, nn.Linear)}
    able = {n: m for n, m in layers.items() if m.in_features % width == m.out_features % outs == 0}
    for name, layer in able.items():
        net.set_submodule(name, how(layer))
    return len(able)


@torch.no_grad()
def written_out(pipe: Any, plain: Any) -> Any:
    """A plain pipeline with weights that say what the quantised layers make of each input by itself."""
    layers = dict(getattr(plain, part_of(plain)).named_modules())
    for name, layer in getattr(pipe, part_of(pipe)).named_modules():
        if isinstance(layer, nn.Linear):
            zero = layer(torch.zeros(1, layer.in_features))
            layers[name].weight.copy_((layer(torch.eye(layer.in_features)) - zero).T)
    return plain


def frames(pipe: Any, mode: Any) -> tuple[MorphPath, Tensor]:
    path = Morpher(pipe).prepare(PICTURES, ["a cat", "a dog"], fit=FIT, steps=4)
    return path, path.sample([0, 0.3, 0.5, 1], SampleConfig(steps=4, attention_mode=mode), output="latent")


#: How near frames and LoRAs are: on a CPU bitsandbytes multiplies in bfloat16 where no gradient is asked for.
NEAR = {gguf: 1e-2, torchao: 1e-2, bitsandbytes: 0.2}


@pytest.mark.parametrize("make", [wide_flux, lambda: tiny_pipeline(block_out_channels=(64, 64), linear=True)])
@pytest.mark.parametrize("how", NEAR)
@pytest.mark.parametrize("mode", ["features", "kv"])
def test_a_quantised_network_is_fitted_inverted_and_sampled_as_the_linear_layers_it_stands_for(
    make: Callable[[], Any], how: Callable[[nn.Linear], nn.Linear], mode: str
) -> None:
    pipe = make()
    assert quantised(pipe, how) > 20
    (path, got), (_, unlike) = frames(pipe, mode), frames(make(), mode)
    reference, want = frames(written_out(pipe, make()), mode)
    assert path.bank is not None and reference.bank is not None
    assert path.bank.down.keys() == path.backbone.projections().keys() == reference.bank.down.keys()
    lost = (unlike - want).norm()  # by quantising: something, so that nearness says something
    assert (got - want).norm() < NEAR[how] * lost and lost > 1e-3 * want.norm()
    for name, up in path.bank.up.items():
        assert (reference.bank.up[name] - up).norm() < NEAR[how] * up.norm()


@pytest.mark.parametrize("make", [tiny_flux2_pipeline, tiny_sd3_pipeline, tiny_z_image_pipeline, tiny_qwen_pipeline])
def test_the_other_families_with_quantised_layers(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao's, which take layers of any width."""
    monkeypatch.setattr(ZImage, "native_size", (32, 32))
    pipe = make()
    assert quantised(pipe, torchao, 1) > 15
    (path, got), (reference, want) = frames(pipe, "kv"), frames(written_out(pipe, make()), "kv")
    _, unlike = frames(make(), "kv")
    assert path.bank is not None and reference.bank is not None
    assert path.bank.down.keys() == path.backbone.projections().keys()
    assert (got - want).norm() < 1e-2 * (unlike - want).norm()


def test_a_gguf_file_that_diffusers_loads_makes_a_film(tmp_path: Path) -> None:
    package = pytest.importorskip("gguf")
    plain = wide_flux()
    plain.save_pretrained(tmp_path / "model")
    writer = package.GGUFWriter(tmp_path / "flux.gguf", "flux")
    kinds = package.GGMLQuantizationType
    for name, weight in plain.transformer.state_dict().items():
        array = weight.numpy()
        if weight.ndim == 2 and weight.shape[1] % 32 == 0:
            writer.add_tensor(name, package.quants.quantize(array, kinds.Q8_0), raw_dtype=kinds.Q8_0)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    network = FluxTransformer2DModel.from_single_file(
        str(tmp_path / "flux.gguf"), config=str(tmp_path / "model"), subfolder="transformer", dtype=torch.float32,
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
    )  # fmt: skip
    pipe = FluxPipeline.from_pretrained(tmp_path / "model", transformer=network)
    pipe.default_sample_size = 8
    path, got = frames(pipe, "kv")
    _, want = frames(wide_flux(), "kv")
    assert type(path.backbone.network.transformer_blocks[0].attn.to_q).__name__ == "GGUFLinear"
    assert 0 < (got - want).norm() < 0.1 * want.norm()


@pytest.mark.parametrize("how", [gguf, bitsandbytes, torchao])
def test_a_path_file_knows_its_quantised_network(tmp_path: Path, how: Callable[[nn.Linear], nn.Linear]) -> None:
    pipe, same, other = wide_flux(), wide_flux(), wide_flux(seed=1)
    for each in (pipe, same, other):
        quantised(each, how)
    path, want = frames(pipe, "kv")
    file = path.save(tmp_path / "x.morph")
    loaded = MorphPath.load(file, Morpher(same))
    got = loaded.sample([0, 0.3, 0.5, 1], SampleConfig(steps=4, attention_mode="kv"), output="latent")
    assert_close(got, want)
    with pytest.raises(PathFileError, match="made with another model"):
        MorphPath.load(file, Morpher(other))
