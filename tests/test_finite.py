"""NaN and infinity end a run at the step where they come up, in a sentence; float16's VAE gets a second try in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from conftest import tiny_flux_pipeline, tiny_pipeline
from diffmorpher import FitConfig, Morpher, SampleConfig
from diffmorpher.errors import NumbersError

PICTURES = [Image.effect_noise((32, 32), s).convert("RGB") for s in (20, 60)]
FIT, SAMPLE = FitConfig(rank=2, steps=4, learning_rate=1e-2), SampleConfig(steps=3)


def spoilt(network: torch.nn.Module, call: int, value: float) -> list[int]:
    """From the given call on (the first is 1) the network's output holds that value; returns the list of its calls."""
    calls: list[int] = []

    def spoil(module: Any, args: Any, output: Any) -> None:
        calls.append(len(calls) + 1)
        if len(calls) >= call:
            (output[0] if isinstance(output, tuple) else output.sample)[0, 0, 0] = value

    network.register_forward_hook(spoil)
    return calls


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_flux_pipeline])
@pytest.mark.parametrize(
    ("call", "value", "said"),
    [
        (3, float("nan"), r"NaN in the loss \(fit, step 3 of 4\): most likely the LoRA rate of 0.01 is too high"),
        (4, float("inf"), r"infinity in the loss \(fit, step 4 of 4\)"),
        (6, float("nan"), r"NaN in the latents \(invert, step 2 of 3\): most likely a LoRA is too strong"),
        (9, -float("inf"), r"(infinity|NaN) in the latents \(sample, step 2 of 3\): most likely a LoRA is too strong"),
    ],
)
def test_a_run_ends_at_the_step_where_it_comes_up(make: Callable[[], Any], call: int, value: float, said: str) -> None:
    morpher = Morpher(make())
    calls = spoilt(morpher.backbone.network, call, value)
    with pytest.raises(NumbersError, match=said):
        morpher(PICTURES, "a", 2, fit=FIT, sample=SAMPLE)
    assert len(calls) == call


def test_a_rate_that_is_too_high_is_named_as_the_cause() -> None:
    """By a real divergence."""
    with pytest.raises(
        NumbersError, match=r"in (the loss|a LoRA) \(fit, step \d+ of 9\): most likely the LoRA rate of 1e\+30 is"
    ):
        Morpher(tiny_pipeline()).fit(PICTURES[0], fit=FitConfig(rank=2, steps=9, learning_rate=1e30))


def test_gradients_that_overflow_in_the_last_step_spoil_no_lora() -> None:
    morpher = Morpher(tiny_pipeline())
    calls: list[int] = []

    def overflow(module: Any, args: Any, output: Any) -> None:
        calls.append(1)
        if len(calls) == FIT.steps:
            output.sample.register_hook(lambda gradient: gradient * float("inf"))

    morpher.backbone.network.register_forward_hook(overflow)
    with pytest.raises(NumbersError, match=r"in a LoRA \(fit, step 4 of 4\)"):
        morpher.fit(PICTURES[0], fit=FIT)


def test_damaged_weights_and_a_narrow_type_are_named_as_the_cause() -> None:
    pipe = tiny_pipeline()
    pipe.unet.mid_block.resnets[0].conv1.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(
        NumbersError, match=r"the model is damaged \(mid_block.resnets.0.conv1.weight of its UNet2D.* get its file"
    ):
        Morpher(pipe).fit(PICTURES[0], fit=FIT)
    pipe = tiny_pipeline()
    pipe.vae.decoder.conv_out.bias.data[0] = float("inf")
    path = Morpher(pipe).prepare(PICTURES, fit=None, steps=3)
    with pytest.raises(
        NumbersError, match=r"infinity in a frame's pixels \(decode\): .* damaged \(decoder.conv_out.bias of"
    ):
        path.sample([0.5], SAMPLE)  # clamped, it would be a white frame
    pipe = tiny_pipeline()
    pipe.text_encoder.final_layer_norm.bias.data[0] = float("nan")
    with pytest.raises(
        NumbersError,
        match=r"NaN in the prompts' text \(encode\): most likely the model is damaged \(final_layer_norm.bias of its CLIP",
    ):
        Morpher(pipe).prepare(PICTURES, fit=None)
    pipe = tiny_pipeline()
    pipe.unet.to(torch.float16).conv_out.bias.data[0] = 60000  # twice that is infinite in float16
    pipe.unet.conv_out.weight.data *= 1e4
    with pytest.raises(
        NumbersError, match=r"most likely float16, which ends at 65504, is too narrow for this model; use b"
    ):
        Morpher(pipe).fit(PICTURES[0], fit=FIT)


def overflowing() -> Any:
    """A pipeline with a float16 VAE whose numbers pass 65504 on the way, in and out, and come back."""
    pipe = tiny_pipeline()
    for coder in (pipe.vae.encoder, pipe.vae.decoder):
        coder.conv_in.weight.data *= 2e5
        coder.conv_in.weight.data.clamp_(-6e4, 6e4)
    pipe.vae.half()
    return pipe


def test_a_vae_that_overflows_in_float16_works_in_float32() -> None:
    narrow, wide = overflowing(), overflowing()
    wide.vae.float()
    with torch.no_grad():
        assert not narrow.vae.encode(torch.ones(1, 3, 32, 32).half()).latent_dist.mean.isfinite().all()
    before = {name: x.clone() for name, x in narrow.vae.state_dict().items()}
    encoded: list[torch.dtype] = []
    narrow.vae.encoder.register_forward_pre_hook(lambda m, args: encoded.append(args[0].dtype))
    decoded: list[torch.dtype] = []
    narrow.vae.decoder.register_forward_pre_hook(lambda m, args: decoded.append(args[0].dtype))
    with pytest.warns(UserWarning, match="the VAE overflowed in float16; it works in float32 from here on"):
        path = Morpher(narrow).prepare(PICTURES, fit=None, steps=3)
    got = path.sample([0, 0.5, 1], SAMPLE, output="pt")
    assert encoded == [torch.float16, torch.float32] and set(decoded) == {torch.float32}  # one try is enough
    want = Morpher(wide).prepare(PICTURES, fit=None, steps=3).sample([0, 0.5, 1], SAMPLE, output="pt")
    torch.testing.assert_close(got, want)
    after = narrow.vae.state_dict()
    assert all(x.dtype == torch.float16 and torch.equal(x, before[name]) for name, x in after.items())


def test_a_vae_that_fails_in_float32_too_ends_the_run() -> None:
    pipe = overflowing()
    pipe.vae.decoder.conv_out.bias.data[0] = float("nan")
    with pytest.warns(UserWarning, match="overflowed"):
        path = Morpher(pipe).prepare(PICTURES, fit=None, steps=3)
    with pytest.raises(NumbersError, match=r"decode\): most likely the model is damaged \(decoder.conv_out.bias"):
        path.sample([0.5], SAMPLE)
    assert pipe.vae.dtype == torch.float16
