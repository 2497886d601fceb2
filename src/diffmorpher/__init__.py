"""Smooth, natural morphs between pictures with a diffusion model (DiffMorpher, CVPR 2024, arXiv 2312.07409)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import FitConfig, SampleConfig, ScheduleConfig
    from .errors import Cancelled, DiffMorpherError, UserError
    from .files.cache import Cache
    from .files.films import read_settings
    from .files.loras import Lora, load_lora, save_lora
    from .morpher import Morpher
    from .path import MorphPath
    from .recipe import Recipe
    from .result import MorphResult

_WHERE = {
    "Cache": "files.cache",
    "FitConfig": "config",
    "SampleConfig": "config",
    "ScheduleConfig": "config",
    "Cancelled": "errors",
    "DiffMorpherError": "errors",
    "UserError": "errors",
    "read_settings": "files.films",
    "Lora": "files.loras",
    "load_lora": "files.loras",
    "save_lora": "files.loras",
    "Morpher": "morpher",
    "MorphResult": "result",
    "MorphPath": "path",
    "Recipe": "recipe",
}

__all__ = [
    "Cache",
    "Cancelled",
    "DiffMorpherError",
    "FitConfig",
    "Lora",
    "MorphPath",
    "MorphResult",
    "Morpher",
    "Recipe",
    "SampleConfig",
    "ScheduleConfig",
    "UserError",
    "load_lora",
    "read_settings",
    "save_lora",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: torch and diffusers take seconds, which `--help` and errors need not wait for."""
    if name in _WHERE:
        return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
