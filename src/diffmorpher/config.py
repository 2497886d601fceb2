"""The settings of each stage as frozen dataclasses, with the paper's values as defaults.

Every default and every limit of the project lives here or in `settings.py`, once; the command line and the page pass on only
what the user typed. Values are checked on construction and a bad one raises `ConfigError`.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from .errors import ConfigError

#: Frames of a film, and frames per second, where nothing else is asked for.
NUM_FRAMES, FPS = 16, 8.0
#: A day: of a film, or of a stretch of it.
MAX_SECONDS = 86_400


@dataclass(frozen=True)
class Limits:
    """What a setting may be: a whole number (`int`), a number (`float`), `bool`, or one of the words in `choices`.

    label: what people call it. low, high: both allowed, unless `above` says that low itself is not. words: allowed beside
    numbers. optional: None is allowed. allowed: how an error says all this, where that is not made from the rest. many: a tuple
    of such, which may be empty.
    """

    label: str
    kind: type = float
    low: float | None = None
    high: float | None = None
    above: bool = False
    choices: tuple[str, ...] = ()
    optional: bool = False
    allowed: str = ""
    many: bool = False

    def check(self, value: Any) -> None:
        """Raises `ConfigError`, naming the setting and what it may be."""
        if self.many and isinstance(value, (tuple, list)):
            for each in value:
                replace(self, many=False).check(each)
            return
        if (self.optional and value is None) or (isinstance(value, str) and value in self.choices):
            return
        good = {bool: _is_bool, int: _is_int, float: is_real}.get(self.kind, _never)(value)
        if self.many or not (good and (self.kind is bool or self._within(value))):
            raise ConfigError(f"{self.label} is {shown(value)}, but must be {self.allowed or self._described()}.")

    def _within(self, value: float) -> bool:
        low = self.low is None or (value > self.low if self.above else value >= self.low)
        return low and (self.high is None or value <= self.high)

    def _described(self) -> str:
        if self.choices:
            return join_or([f'"{choice}"' for choice in self.choices])
        if self.kind is bool:
            return "true or false"
        number = "a whole number" if self.kind is int else "a number"
        if self.high is not None and not self.above:
            return f"{number} from {self.low:g} to {self.high:g}"
        if self.high is not None:
            return f"{number} above {self.low:g} and at most {self.high:g}"
        return f"{number} {'above' if self.above else 'of at least'} {self.low:g}"


def shown(value: Any) -> str:
    """A value in an error: its `repr`, also where Python refuses to write so many digits."""
    try:
        return f"{value!r:.200}"
    except ValueError:
        return "a number of thousands of digits"
    except RecursionError:
        return "a table within a table without end"


def join_or(words: list[str]) -> str:
    """ "a, b or c"."""
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def setting(default: Any, label: str, kind: type = float, **limits: Any) -> Any:
    """A dataclass field with its `Limits`."""
    return field(default=default, metadata={"limits": Limits(label, kind, **limits)})


def limits_of(config: type) -> dict[str, Limits]:
    """The limits of a config's fields by name."""
    return {f.name: f.metadata["limits"] for f in fields(config) if "limits" in f.metadata}


def check_limits(config: Any) -> None:
    """Raise `ConfigError` for the first value that is out of its limits."""
    for name, limits in limits_of(type(config)).items():
        limits.check(getattr(config, name))


def numbers(value: Any) -> Any:
    """One number, or a list of them, as a tuple of floats; anything else as it is, for the limits to refuse."""
    given = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(map(float, given)) if all(map(is_real, given)) else value


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Whether it is a finite number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _never(value: Any) -> bool:
    return False


@dataclass(frozen=True)
class FitConfig:
    """How one LoRA is fitted to each image (method, section 2).

    rank: rank r of every LoRA matrix pair.
    steps: optimiser steps. draws: noises and timesteps per image in each of them.
    learning_rate, weight_decay: of AdamW. decay: let the rate fall to zero over the steps, as half a cosine.
    """

    rank: int = setting(16, "LoRA rank", int, low=1, high=1024)
    steps: int = setting(200, "LoRA steps", int, low=1, high=100_000)
    learning_rate: float = setting(2e-4, "LoRA rate", low=0, above=True)
    weight_decay: float = setting(1e-2, "weight decay", low=0, allowed="0 or a number above")
    draws: int = setting(1, "LoRA draws", int, low=1, high=1024)
    decay: bool = setting(False, "LoRA decay", bool)

    def __post_init__(self) -> None:
        check_limits(self)

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

    steps: int = setting(50, "steps", int, low=1, high=1000)
    attention_lambda: float = setting(0.6, "attention lambda", low=0, high=1)
    attention_mode: Literal["features", "kv", "outer"] = setting(
        "features", "attention mode", str, choices=("features", "kv", "outer")
    )
    lora_blend: Literal["auto", "factors", "product"] = setting(
        "auto", "LoRA blend", str, choices=("auto", "factors", "product")
    )
    adain: bool = setting(True, "AdaIN", bool)
    guidance_scale: float = setting(1.0, "guidance", low=1, high=100, allowed="a number from 1, which is off, to 100")
    fix_lora: float | None = setting(
        *(None, "fixed LoRA mix"),
        low=0,
        optional=True,
        allowed="a position from 0 (the first image's LoRA) to the last image's",
    )
    batch_size: int | Literal["auto"] = setting(
        "auto", "batch size", int, low=1, choices=("auto",), allowed='"auto" or a whole number of at least 1'
    )
    exact_ends: bool = setting(False, "exact ends", bool)

    def __post_init__(self) -> None:
        check_limits(self)

    def check_images(self, num_images: int) -> None:
        """Raise `ConfigError` where a setting does not fit a morph of that many images."""
        last = num_images - 1
        allowed = f"a position from 0 to {last}, the last image's"
        Limits("fixed LoRA mix", low=0, high=last, optional=True, allowed=allowed).check(self.fix_lora)


#: The ways to space frames, each a function in `method/schedule.py`.
ScheduleMethod = Literal["insert", "two-pass"]
_METHODS = get_args(ScheduleMethod)

#: How the speed on the way from one picture to the next changes: a curve in `method/schedule.py`.
Ease = Literal["linear", "in", "out", "in-out"]


@dataclass(frozen=True)
class ScheduleConfig:
    """How frames are spaced (method, section 8): evenly by perceptual distance, or (`enabled=False`) evenly in alpha.

    method: "insert" adds frames in rounds, each where the gaps are widest, and samples every frame once; "two-pass" is the
        paper's: all frames evenly in alpha first, then all of them again.
    rounds: of the insertion. spare: frames made beyond those asked for, so that those that fit worst can be left out (fewer in
        films of less than 7 times as many). most: gaps settled so; the rest of a longer film is spread over these.
    ease: "in" leaves each picture slowly, "out" comes slowly to the next, "in-out" both; a bend of the even speed.
    stretch: how long the ways from picture to picture take in proportion to each other; () lets the pictures decide.
    """

    enabled: bool = setting(True, "rescheduling", bool)
    method: ScheduleMethod = setting("insert", "schedule", str, choices=_METHODS)
    rounds: int = setting(2, "rounds", int, low=1, high=100)
    spare: int = setting(2, "spare", int, low=0, high=1000)
    most: int = setting(60, "most", int, low=1, high=10_000)
    ease: Ease = setting("linear", "ease", str, choices=get_args(Ease))
    stretch: tuple[float, ...] = setting((), "stretch", low=0, high=MAX_SECONDS, above=True, many=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stretch", numbers(self.stretch))
        check_limits(self)

    def check_images(self, num_images: int, loop: bool = False) -> None:
        """Raise `ConfigError` where there is not one stretch for each way between neighbouring images."""
        ways = num_images if loop else num_images - 1
        if len(self.stretch) not in (0, ways):
            where = " in a loop" if loop else ""
            raise ConfigError(
                f"{len(self.stretch)} stretches were given for {num_images} pictures{where}: give {ways}."
            )


def check_prompts(prompts: Any) -> list[str]:
    """The prompts, None as no text. Raises `ConfigError` for what is no list of texts, or holds bytes that are no UTF-8."""
    if not isinstance(prompts, (list, tuple)) or not all(
        prompt is None or isinstance(prompt, str) for prompt in prompts
    ):
        raise ConfigError(f"the prompts are {prompts!r}, but must be a text, or a list of texts.")
    for prompt in prompts:
        try:
            (prompt or "").encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"the prompt {prompt!r} is not UTF-8: type it again in a terminal that is.") from error
    return [prompt or "" for prompt in prompts]


def stretches_and_gaps(num_frames: int, num_images: int, loop: bool = False) -> tuple[int, int]:
    """How many ways between neighbouring images a film has, and how many gaps between its frames.

    In a loop the last way leads back to image 0, whose frame is not repeated. Raises `ConfigError` where the frames are too
    few to show every image.
    """
    stretches = num_images if loop else num_images - 1
    gaps = num_frames if loop else num_frames - 1
    if gaps < stretches:
        needed = stretches if loop else stretches + 1
        where = " in a loop" if loop else ""
        raise ConfigError(f"{num_frames} frames are too few for {num_images} images{where}; ask for at least {needed}.")
    return stretches, gaps
