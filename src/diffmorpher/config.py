"""The settings of each stage as frozen dataclasses, with the paper's values as defaults.

Every default of the project lives here, once; the command line passes on only what the user typed.
Values are checked on construction and a bad one raises `ConfigError`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .errors import ConfigError

#: Frames of a film where nothing else is asked for.
NUM_FRAMES = 16


def _require(condition: bool, name: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {value!r}, but must be {allowed}.")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class FitConfig:
    """How one LoRA is fitted to each image (method, section 2).

    rank: rank r of every LoRA matrix pair.
    steps: optimiser steps. draws: noises and timesteps per image in each of them.
    learning_rate, weight_decay: of AdamW. decay: let the rate fall to zero over the steps, as half a cosine.
    """

    rank: int = 16
    steps: int = 200
    learning_rate: float = 2e-4
    weight_decay: float = 1e-2
    draws: int = 1
    decay: bool = False

    def __post_init__(self) -> None:
        _require(_is_int(self.rank) and 1 <= self.rank <= 1024, "LoRA rank", self.rank, "a whole number from 1 to 1024")
        _require(_is_int(self.steps) and self.steps >= 1, "LoRA steps", self.steps, "a whole number of at least 1")
        _require(
            _is_real(self.learning_rate) and self.learning_rate > 0, "LoRA rate", self.learning_rate, "a number above 0"
        )
        _require(
            _is_real(self.weight_decay) and self.weight_decay >= 0,
            "weight decay",
            self.weight_decay,
            "0 or a number above",
        )
        _require(_is_int(self.draws) and self.draws >= 1, "LoRA draws", self.draws, "a whole number of at least 1")

    def described(self) -> dict[str, Any]:
        """As a dict, without what the paper does not have unless it is used: digests of it stay as fields are added."""
        return {k: v for k, v in asdict(self).items() if k not in ("draws", "decay") or v != getattr(FitConfig, k)}

    def rate(self, step: int) -> float:
        """The learning rate of a step, the first being 0."""
        return self.learning_rate * (0.5 + 0.5 * math.cos(math.pi * step / self.steps) if self.decay else 1.0)


@dataclass(frozen=True)
class SampleConfig:
    """How frames are made from a prepared path (method, sections 3 and 5 to 7).

    steps: T, DDIM steps of the inversion and of the sampling.
    attention_lambda: share of the steps, from the first, in which self-attention is interpolated; 0 switches it off.
    attention_mode: "features" mixes the layer's inputs, "kv" its keys and values, each end's made with its own LoRA;
        "outer" mixes two attentions, each to the frame itself and one end: for morphs without LoRA.
    lora_blend: "factors" mixes A and B, "product" mixes B A x; "auto" takes factors where all LoRAs share a start.
    adain: give the mixed noise the interpolated channel statistics of the two ends.
    guidance_scale: classifier-free guidance; 1 is off, as in the paper.
    fix_lora: hold the LoRA mix at this value for every frame (0: first image's, 1: second's) instead of following alpha.
    batch_size: frames per U-Net batch, end images not counted; "auto" suits the device.
    exact_ends: lead the film through the images themselves: what inversion and sampling lose on them is given back step by
        step, to the frames between them in proportion. Not in the paper; with few steps it is what keeps the ends.
    """

    steps: int = 50
    attention_lambda: float = 0.6
    attention_mode: Literal["features", "kv", "outer"] = "features"
    lora_blend: Literal["auto", "factors", "product"] = "auto"
    adain: bool = True
    guidance_scale: float = 1.0
    fix_lora: float | None = None
    batch_size: int | Literal["auto"] = "auto"
    exact_ends: bool = False

    def __post_init__(self) -> None:
        _require(_is_int(self.steps) and 1 <= self.steps <= 1000, "steps", self.steps, "a whole number from 1 to 1000")
        _require(
            _is_real(self.attention_lambda) and 0 <= self.attention_lambda <= 1,
            "attention lambda",
            self.attention_lambda,
            "a number from 0 to 1",
        )
        modes = ("features", "kv", "outer")
        _require(self.attention_mode in modes, "attention mode", self.attention_mode, '"features", "kv" or "outer"')
        _require(
            self.lora_blend in ("auto", "factors", "product"),
            "LoRA blend",
            self.lora_blend,
            '"auto", "factors" or "product"',
        )
        _require(
            _is_real(self.guidance_scale) and self.guidance_scale >= 1,
            "guidance",
            self.guidance_scale,
            "a number of at least 1 (1 is off)",
        )
        _require(
            self.fix_lora is None or (_is_real(self.fix_lora) and self.fix_lora >= 0),
            "fixed LoRA mix",
            self.fix_lora,
            "a position from 0 (the first image's LoRA) to the last image's",
        )
        _require(
            self.batch_size == "auto" or (_is_int(self.batch_size) and self.batch_size >= 1),
            "batch size",
            self.batch_size,
            '"auto" or a whole number of at least 1',
        )

    def check_images(self, num_images: int) -> None:
        """Raise `ConfigError` where a setting does not fit a morph of that many images."""
        _require(
            self.fix_lora is None or self.fix_lora <= num_images - 1,
            "fixed LoRA mix",
            self.fix_lora,
            f"a position from 0 to {num_images - 1}, the last image's",
        )


@dataclass(frozen=True)
class ScheduleConfig:
    """How frames are spaced (method, section 8): evenly by perceptual distance, or (`enabled=False`) evenly in alpha.

    method: "insert" adds frames in rounds, each where the gaps are widest, and samples every frame once; "two-pass" is the
        paper's: all frames evenly in alpha first, then all of them again.
    rounds: of the insertion. spare: frames made beyond those asked for, so that those that fit worst can be left out (fewer in
        films of less than 7 times as many). most: gaps settled so; the rest of a longer film is spread over these.
    """

    enabled: bool = True
    method: Literal["insert", "two-pass"] = "insert"
    rounds: int = 2
    spare: int = 2
    most: int = 60

    def __post_init__(self) -> None:
        _require(self.method in ("insert", "two-pass"), "schedule", self.method, '"insert" or "two-pass"')
        _require(_is_int(self.rounds) and self.rounds >= 1, "rounds", self.rounds, "a whole number of at least 1")
        _require(_is_int(self.spare) and self.spare >= 0, "spare", self.spare, "a whole number of at least 0")
        _require(_is_int(self.most) and self.most >= 1, "most", self.most, "a whole number of at least 1")
