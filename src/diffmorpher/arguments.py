"""What a library call was given, looked at before the slow part: each mistake is a `ConfigError`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from operator import index
from pathlib import Path
from typing import Any

from PIL import Image

from .config import FitConfig, SampleConfig, ScheduleConfig, check_prompts, is_real
from .errors import ConfigError
from .files.cache import Cache
from .files.loras import Lora, load_lora
from .settings import LIMITS, parse_focus, parse_weighted

LoraSource = str | os.PathLike[str] | Lora
Styling = LoraSource | Sequence[LoraSource]


def check(sample: Any = None, schedule: Any = None, progress: Any = None, write: Any = None, loop: Any = False) -> None:
    """Raise `ConfigError` for settings of another type; None means that there is none."""
    for name, value, kind in (("sample", sample, SampleConfig), ("schedule", schedule, ScheduleConfig)):
        if value is not None and not isinstance(value, kind):
            raise ConfigError(f"{name} is {value!r}, but must be a {kind.__name__}, or None.")
    for name, value in (("progress", progress), ("write", write)):
        if value is not None and not callable(value):
            raise ConfigError(f"{name} is {value!r}, but must be a function, or None.")
    LIMITS[""]["loop"].check(loop)


def check_loading(vae: Any, cache: Any) -> None:
    """Raise `ConfigError` for an autoencoder that is no path, and for a cache that is none."""
    if vae is not None and (not isinstance(vae, (str, os.PathLike)) or not os.fspath(vae)):
        raise ConfigError(f"vae is {vae!r:.100}, but must be a folder or a file, or None.")
    if cache is not None and not isinstance(cache, Cache):
        raise ConfigError(f"cache is {cache!r:.100}, but must be a Cache, or None.")


def whole_seed(seed: Any) -> int:
    """The seed, numpy's whole numbers among them. Raises `ConfigError`."""
    number = index(seed) if hasattr(seed, "__index__") and not isinstance(seed, bool) else seed
    LIMITS[""]["seed"].check(number)
    return number


def lora_list(loras: Any, count: int | None, what: str = "LoRA") -> list[LoraSource]:
    """One for each of so many images, of one for all or one each; with None, as many as there are. Raises `ConfigError`."""
    files = [loras] if isinstance(loras, (str, os.PathLike, Lora)) or not hasattr(loras, "__len__") else list(loras)
    if bad := [file for file in files if not isinstance(file, (str, os.PathLike, Lora))]:
        raise ConfigError(f"a {what} is {bad[0]!r:.100}, but must be a file or a Lora.")
    if count is not None and len(files) not in (1, count):
        raise ConfigError(f"{len(files)} LoRA files were given for {count} images; give one for all, or one for each.")
    return files * (count if count is not None and len(files) == 1 else 1)


def read_loras(given: Any, text: bool = False) -> tuple[list[Lora], list[str]]:
    """LoRAs with their weights in them, and what each is called. Raises `ConfigError`, `LoraError`.

    given: files, "FILE:WEIGHT" among them, or `Lora`s. text: read the text encoders' layers too.
    """
    loras, names = [], []
    for k, each in enumerate(given):
        file, weight = parse_weighted(each) if isinstance(each, str) else (each, 1.0)
        lora = each if isinstance(each, Lora) else load_lora(file, text)
        loras.append(lora if weight == 1 else lora.scaled(weight))
        names.append(f"LoRA {k}" if isinstance(each, Lora) else str(each))
    return loras, names


def name_each(files: Any, what: str) -> list[str]:
    """Names as they go into a film: of files without their folders, of others what they are and their numbers."""
    return [Path(each).name if isinstance(each, (str, os.PathLike)) else f"{what} {k}" for k, each in enumerate(files)]


def style_list(styles: Any) -> list[LoraSource]:
    """Styles, of one or a list. Raises `ConfigError`."""
    return lora_list(styles, None, "style") if styles is not None else []


def check_images(images: Any, least: int = 2) -> None:
    """Raise `ConfigError` for what is no list of images, or has too few."""
    if isinstance(images, (str, os.PathLike, Image.Image)) or not hasattr(images, "__len__") or len(images) < least:
        wanted = (
            "a morph needs at least two images; give a list of two or more" if least > 1 else "give a list of images"
        )
        raise ConfigError(f"{wanted}.")


def fit_config(fit: Any, recommended: FitConfig) -> FitConfig:
    """How LoRAs are fitted. Raises `ConfigError`."""
    if isinstance(fit, FitConfig):
        return fit
    if fit != "recommended":
        raise ConfigError(f'fit is {fit!r}, but must be a FitConfig, "recommended", or None for no LoRA.')
    return recommended


def check_frames(num_frames: Any) -> None:
    """Raise `ConfigError` for what is no number of frames."""
    LIMITS[""]["frames"].check(num_frames)


def one_each(prompts: Any, count: int) -> list[str]:
    """A prompt for each of so many images, of one for all, one each, or none. Raises `ConfigError`."""
    texts = check_prompts([prompts] if prompts is None or isinstance(prompts, str) else prompts) or [""]
    if len(texts) not in (1, count):
        raise ConfigError(f"{len(texts)} prompts were given for {count} images; give one for all, one each, or none.")
    return texts * (count if len(texts) == 1 else 1)


def check_pace(pace: Any, gaps: int) -> None:
    """Raise `ConfigError` for what is no share of the way for each of so many gaps; None means that there is none."""
    if pace is None:
        return
    if not hasattr(pace, "__len__") or not all(is_real(share) and share >= 0 for share in pace) or not sum(pace) > 0:
        raise ConfigError(f"the pace is {pace!r:.100}, but must be a list of numbers of at least 0, not all of them 0.")
    if len(pace) != gaps:
        raise ConfigError(f"the pace has {len(pace)} shares for {gaps} gaps between frames; give one for each.")


def focus_points(focus: Any, count: int) -> list[tuple[float, float]]:
    """Where the focus of each of so many images is, of one for all, one each, or none. Raises `ConfigError`."""
    given = [focus or ""] if focus is None or isinstance(focus, str) else focus
    if not isinstance(given, (list, tuple)) or not all(isinstance(each, str) for each in given):
        raise ConfigError(f'the focus is {focus!r}, but must be "center", "auto" or "X,Y", or a list of such.')
    if len(given) not in (0, 1, count):
        raise ConfigError(f"{len(given)} focuses were given for {count} images; give one for all, one each, or none.")
    points = [parse_focus(each) for each in given or [""]]
    return points * (count if len(points) == 1 else 1)
