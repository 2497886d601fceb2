"""The bundled model through the whole method: what goes in comes back, and the parts do what the paper says of them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffmorpher import FitConfig, Morpher, MorphPath, SampleConfig, ScheduleConfig
from diffmorpher.files.pictures import fit_image
from diffmorpher.method.perceptual import perceptual_distance
from diffmorpher.path import to_pixels

Demo = dict[str, Image.Image]


def psnr(x: Tensor, y: Tensor) -> float:
    """Of pictures in [-1, 1], in dB."""
    return float(-10 * torch.log10(((x - y) / 2).square().mean()))


def prepare(mini: Morpher, demo: Demo, names: tuple[str, str], fit: FitConfig | None) -> MorphPath:
    """With the paper's steps: the bundled model's own settings lead through the images whatever the inversion loses."""
    pictures, prompts = [demo[n] for n in names], [n.replace("-", " ") for n in names]
    return mini.prepare(pictures, prompts, fit=fit, steps=SampleConfig.steps)


def ends_against_inputs(
    mini: Morpher, demo: Demo, path: MorphPath, names: tuple[str, str]
) -> list[tuple[float, float]]:
    """PSNR and perceptual distance between the first and last frame and the two input pictures."""
    inputs = to_pixels([fit_image(demo[n], mini.backbone.native_size) for n in names])
    frames = to_pixels(path.sample([0, 1], SampleConfig()))
    distances = perceptual_distance()(frames, inputs).tolist()
    return [(psnr(f, x), d) for f, x, d in zip(frames, inputs, distances, strict=True)]


def test_inversion_then_sampling_gives_the_latents_back(mini: Morpher, demo: Demo) -> None:
    """DDIM up and down again, without LoRA: what is lost is the steps' own error, and falls with them (measured: 0.090, 0.066,
    0.049, 0.036 at 25, 50, 100, 200 steps). A solver that does not undo itself would not go to zero."""
    path = prepare(mini, demo, ("dog-face", "cat-face"), fit=None)

    def loss(steps: int) -> float:
        back = path.sample([0, 1], SampleConfig(steps=steps, adain=False), output="latent")
        return float((back - path.latents).norm() / path.latents.norm())

    losses = [loss(steps) for steps in (25, 50, 100)]
    assert losses[2] < 0.052
    for coarse, fine in itertools.pairwise(losses):
        assert 0.65 < fine / coarse < 0.8


def test_the_end_frames_are_the_input_images(mini: Morpher, demo: Demo) -> None:
    """Measured: 32.9 and 34.9 dB, 0.016 and 0.012; of the autoencoder alone 36.2 and 35.3 dB, 0.010 and 0.012."""
    names = ("dog-face", "cat-face")
    path = prepare(mini, demo, names, FitConfig(steps=20))
    for decibels, distance in ends_against_inputs(mini, demo, path, names):
        assert decibels > 32.0 and distance < 0.018


@pytest.mark.slow
def test_the_end_frames_at_the_papers_settings(mini: Morpher, demo: Demo, capsys: pytest.CaptureFixture[str]) -> None:
    """With what the autoencoder alone reaches; both are printed. Measured: 34.6 and 33.0 dB, 0.012 and 0.021; the benchmark has
    34.4 and 33.0 dB, 0.012 and 0.022 for the same pictures. (The bar of 0.014 that was here had not been measured.)"""
    names = ("dog-face", "cat-face")
    path = prepare(mini, demo, names, FitConfig())
    inputs = to_pixels([fit_image(demo[n], mini.backbone.native_size) for n in names])
    alone = path.decode(path.latents)
    ends = ends_against_inputs(mini, demo, path, names)
    with capsys.disabled():
        for name, end, x, y, d in zip(names, ends, inputs, alone, perceptual_distance()(alone, inputs), strict=True):
            print(f"\n{name}: {end[0]:.1f} dB, {end[1]:.3f}; autoencoder alone {psnr(y, x):.1f} dB, {float(d):.3f}")
    for decibels, distance in ends:
        assert decibels > 32.5 and distance < 0.024


@pytest.mark.slow
def test_the_end_frames_at_the_models_own_settings(mini: Morpher, demo: Demo) -> None:
    """Exact ends: the first and the last frame are what the autoencoder makes of the pictures, to a rounding error."""
    names = ("dog-face", "cat-face")
    result = mini([demo[n] for n in names], ["a dog face", "a cat face"], num_frames=3)
    alone = result.path.decode(result.path.latents)
    assert psnr(to_pixels([result.frames[0], result.frames[-1]]), alone) > 50  # 8 bits alone: about 59


def test_the_film_is_made_of_pictures_not_double_exposures(mini: Morpher, demo: Demo) -> None:
    """The middle of a cross-fade is the mean of its ends; the middle of a morph must be something else, and as sharp."""
    path = prepare(mini, demo, ("lion-face", "tiger-face"), FitConfig(steps=20))
    first, middle, last = to_pixels(path.sample([0, 0.5, 1], SampleConfig()))
    fade = (first + last) / 2
    distance = perceptual_distance()
    assert float(distance(middle[None], fade[None])) > 0.05

    def sharpness(x: Tensor) -> float:
        return float(x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean())

    assert sharpness(middle) > 0.6 * min(sharpness(first), sharpness(last))


PAIRS = [("dog-face", "cat-face"), ("bus", "automobile"), ("red-apple", "tangerine")]
OFF = SampleConfig(attention_lambda=0.0, adain=False)
ROWS = [
    ("ddim", False, OFF, False),
    ("+ lora", True, OFF, False),
    ("+ attention", True, replace(OFF, attention_lambda=0.6), False),
    ("+ adain", True, SampleConfig(), False),
    ("+ reschedule", True, SampleConfig(), True),
    ("all, attention kv", True, SampleConfig(attention_mode="kv"), True),
    ("all, LoRA product", True, SampleConfig(lora_blend="product"), True),
]


def colour_drift(frames: Tensor, alphas: list[float]) -> float:
    """How far the frames' mean colours stray from the straight line between the ends' (root mean square)."""
    means = frames.mean(dim=(2, 3)).double().numpy()
    line = np.outer(1 - np.array(alphas), means[0]) + np.outer(alphas, means[-1])
    return float(np.sqrt(((means - line) ** 2).mean()))


@pytest.mark.slow
def test_ablation(mini: Morpher, demo: Demo, capsys: pytest.CaptureFixture[str]) -> None:
    """Each part switched on in turn, on three pairs (docs/results.md has all 24); the table is printed."""
    table: dict[str, list[list[float]]] = {name: [] for name, *_ in ROWS}
    for names in PAIRS:
        paths = {True: prepare(mini, demo, names, FitConfig()), False: prepare(mini, demo, names, None)}
        inputs = to_pixels([fit_image(demo[n], mini.backbone.native_size) for n in names])
        for name, lora, sample, reschedule in ROWS:
            result = mini.film(paths[lora], 17, sample, ScheduleConfig(enabled=reschedule))
            frames = to_pixels(result.frames)
            ends = perceptual_distance()(frames[[0, -1]], inputs).mean().item()
            table[name].append([result.ppl, result.pdv, ends, colour_drift(frames, result.alphas)])
    means = {name: np.mean(rows, axis=0) for name, rows in table.items()}
    with capsys.disabled():
        print("\n| on | PPL | PDV | end distance | colour drift |\n| --- | --- | --- | --- | --- |")
        for name, (length, variance, ends, drift) in means.items():
            print(f"| {name} | {length:.4f} | {variance:.2e} | {ends:.4f} | {drift:.4f} |")
    length, variance, ends, drift = range(4)
    # LoRA keeps the ends, it and attention make the way shorter, AdaIN keeps the colours on their line, rescheduling evens
    # the steps.
    assert means["+ lora"][ends] < 0.7 * means["ddim"][ends]
    assert means["+ lora"][length] < means["ddim"][length]
    assert means["+ attention"][length] < 0.95 * means["+ lora"][length]
    assert means["+ adain"][drift] < 0.95 * means["+ attention"][drift]
    assert means["+ reschedule"][variance] < 0.7 * means["+ adain"][variance]
    for name, values in means.items():
        assert values[ends] < 0.02, name
