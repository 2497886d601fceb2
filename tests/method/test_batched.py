"""The batched run against a plain sequential one: one frame at a time, end features stored and re-read, merged weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from conftest import tiny_pipeline, tiny_xl_pipeline
from diffmorpher import FitConfig, Morpher, MorphPath, SampleConfig
from diffmorpher.method.interpolate import Between, noise_between

POSITIONS = [0.0, 0.2, 0.5, 0.85, 1.0]
STEPS = 5


def make_path(
    images: int = 2, loop: bool = False, make: Callable[..., Any] = tiny_pipeline, **pipeline: Any
) -> MorphPath:
    """A path on a tiny model whose LoRAs are large enough to matter: B is drawn, not trained."""
    morpher = Morpher(make(**pipeline))
    pictures = [np.random.default_rng(k).integers(0, 256, (32, 32, 3), dtype=np.uint8) for k in range(images)]
    prompts = ["a red apple", "a bus", "a cat", "a dog"][:images]
    path = morpher.prepare(pictures, prompts, fit=FitConfig(rank=3, steps=1), steps=STEPS, loop=loop)
    generator = torch.Generator().manual_seed(1)
    assert path.bank is not None
    for k in range(images):
        for up in path.bank.up.values():
            up[k] += torch.randn(up[k].shape, generator=generator) * 0.3
        for down in path.bank.down.values():
            down[k] += torch.randn(down[k].shape, generator=generator) * 0.1
    path._trajectories.clear()
    return path


class StoredAttention:
    """Self-attention in plain steps that stores its inputs, or takes its keys and values from stored ones."""

    def __init__(self) -> None:
        self.record: list[Tensor] | None = None
        self.source: tuple[list[Any], list[Any], float, str] | None = None

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        h = hidden_states
        q, k, v = attn.to_q(h), attn.to_k(h), attn.to_v(h)
        attended = [(1.0, k, v)]  # what is attended to, and with which share
        if self.record is not None:
            self.record.append((h, k, v))
        if self.source is not None:
            end_0, end_1, a, mode = self.source
            (h_0, k_0, v_0), (h_1, k_1, v_1) = end_0.pop(0), end_1.pop(0)
            if mode == "features":
                mixed = (1 - a) * h_0 + a * h_1
                attended = [(1.0, attn.to_k(mixed), attn.to_v(mixed))]
            elif mode == "kv":
                attended = [(1.0, (1 - a) * k_0 + a * k_1, (1 - a) * v_0 + a * v_1)]
            else:
                attended = [
                    (1 - a, torch.cat([k, k_0], 1), torch.cat([v, v_0], 1)),
                    (a, torch.cat([k, k_1], 1), torch.cat([v, v_1], 1)),
                ]
        result: Tensor | float = 0.0
        for share, keys, values in attended:
            heads = (x.reshape(1, -1, attn.heads, x.shape[-1] // attn.heads).transpose(1, 2) for x in (q, keys, values))
            query, key, value = heads
            weights = torch.softmax(query @ key.transpose(2, 3) / query.shape[-1] ** 0.5, dim=-1)
            result = result + share * (weights @ value).transpose(1, 2).flatten(2)
        return attn.to_out[0](result)


def merged_unet(path: MorphPath, weights: Tensor, blend: str) -> Any:
    """A copy of the U-Net with the mixed LoRA added to its weights."""
    unet = copy.deepcopy(path.backbone.network)
    assert path.bank is not None
    for name in path.bank.down:
        down, up = path.bank.down[name], path.bank.up[name]
        w = weights.float()
        if blend == "factors":
            delta = torch.tensordot(w, up, 1) @ torch.tensordot(w, down, 1)
        else:
            delta = sum(w[k] * up[k] @ down[k] for k in range(len(w)))
        unet.get_submodule(name).weight.data += delta
    return unet


@torch.no_grad()
def run_alone(path: MorphPath, position: float, config: SampleConfig, stored: dict[float, list[Any]]) -> Tensor:
    """One frame by itself. The features of an end image are stored under its position; other frames read them."""
    at = Between.images([position], path.num_images, path.loop)
    lora_at = Between.images([position if config.fix_lora is None else config.fix_lora], path.num_images, path.loop)
    blend = "factors" if config.lora_blend in ("auto", "factors") else "product"
    unet = merged_unet(path, lora_at.weights(path.num_images)[0], blend)
    processors = [StoredAttention() for _ in range(100)]
    names = [n for n in unet.attn_processors if n.startswith("up_blocks") and "attn1" in n]
    by_name = dict(zip(names, processors, strict=False))
    unet.set_attn_processor({n: by_name.get(n, p) for n, p in unet.attn_processors.items()})
    a = float(at.alpha)
    left, right = int(at.left), int(at.right)
    is_end = a in (0.0, 1.0)
    image = (left if a == 0 else right) if is_end else None
    told = {name: (1 - a) * x[left] + a * x[right] for name, x in path.conditioning.tensors.items()}
    sizes = torch.tensor([[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]])  # as it was, where it was cut, as it shall be
    added = {"text_embeds": told["pooled"][None], "time_ids": sizes} if "pooled" in told else None
    z = noise_between(path.noises_at(config.steps), at, config.adain)
    schedule = path.backbone.schedule(config.steps)
    features: list[Any] = []
    for i in range(config.steps):
        for n, p in by_name.items():
            p.record, p.source = [], None
            if not is_end and i < config.attention_lambda * config.steps:
                p.source = [stored[left][i][n]], [stored[right][i][n]], a, config.attention_mode
        level = schedule.levels[config.steps - i]
        eps = unet(z, level.time, encoder_hidden_states=told["text"][None], added_cond_kwargs=added).sample
        features.append({n: p.record[0] for n, p in by_name.items() if p.record})
        z = schedule.down(path.backbone.prediction(eps, z, level), config.steps - i)
    if is_end:
        stored[image] = features
    return z[0]


def run_sequentially(path: MorphPath, positions: list[float], config: SampleConfig) -> Tensor:
    stored: dict[float, list[Any]] = {}
    for k in range(path.num_images):
        run_alone(path, float(k), config, stored)
    return torch.stack([run_alone(path, p, config, stored) for p in positions])


@pytest.mark.parametrize(
    ("changes", "pipeline"),
    [
        ({}, {}),
        ({"attention_mode": "kv"}, {}),
        ({"attention_mode": "outer"}, {}),
        ({"lora_blend": "product"}, {"linear": True}),
        ({"adain": False, "attention_lambda": 1.0}, {}),
        ({"attention_lambda": 0.0}, {}),
        ({"fix_lora": 0.3}, {}),
        ({"attention_mode": "kv", "lora_blend": "product", "fix_lora": 1.0}, {}),
    ],
)
def test_batched_is_sequential(changes: dict[str, Any], pipeline: dict[str, Any]) -> None:
    path = make_path(**pipeline)
    config = SampleConfig(steps=STEPS, **changes)
    batched = path.sample(POSITIONS, config, output="latent")
    assert_close(batched, run_sequentially(path, POSITIONS, config), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["features", "kv"])
@pytest.mark.parametrize("images", [2, 3])
def test_stable_diffusion_xl_is_sequential_too(mode: Any, images: int) -> None:
    """Beside the text its pooled form is mixed, and the sizes are told."""
    path = make_path(images, make=tiny_xl_pipeline)
    config = SampleConfig(steps=STEPS, attention_mode=mode, batch_size=2)
    positions = [0.0, 0.3, images - 1.25, images - 1.0]
    batched = path.sample(positions, config, output="latent")
    assert_close(batched, run_sequentially(path, positions, config), rtol=1e-4, atol=1e-4)
    apart = path.sample(positions[1:2], replace(config, attention_lambda=0), "latent")
    assert (apart - batched[1:2]).abs().max() > 1e-2
    pooled = path.conditioning["pooled"]
    pooled[:] = pooled.flip(0)  # what it says matters
    path._trajectories.clear()
    assert (path.sample(positions[1:2], config, "latent") - batched[1:2]).abs().max() > 1e-2


def test_each_part_matters_on_this_path() -> None:
    """The comparisons above would pass idly if a part changed nothing: every switch must move the middle frame."""
    path = make_path()
    middle = path.sample([0.5], SampleConfig(steps=STEPS), output="latent")
    for changes in (
        {"attention_lambda": 0.0},
        {"attention_mode": "kv"},
        {"attention_mode": "outer"},
        {"lora_blend": "product"},
        {"adain": False},
        {"fix_lora": 0.0},
        {"guidance_scale": 3.0},
    ):
        other = path.sample([0.5], SampleConfig(steps=STEPS, **changes), output="latent")
        assert (other - middle).abs().max() > 1e-2, changes


def test_outer_attention_leaves_the_ends_and_the_processors_as_they_are() -> None:
    path = make_path()
    before = dict(path.backbone.network.attn_processors)
    plain = path.sample([0.0, 1.0], SampleConfig(steps=STEPS, attention_lambda=0.0), output="latent")
    outer = path.sample(
        [0.0, 1.0], SampleConfig(steps=STEPS, attention_mode="outer", attention_lambda=1.0), output="latent"
    )
    assert_close(outer, plain, rtol=1e-4, atol=1e-4)
    assert all(path.backbone.network.attn_processors[name] is processor for name, processor in before.items())


def test_three_images_and_a_loop_are_sequential_too() -> None:
    path = make_path(images=3, loop=True)
    config = SampleConfig(steps=STEPS, batch_size=2)
    positions = [0.0, 0.5, 1.0, 1.4, 2.0, 2.6, 3.0]
    batched = path.sample(positions, config, output="latent")
    assert_close(batched[-1], batched[0])
    sequential = run_sequentially(path, positions[:-1], config)
    assert_close(batched[:-1], sequential, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_frames_do_not_depend_on_the_chunk(guidance: float) -> None:
    path = make_path(images=3)
    positions = [1.7, 0.0, 0.3, 0.3, 1.0, 0.9, 2.0, 1.2]
    config = SampleConfig(steps=STEPS, guidance_scale=guidance)
    whole = path.sample(positions, replace(config, batch_size=100), output="latent")
    for batch_size in (1, 2, 3):
        chunked = path.sample(positions, replace(config, batch_size=batch_size), output="latent")
        assert_close(chunked, whole, rtol=1e-4, atol=1e-4)
    assert_close(whole[2], whole[3])
    assert (whole[0] - whole[-1]).abs().max() > 0.1  # the order asked for is the order given


def test_rows_are_counted_and_ends_ride_along() -> None:
    path = make_path()
    config = SampleConfig(steps=STEPS, batch_size=100)
    path.noises_at(STEPS)
    before = path.backbone.unet_rows
    path.sample([0, 0.25, 0.5, 0.75, 1], config, output="latent")
    assert path.backbone.unet_rows - before == 5 * STEPS  # the end frames are the end rows
    path.sample([0.5], config, output="latent")
    assert path.backbone.unet_rows - before == (5 + 3) * STEPS
    path.sample([1.0], config, output="latent")
    assert path.backbone.unet_rows - before == (5 + 3 + 1) * STEPS


def test_images_alone_go_in_chunks_too() -> None:
    path = make_path(images=4)
    config = SampleConfig(steps=STEPS, batch_size=2)
    sizes: list[int] = []
    predict = path.backbone.predict

    def watch(latents: Tensor, *args: Any) -> Any:
        sizes.append(len(latents))
        return predict(latents, *args)

    path.noises_at(STEPS)
    path.backbone.predict = watch  # type: ignore[method-assign]
    alone = path.sample([0, 1, 2, 3], config, output="latent")
    assert sizes == [2] * STEPS * 2
    assert_close(alone, path.sample([0, 0.5, 1, 1.5, 2, 2.5, 3], config, output="latent")[::2], rtol=1e-4, atol=1e-4)


def test_guidance_is_the_formula() -> None:
    """Two frames at the ends (own attention) with guidance 3 against a plain loop with two U-Net calls a step."""
    path = make_path()
    got = path.sample([0.0, 1.0], SampleConfig(steps=STEPS, guidance_scale=3.0, adain=False), output="latent")
    schedule, noises = path.backbone.schedule(STEPS), path.noises_at(STEPS)
    empty, text = path.backbone.encode_prompts([""])["text"], path.conditioning["text"]
    for k in range(2):
        unet = merged_unet(path, torch.eye(2)[k], "factors")
        z = noises[k : k + 1]
        with torch.no_grad():
            for level in range(STEPS, 0, -1):
                at = schedule.levels[level]
                free = unet(z, at.time, encoder_hidden_states=empty).sample
                eps = free + 3.0 * (unet(z, at.time, encoder_hidden_states=text[k : k + 1]).sample - free)
                z = schedule.down(path.backbone.prediction(eps, z, at), level)
        assert_close(got[k : k + 1], z, rtol=1e-4, atol=1e-4)
