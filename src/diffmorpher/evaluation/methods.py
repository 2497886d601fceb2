"""The methods that the benchmark compares: each a function over the same primitives, in one registry."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from ..config import FitConfig, SampleConfig, ScheduleConfig
from ..errors import ConfigError
from ..files.pictures import fit_image, load_image
from ..method.schedule import uniform_positions
from ..morpher import Morpher
from ..path import MorphPath, to_pixels
from ..progress import ProgressCallback
from .freemorph import GUIDANCE, freemorph
from .warp import dissolve, warp


@dataclass(frozen=True)
class Effort:
    """What a method may spend: DDIM steps, and how LoRAs are fitted. The protocol takes the paper's."""

    steps: int = SampleConfig.steps
    fit: FitConfig = field(default_factory=FitConfig)


@dataclass(frozen=True)
class Frames:
    """What a method gives back.

    pixels: (n, 3, H, W) float32 in [-1, 1], on the CPU, rounded to 8 bits as a film's are; alphas: their n positions.
    unet_rows: what the method needs for itself alone, fit and inversion included, also where another method of the
    pair had made them. seconds: {"prepare": fit and inversion, as long as they took now, "frames": the rest}.
    """

    pixels: Tensor
    alphas: list[float]
    unet_rows: int
    seconds: dict[str, float]


Run = Callable[..., Frames]


class Method(NamedTuple):
    """run(morpher, images, prompts, count, seed, effort, progress) -> Frames; see `run_method`."""

    summary: str
    run: Run
    of_the_model: bool = False  # made with settings of the model's catalog entry


def run_method(
    name: str,
    morpher: Morpher,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    count: int = 17,
    seed: int = 0,
    effort: Effort | None = None,
    progress: ProgressCallback | None = None,
) -> Frames:
    """A film of `count` frames between pictures, by the method of that name. Raises `ConfigError` for another name."""
    (known,) = resolve_methods(name)
    pictures = [fit_image(load_image(image), morpher.working_size()) for image in images]
    return METHODS[known].run(morpher, pictures, list(prompts), count, seed, effort or Effort(), progress)


def resolve_methods(text: str) -> list[str]:
    """The methods that a comma list of names and presets means, in order, each once. Raises `ConfigError`."""
    names: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if part not in METHODS and part not in PRESETS:
            near = difflib.get_close_matches(part, [*METHODS, *PRESETS], 1)
            guess = f"did you mean {near[0]!r}?" if near else f"there are {', '.join([*METHODS, *PRESETS])}."
            raise ConfigError(f"the method {part!r} is not known: {guess}")
        names += PRESETS.get(part, [part])
    return list(dict.fromkeys(names))


# ---- without a model


def _pixels_alone(blend: Callable[[Tensor, list[float]], Tensor]) -> Run:
    def run(morpher: Morpher, images: Sequence[Image.Image], prompts: Sequence[str], count: int, *_: Any) -> Frames:
        started = time.perf_counter()
        alphas = uniform_positions(count, len(images))
        pixels = _rounded(blend(to_pixels(images), alphas))
        return Frames(pixels, alphas, 0, {"prepare": 0.0, "frames": time.perf_counter() - started})

    return run


def _rounded(pixels: Tensor) -> Tensor:
    return ((pixels + 1) * 127.5).clamp(0, 255).round() / 127.5 - 1


# ---- with one


def _diffusion(
    lora: bool, even: bool, insert: bool = False, recommended: bool = False, quick: bool = False, **settings: Any
) -> Run:
    """A morph with or without LoRAs, rescheduled (in two passes or by insertion) or not, and the rest as `SampleConfig` says.

    recommended: with the fit and the steps that the model's catalog entry names in place of the protocol's; quick: with the
    attention that it names for films without LoRA.
    """

    def run(
        morpher: Morpher,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        count: int,
        seed: int,
        effort: Effort,
        progress: ProgressCallback | None,
    ) -> Frames:
        started = time.perf_counter()
        own = morpher.spec if recommended else None
        fit = own.fit if own else effort.fit
        sample = replace(own.sample if own else SampleConfig(steps=effort.steps), **settings)
        sample = replace(sample, attention_mode=morpher.spec.quick_attention) if quick else sample
        path = _prepared(morpher, images, prompts, fit if lora else None, seed, sample.steps, progress)
        prepared = time.perf_counter()
        schedule = ScheduleConfig(enabled=even, method="insert" if insert else "two-pass")
        result = morpher.film(path, count, sample, schedule, progress)
        rows = result.unet_rows + len(images) * (sample.steps + (3 * fit.steps * fit.draws if lora else 0))
        seconds = {"prepare": prepared - started, "frames": time.perf_counter() - prepared}
        return Frames(to_pixels(result.frames), result.alphas, rows, seconds)

    return run


def _freemorph(guidance: float) -> Run:
    def run(
        morpher: Morpher,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        count: int,
        seed: int,
        effort: Effort,
        progress: ProgressCallback | None,
    ) -> Frames:
        if len(images) != 2:
            raise ConfigError(f"freemorph is for two images, not {len(images)}.")
        started, backbone = time.perf_counter(), morpher.backbone
        before = backbone.unet_rows
        pixels, alphas = freemorph(backbone, images, prompts, count, seed, effort.steps, guidance, progress)
        seconds = {"prepare": 0.0, "frames": time.perf_counter() - started}
        return Frames(_rounded(pixels), alphas, backbone.unet_rows - before, seconds)

    return run


#: The path made last, and what it was made of: a pair's methods come one after the other, and most share it.
_last: list[tuple[Any, MorphPath]] = []


def _prepared(
    morpher: Morpher,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    fit: FitConfig | None,
    seed: int,
    steps: int,
    progress: ProgressCallback | None,
) -> MorphPath:
    key = (id(morpher.backbone), [image.tobytes() for image in images], list(prompts), fit, seed, steps)
    for known, path in _last:
        if known == key:
            return path
    path = morpher.prepare(images, list(prompts), fit=fit, seed=seed, steps=steps, progress=progress)
    path.cache = None  # what frames take is measured, however often they were made
    _last[:] = [*_last[-1:], (key, path)]  # two: one with LoRAs, one without
    return path


_PLAIN: dict[str, Any] = {"attention_lambda": 0.0, "adain": False}

METHODS: dict[str, Method] = {
    "dissolve": Method("pixels cross-faded", _pixels_alone(dissolve)),
    "warp": Method("pixels warped along the optical flow and blended", _pixels_alone(warp)),
    "preview": Method(
        "no LoRA, outer attention (kv on flows), no rescheduling", _diffusion(False, False, quick=True), True
    ),
    "freemorph": Method("FreeMorph, after its paper (arXiv 2507.01953)", _freemorph(GUIDANCE)),
    "freemorph-unguided": Method("FreeMorph without classifier-free guidance, as all others are", _freemorph(1.0)),
    "ddim": Method("inversion and slerp alone", _diffusion(False, False, **_PLAIN)),
    "lora": Method("+ LoRA interpolation", _diffusion(True, False, **_PLAIN)),
    "lora+attention": Method("+ attention interpolation", _diffusion(True, False, adain=False)),
    "lora+attention+adain": Method("+ AdaIN", _diffusion(True, False)),
    "diffmorpher": Method("all: + rescheduling", _diffusion(True, True)),
    "diffmorpher-kv": Method("all, attention mode kv", _diffusion(True, True, attention_mode="kv")),
    "diffmorpher-insert": Method("all, frames inserted instead of two passes", _diffusion(True, True, insert=True)),
    "diffmorpher-fast": Method(
        "as the catalog recommends", _diffusion(True, True, insert=True, recommended=True), True
    ),
    "diffmorpher-product": Method("all, LoRA blend product", _diffusion(True, True, lora_blend="product")),
    **{
        f"lambda-{x:g}": Method(f"all, attention in {x:.0%} of the steps", _diffusion(True, True, attention_lambda=x))
        for x in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    },
}

PRESETS: dict[str, list[str]] = {
    "ablation": ["ddim", "lora", "lora+attention", "lora+attention+adain", "diffmorpher"],
    "free": ["dissolve", "warp", "preview", "freemorph", "freemorph-unguided"],
    "modes": ["diffmorpher", "diffmorpher-kv", "diffmorpher-product"],
    "speed": ["diffmorpher", "diffmorpher-insert", "diffmorpher-fast"],
    "lambda": [name for name in METHODS if name.startswith("lambda-")],
    "all": [name for name in METHODS if not name.startswith("lambda-")],
}


def needs_model(name: str) -> bool:
    return name not in ("dissolve", "warp")


def clear_paths() -> None:
    """Forget the prepared paths, which hold a model."""
    _last.clear()


__all__ = [
    "METHODS",
    "PRESETS",
    "Effort",
    "Frames",
    "Method",
    "clear_paths",
    "needs_model",
    "resolve_methods",
    "run_method",
]
