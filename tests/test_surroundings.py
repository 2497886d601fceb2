"""The process around a morph: torch's defaults, threads, a pipeline that its owner changes. Films stay the same."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from conftest import tiny_flux_pipeline, tiny_pipeline, tiny_qwen_pipeline, tiny_xl_pipeline
from diffmorpher import FitConfig, Morpher, MorphPath, MorphResult, SampleConfig
from diffmorpher.errors import ModelError
from diffmorpher.models.turns import settled

PICTURES = [Image.effect_noise((32, 32), s).convert("RGB") for s in (20, 60, 90)]
FIT, SAMPLE = FitConfig(rank=2, steps=3, learning_rate=1e-2), SampleConfig(steps=3)


def film(morpher: Morpher, seed: int = 0, images: list[Image.Image] = PICTURES[:2]) -> MorphResult:
    return morpher(images, "a red apple", num_frames=4, fit=FIT, sample=SAMPLE, seed=seed)


def pixels(result: MorphResult) -> list[bytes]:
    return [frame.tobytes() for frame in result.frames]


# ---- torch's defaults


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "another device": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "gradients": torch.enable_grad,
}


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_xl_pipeline, tiny_flux_pipeline, tiny_qwen_pipeline])
def test_torchs_defaults_change_no_byte(make: Callable[[], Any], tmp_path: Path) -> None:
    """Of making a Morpher, fitting, inverting, sampling, saving, loading and measuring."""
    plain = film(Morpher(make(), name="tiny"))
    for name, surroundings in SURROUNDINGS.items():
        pipe = make()
        with surroundings():
            state = torch.get_default_dtype(), torch.get_default_device(), torch.is_autocast_enabled("cpu")
            morpher = Morpher(pipe, name="tiny")
            result = film(morpher)
            loaded = MorphPath.load(result.path.save(tmp_path / "a.morph"), morpher)
            again = morpher.film(loaded, 4, SAMPLE)
            assert state == (torch.get_default_dtype(), torch.get_default_device(), torch.is_autocast_enabled("cpu"))
        assert pixels(result) == pixels(again) == pixels(plain), name
        assert result.distances == again.distances == plain.distances, name


def test_loading_by_name_in_other_surroundings(loaded_mini: Morpher) -> None:
    weight = loaded_mini.backbone.network.conv_in.weight
    for name in ("float64", "another device"):
        with SURROUNDINGS[name]():
            morpher = Morpher.from_pretrained("mini", device="cpu")
        assert morpher.backbone.network.conv_in.weight.dtype == torch.float32
        assert torch.equal(morpher.backbone.network.conv_in.weight, weight)


# ---- threads


def test_one_morpher_in_threads_makes_the_films_it_makes_alone() -> None:
    morpher = Morpher(tiny_pipeline())
    alone = [film(morpher, seed) for seed in range(4)]
    pipe = morpher.pipe
    trainable = [p.requires_grad for p in pipe.unet.parameters()]
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda seed: film(morpher, seed), range(4)))
    for one, other in zip(alone, together, strict=True):
        assert pixels(one) == pixels(other) and one.unet_rows == other.unet_rows
    assert trainable == [p.requires_grad for p in pipe.unet.parameters()]
    assert tf32 == (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())


def test_two_morphers_of_one_pipeline_and_of_two_in_threads() -> None:
    pipe, other = tiny_pipeline(), tiny_pipeline(seed=1)
    morphers = [Morpher(pipe), Morpher(pipe, tf32=True), Morpher(other)]
    alone = [pixels(film(morpher)) for morpher in morphers]
    before = torch.backends.cudnn.allow_tf32
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(lambda morpher: pixels(film(morpher)), morphers))
    assert alone == together and torch.backends.cudnn.allow_tf32 == before


def test_one_path_sampled_in_threads() -> None:
    path = Morpher(tiny_pipeline()).prepare(PICTURES, fit=FIT, steps=3)
    positions = [[0.1 * i, 1 + 0.1 * i] for i in range(1, 9)]
    alone = [path.sample(at, SAMPLE, output="latent") for at in positions]
    barrier = threading.Barrier(8)

    def sample(at: list[float]) -> torch.Tensor:
        barrier.wait()
        return path.sample(at, SAMPLE, output="latent")

    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(sample, positions))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "omp_get_max_threads"), reason="needs OpenMP, which counts by thread"
)
def test_a_new_thread_computes_with_the_processs_number_of_threads() -> None:
    """A convolution in a thread in which torch has not been asked for that number takes OpenMP's own, and adds up otherwise."""
    threads_here, before = ctypes.CDLL(None).omp_get_max_threads, torch.get_num_threads()

    def within() -> int:
        with settled():
            return int(threads_here())

    torch.set_num_threads(3)  # neither what OMP_NUM_THREADS usually says nor the number of cores
    try:
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(within).result() == 3
    finally:
        torch.set_num_threads(before)


# ---- a pipeline that its owner changes


def used(morpher: Morpher, path: MorphPath) -> list[Callable[[], Any]]:
    return [
        lambda: film(morpher),
        lambda: morpher.fit(PICTURES[0], fit=FIT),
        lambda: path.sample([0.5], SAMPLE),
        lambda: morpher.film(path, 3, SAMPLE),
    ]


def test_what_is_done_to_a_pipeline_afterwards_is_seen_at_each_use() -> None:
    pipe = tiny_pipeline()
    morpher = Morpher(pipe)
    path = morpher.prepare(PICTURES[:2], fit=FIT, steps=3)
    plain = path.sample([0.5], SAMPLE, output="latent")

    pipe.fuse_qkv_projections()
    for use in used(morpher, path):
        with pytest.raises(ModelError, match="projections are fused"):
            use()
    pipe.unfuse_qkv_projections()
    assert torch.equal(path.sample([0.5], SAMPLE, output="latent"), plain)

    from peft import LoraConfig

    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    for use in used(morpher, path):
        with pytest.raises(ModelError, match="has other LoRA adapters than before"):
            use()
    pipe.unload_lora_weights()
    assert torch.equal(path.sample([0.5], SAMPLE, output="latent"), plain)

    network = pipe.unet
    pipe.unet = tiny_pipeline(seed=1).unet
    for use in used(morpher, path):
        with pytest.raises(ModelError, match="another U-Net than before"):
            use()
    pipe.unet = network
    assert torch.equal(path.sample([0.5], SAMPLE, output="latent"), plain)


def test_compiled_networks_and_layerwise_casting_are_named() -> None:
    pipe = tiny_pipeline()
    network, pipe.unet = pipe.unet, torch.compile(pipe.unet)
    with pytest.raises(ModelError, match="compiled .*pipe.unet = pipe.unet._orig_mod"):
        Morpher(pipe)
    pipe.unet = network
    network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(ModelError, match="enable_layerwise_casting"):
        Morpher(pipe)
