"""The page's settings: their limits, what the library makes of them, and the command line that makes the same film.

The names are those of the command line's options and of the configs; the defaults are read from the library.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from inspect import signature
from pathlib import PurePath
from typing import Any

from ..cli.checks import check_fps, check_seed, parse_size
from ..config import NUM_FRAMES, FitConfig, SampleConfig, ScheduleConfig
from ..errors import ConfigError
from ..files.films import save_film

#: What one visitor may ask of a machine that others wait for. The command line has no such limits.
MAX_PICTURES, MAX_FRAMES, MAX_STEPS, MAX_LORA_STEPS, MAX_LORA_RANK, MAX_SIDE = 8, 240, 200, 2000, 128, 1024
MAX_PROMPT = 500  # characters

_SAMPLE, _SCHEDULE = SampleConfig(), ScheduleConfig()


@dataclass(frozen=True)
class Settings:
    """One film's settings. None, or an empty size: what suits the model."""

    model: str = "mini"
    frames: int = NUM_FRAMES
    fps: float = signature(save_film).parameters["fps"].default
    loop: bool = False
    ping_pong: bool = False
    size: str = ""
    resize: str = "crop"
    seed: int = 0
    no_lora: bool = False
    lora_steps: int | None = None
    lora_rank: int | None = None
    lora_lr: float | None = None
    fix_lora: float | None = None
    steps: int | None = None
    attention_lambda: float = _SAMPLE.attention_lambda
    adain: bool = _SAMPLE.adain
    reschedule: bool = _SCHEDULE.enabled
    guidance: float = _SAMPLE.guidance_scale

    @classmethod
    def checked(cls, **values: Any) -> Settings:
        """From what a page or a client sent: numbers may come as text or as 4.0. Raises `ConfigError`."""
        clean: dict[str, Any] = {}
        for field in fields(cls):
            value = values.get(field.name, field.default)
            kind = str(field.type).split()[0]
            if value is None or (value == "" and kind in ("int", "float")):
                clean[field.name] = None if "None" in str(field.type) else field.default
            else:
                clean[field.name] = _READ[kind](field.name.replace("_", " "), value)
        settings = cls(**clean)
        settings._check()
        return settings

    def _check(self) -> None:
        for name, most in (("frames", MAX_FRAMES), ("steps", MAX_STEPS)):
            _at_most(name, getattr(self, name), most)
        _at_most("LoRA steps", self.lora_steps, MAX_LORA_STEPS)
        _at_most("LoRA rank", self.lora_rank, MAX_LORA_RANK)
        _at_most("side of the size", max(self.pixels or (0,)), MAX_SIDE)
        if self.frames < 2:
            raise ConfigError(f"frames is {self.frames}, but must be at least 2.")
        if self.resize not in ("crop", "pad"):
            raise ConfigError(f"resize is {self.resize!r}, but must be 'crop' or 'pad'.")
        check_fps(self.fps)
        check_seed(self.seed)
        self.sample_config(SampleConfig())
        self.fit_config(FitConfig())

    @property
    def pixels(self) -> tuple[int, int] | None:
        """(width, height), or None for what suits the model."""
        return parse_size(self.size.strip().lower().replace("×", "x") or None)

    def sample_config(self, recommended: SampleConfig) -> SampleConfig:
        """How the frames are made: the model's own way with what was given. Raises `ConfigError`."""
        return replace(
            recommended,
            steps=self.steps or recommended.steps,
            attention_lambda=self.attention_lambda,
            adain=self.adain,
            guidance_scale=self.guidance,
            fix_lora=self.fix_lora,
        )

    def schedule_config(self) -> ScheduleConfig:
        return ScheduleConfig(enabled=self.reschedule)

    def fit_config(self, recommended: FitConfig) -> FitConfig | None:
        """The model's own fit with what was given; None for no LoRA at all. Raises `ConfigError`."""
        given: dict[str, Any] = {"steps": self.lora_steps, "rank": self.lora_rank, "learning_rate": self.lora_lr}
        fit = replace(recommended, **{name: value for name, value in given.items() if value is not None})
        return None if self.no_lora else fit

    def command(self, names: Sequence[str], prompts: Sequence[str], loras: Sequence[str] = ()) -> str:
        """The `diffmorpher morph` line for the same film; names: the picture files, loras: LoRA files, if any."""
        parts = ["diffmorpher", "morph", *map(_as_path, names)]
        for prompt in prompts[:1] if len(set(prompts)) == 1 else prompts:
            parts += ["-p", prompt] if any(prompts) else []
        for lora in loras:
            parts += ["--lora", _as_path(lora)]
        parts += ["-o", _as_path(film_name(names) + ".mp4")]
        skip = {"lora_steps", "lora_rank", "lora_lr"} if self.no_lora or loras else set()
        for field in fields(self):
            value, option = getattr(self, field.name), "--" + field.name.replace("_", "-")
            if value == field.default or field.name in skip:
                continue
            if field.name in ("adain", "reschedule"):
                parts.append("--no-" + field.name)
            elif value is True:
                parts.append(option)
            elif field.name == "size":
                parts += [option, "{}x{}".format(*(self.pixels or (0, 0)))]
            else:
                whole = isinstance(value, float) and value == int(value)
                parts += [option, str(int(value) if whole else value)]
        return shlex.join(parts)


def film_name(names: Sequence[str]) -> str:
    """What to call the film of these pictures: "cat-dog" for cat.png and dog.jpg."""
    stems = [PurePath(name).stem for name in names]
    return "-".join(stems[:3])[:60] or "morph"


def different_names(names: Sequence[str]) -> list[str]:
    """The same names, but the second photo.png becomes photo-2.png, so that a command can tell them apart."""
    unique: list[str] = []
    for name in names:
        path, n, new = PurePath(name), 1, name
        while new in unique:
            n += 1
            new = f"{path.stem}-{n}{path.suffix}"
        unique.append(new)
    return unique


def _as_path(name: str) -> str:
    return f"./{name}" if name.startswith("-") else name


def _at_most(name: str, value: float | None, most: int) -> None:
    if value is not None and value > most:
        raise ConfigError(f"{name} is {value:g}, but can be at most {most} on this page; the command line takes more.")


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ConfigError(f"{name} is {value!r}, but must be a number.")
    return number


def _whole(name: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = _number(name, value)
    if number != int(number):
        raise ConfigError(f"{name} is {value!r}, but must be a whole number.")
    return int(number)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}, but must be true or false.")
    return value


def _text(name: str, value: Any) -> str:
    return str(value).strip()[:400]


_READ = {"int": _whole, "float": _number, "bool": _flag, "str": _text}
