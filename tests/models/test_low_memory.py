"""Low memory: the same films, with smaller batches and less kept for the way back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import (
    tiny_flux2_pipeline,
    tiny_flux_pipeline,
    tiny_pipeline,
    tiny_qwen_pipeline,
    tiny_sd3_pipeline,
    tiny_xl_pipeline,
    tiny_z_image_pipeline,
)
from diffmorpher import FitConfig, Morpher, SampleConfig, ScheduleConfig

PICTURES = [Image.effect_noise((32, 32), s).convert("RGB") for s in (20, 60, 90)]
FIT, SAMPLE = FitConfig(rank=2, steps=3, learning_rate=1e-2, draws=2), SampleConfig(steps=3)


def morph(low_memory: bool, pipe: Any = None) -> tuple[Any, list[tuple[int, bool]], list[int]]:
    """The film, rows and checkpointing of every U-Net batch, and the pictures of every VAE batch."""
    morpher = Morpher(pipe or tiny_pipeline(), low_memory=low_memory)
    unet, vae = morpher.pipe.unet, morpher.pipe.vae
    batches: list[tuple[int, bool]] = []
    pictures: list[int] = []
    handles = [
        unet.register_forward_hook(lambda m, args, output: batches.append((len(args[0]), m.is_gradient_checkpointing))),
        vae.encoder.register_forward_hook(lambda m, args, output: pictures.append(len(args[0]))),
        vae.decoder.register_forward_hook(lambda m, args, output: pictures.append(len(args[0]))),
    ]
    result = morpher(PICTURES, ["a", "b", "c"], 7, fit=FIT, sample=SAMPLE)
    for handle in handles:
        handle.remove()
    return result, batches, pictures


def test_the_film_is_the_same_from_smaller_batches() -> None:
    plain, plain_batches, plain_pictures = morph(False)
    spared, batches, pictures = morph(True)
    assert spared.alphas == pytest.approx(plain.alphas, abs=1e-3)
    for a, b in zip(spared.frames, plain.frames, strict=True):
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 2
    # An image's two draws in the fit; two frames and the three images they can touch.
    assert max(rows for rows, _ in batches) <= 5 < max(rows for rows, _ in plain_batches)
    assert set(pictures) == {1} and max(plain_pictures) > 1
    # Three images in turn, three steps each, with checkpointing; sampling is without.
    assert [checkpointed for _, checkpointed in batches] == [True] * 9 + [False] * (len(batches) - 9)
    assert not any(checkpointed for _, checkpointed in plain_batches)
    # Progress and rows are of the same work; the fit's batches are three times as many.
    assert sum(r for r, c in batches if c) == 3 * 3 * 2 == sum(r for r, _ in plain_batches[:3])


@pytest.mark.parametrize(
    "make",
    [
        tiny_xl_pipeline, tiny_flux_pipeline, tiny_flux2_pipeline, tiny_sd3_pipeline, tiny_z_image_pipeline, tiny_qwen_pipeline,
    ],
)  # fmt: skip
def test_a_loop_of_every_other_family_is_the_same_too(make: Any) -> None:
    """Which leads back through the frame half way that it came by, and ends before it repeats its first."""
    noise = np.random.default_rng(0).integers(0, 90, (32, 32, 3), dtype=np.uint8)
    films, batches = [], []
    for low_memory in (False, True):
        morpher, rows = Morpher(make(), low_memory=low_memory), []
        morpher.backbone.network.register_forward_pre_hook(
            lambda m, args, kwargs, rows=rows: rows.append(len((*args, *kwargs.values())[0])), with_kwargs=True
        )
        schedule = ScheduleConfig(enabled=False)
        pictures, prompts = [noise, 255 - noise], ["a cat", "a house"]
        film = morpher(pictures, prompts, 6, size=(32, 32), loop=True, fit=FIT, sample=SAMPLE, schedule=schedule)
        films.append(np.stack([np.asarray(frame).astype(int) for frame in film.frames]))
        assert film.alphas == pytest.approx([i / 3 for i in range(6)]) and film.settings["loop"] is True
        batches.append(max(rows))
    plain, spared = films
    assert np.abs(spared - plain).mean() < 0.01 and np.abs(spared - plain).max() <= 2 and batches[1] < batches[0]
    assert np.abs(plain[[4, 5]] - plain[[2, 1]]).mean() < 0.01  # the way back
    # By the mean, as Qwen-Image's tiny autoencoder makes all pictures nearly grey.
    assert all(np.abs(plain[i] - plain[i + 1]).mean() > 0.1 for i in range(3))


def test_less_is_kept_for_the_way_back() -> None:
    kept: dict[bool, int] = {}
    for low_memory in (False, True):
        morpher = Morpher(tiny_pipeline(), low_memory=low_memory)
        kept[low_memory] = 0

        def pack(x: torch.Tensor, low: bool = low_memory) -> torch.Tensor:
            kept[low] += x.numel() if not isinstance(x, torch.nn.Parameter) else 0
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            # One step: what the second forward pass of a checkpointed block keeps goes through its own hooks.
            morpher.fit(PICTURES[0], fit=FitConfig(rank=2, steps=1))
    assert kept[True] < kept[False] / 2


def test_a_models_own_checkpointing_is_left_as_it_was() -> None:
    for own in (False, True):
        pipe = tiny_pipeline()
        if own:
            pipe.unet.enable_gradient_checkpointing()
        morph(True, pipe)
        assert pipe.unet.is_gradient_checkpointing == own


@pytest.mark.gpu
def test_idle_networks_leave_the_gpu() -> None:
    """The text encoder is away while the U-Net runs, and the film is that of a model that stays on the GPU."""
    films = []
    for low_memory in (False, True):
        torch.cuda.reset_peak_memory_stats()
        morpher = Morpher.from_pretrained("mini", device="cuda", dtype="float32", low_memory=low_memory)
        places: set[str] = set()
        morpher.pipe.unet.register_forward_hook(
            lambda m, args, output, morpher=morpher, places=places: places.add(morpher.pipe.text_encoder.device.type)
        )
        films.append(morpher(PICTURES[:2], num_frames=4, fit=FIT, sample=SAMPLE))
        assert places == {"cpu" if low_memory else "cuda"}
    for a, b in zip(films[0].frames, films[1].frames, strict=True):
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 4
