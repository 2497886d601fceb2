"""Whoever lends a pipeline has it back as it was, wherever in the work something is raised."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import (
    tiny_flux2_pipeline,
    tiny_flux_pipeline,
    tiny_pipeline,
    tiny_qwen_pipeline,
    tiny_sd3_pipeline,
    tiny_xl_pipeline,
    tiny_z_image_pipeline,
)
from diffmorpher import Cancelled, FitConfig, Morpher, SampleConfig
from diffmorpher.files.cache import Cache, digest

PICTURES = [Image.effect_noise((32, 32), s).convert("RGB") for s in (20, 60)]
FIT, SAMPLE = FitConfig(rank=2, steps=2), SampleConfig(steps=2)


class Broken(Exception):
    """Nothing that anybody expects."""


class At(TorchDispatchMode):
    """Raises in place of torch's n-th operation, be it on the way back through the network; counts them."""

    def __init__(self, n: int = -1, error: type[BaseException] = Broken) -> None:
        super().__init__()
        self.count, self._n, self._error = 0, n, error

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self._n:
            raise self._error
        return function(*args, **(kwargs or {}))


def state_of(pipe: Any) -> dict[str, Any]:
    """All of a pipeline, and of the process, that a morph could leave changed."""
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    networks = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    modules = [(f"{name}.{path}", m) for name, network in networks.items() for path, m in network.named_modules()]
    tensors = [
        (f"{name}.{path}", t)
        for name, network in networks.items()
        for path, t in [*network.named_parameters(), *network.named_buffers()]
    ]
    return {
        "pipeline": {name: id(value) for name, value in vars(pipe).items() if not name.startswith("_")},
        "weights": {name: (id(t), digest(t.data), t.requires_grad, t.grad is None, str(t.device)) for name, t in tensors},
        "modules": {
            name: (id(m), type(m), m.training, sorted(vars(m)), len(hooks_of(m)), list(m._modules), id(m.forward.__func__))
            for name, m in modules
        },
        "processors": {name: id(m.processor) for name, m in modules if hasattr(m, "processor")},
        "switches": {
            name: {n: v for n, v in vars(m).items() if isinstance(v, (bool, int, float, str)) or v is None}
            for name, m in modules
        },
        "configs": {name: dict(part.config) for name, part in parts.items() if hasattr(type(part), "load_config")},
        "scheduler": {name: repr(value) for name, value in vars(pipe.scheduler).items()},
        "tokenizers": {name: (len(t), t.model_max_length, t.padding_side) for name, t in parts.items() if "tokenizer" in name},
        "torch": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_default_dtype(),
            str(torch.get_default_device()),
            torch.get_num_threads(),
            torch.is_autocast_enabled("cpu"),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.allow_tf32,
            torch.backends.cudnn.benchmark,
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.mkldnn.enabled,
        ),
        "random": (torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())),
        "warnings": len(warnings.filters),
    }  # fmt: skip


def hooks_of(module: torch.nn.Module) -> list[Any]:
    kinds = [value for name, value in vars(module).items() if name.endswith("_hooks")]
    return [hook for kind in kinds for hook in kind.values()]


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [name for name in before if before[name] != after[name]]


def film(morpher: Morpher, progress: Any = None, sample: SampleConfig = SAMPLE, **more: Any) -> list[bytes]:
    prompts = ["a cat", "an apple"]
    result = morpher(PICTURES, prompts, 4, size=(32, 32), fit=FIT, sample=sample, progress=progress, **more)
    return [frame.tobytes() for frame in result.frames]


def raised_at_every_part(pipe: Any, parts: int, sample: SampleConfig = SAMPLE, **settings: Any) -> None:
    """Once in each of so many equal parts of the operations that a film takes; what is there afterwards makes the same film."""
    draw, morpher = random.Random(0), Morpher(pipe, **settings)
    plain = film(morpher, sample=sample)  # the first also makes what the libraries make once
    before = state_of(pipe)
    with At() as all_of_them:
        assert film(morpher, sample=sample) == plain
    assert differences(before, state_of(pipe)) == []
    for part in range(parts):
        n = 1 + int((part + draw.random()) * all_of_them.count / parts)
        error = (Broken, Cancelled, KeyboardInterrupt)[part % 3]
        with pytest.raises((error, ValueError)) as caught, At(n, error):
            film(morpher, sample=sample)
        # A tokenizer says ValueError to whatever was raised while it made a tensor.
        assert isinstance(caught.value, error) or isinstance(caught.value.__cause__, error)
        assert differences(before, state_of(pipe)) == [], f"operation {n} of {all_of_them.count}"
    assert film(morpher, sample=sample) == plain


KINDS: list[Callable[[], Any]] = [
    tiny_pipeline, tiny_xl_pipeline, tiny_flux_pipeline, tiny_sd3_pipeline, tiny_flux2_pipeline, tiny_qwen_pipeline,
    tiny_z_image_pipeline,
]  # fmt: skip


def test_raised_at_some_operations() -> None:
    raised_at_every_part(tiny_pipeline(), 5)


@pytest.mark.slow
@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("low_memory", [False, True])
def test_raised_at_many_operations(make: Callable[[], Any], low_memory: bool) -> None:
    raised_at_every_part(make(), 40, low_memory=low_memory)


@pytest.mark.slow
def test_raised_under_processors_and_with_guidance() -> None:
    """A network that its owner trains, with processors of his own, which "outer" puts others in place of."""
    pipe = tiny_pipeline()
    pipe.unet.set_attn_processor(AttnProcessor())
    pipe.unet.train()
    pipe.vae.requires_grad_(False)
    raised_at_every_part(pipe, 60, SampleConfig(steps=2, attention_mode="outer", guidance_scale=2.0))


def test_raised_by_whoever_is_told_of_progress(tmp_path: Path) -> None:
    """At the first word of each stage, with a cache beside it, in which a later film finds nothing that is not right."""
    pipe = tiny_pipeline()
    plain, before = film(Morpher(pipe)), state_of(pipe)
    morpher = Morpher(pipe, cache=Cache(tmp_path, 10**9, save_every=0))
    for stage, error in (("fit", Broken), ("invert", Cancelled), ("sample", KeyboardInterrupt)):

        def progress(now: str, done: int, total: int, stage: str = stage, error: type[BaseException] = error) -> None:
            if now == stage:
                raise error

        with pytest.raises(error):
            film(morpher, progress)
        assert differences(before, state_of(pipe)) == [], stage
    assert film(morpher) == plain


def test_raised_by_whoever_takes_the_frames() -> None:
    pipe = tiny_pipeline()
    morpher, before = Morpher(pipe), state_of(pipe)

    def write(frames: Any, settings: Any) -> None:
        next(iter(frames))
        raise Broken

    with pytest.raises(Broken):
        film(morpher, write=write)
    assert differences(before, state_of(pipe)) == []


def test_a_change_would_be_seen() -> None:
    """Of each of these: what this file asks is not always true."""
    changes: list[Callable[[Any], Any]] = [
        lambda pipe: pipe.unet.train(),
        lambda pipe: pipe.vae.requires_grad_(False),
        lambda pipe: pipe.unet.conv_in.weight.data.add_(1e-3),
        lambda pipe: pipe.unet.mid_block.register_forward_hook(lambda *_: None),
        lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
        lambda pipe: pipe.unet.enable_gradient_checkpointing(),
        lambda pipe: pipe.scheduler.set_timesteps(7),
        lambda pipe: pipe.unet.conv_in.weight.register_hook(lambda g: g) and pipe.unet.conv_in.weight.sum().backward(),
        lambda pipe: setattr(pipe.vae, "use_tiling", True),
        lambda pipe: setattr(pipe, "unet", pipe.vae),
        lambda pipe: pipe.tokenizer.add_tokens("<new>"),
        lambda pipe: torch.rand(1),
    ]
    pipe = tiny_pipeline()
    before = state_of(pipe)
    for i, change in enumerate(changes):
        assert differences(before, before := state_of(pipe)) == []
        change(pipe)
        assert differences(before, before := state_of(pipe)), i
