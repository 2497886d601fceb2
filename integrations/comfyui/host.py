"""What the nodes need of ComfyUI: its pictures, its progress bar and stop button, its folders."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from PIL import Image

from diffmorpher.settings import split_weight


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """An IMAGE batch, float [B, H, W, C] in 0 to 1, as pictures of 8 bits; C is 1, 3 or 4."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8).numpy()
    return [Image.fromarray(each[..., 0] if each.shape[-1] == 1 else each) for each in pixels]


def to_images(frames: list[Image.Image]) -> torch.Tensor:
    """Pictures of one size as an IMAGE batch, float32 [B, H, W, 3] in 0 to 1."""
    return torch.from_numpy(np.stack([np.asarray(frame.convert("RGB"), np.float32) for frame in frames]) / 255)


def progress() -> Callable[[str, int, int], None]:
    """A progress callback that moves ComfyUI's bar, from its start in each stage, and stops when its user says so."""
    bar = comfy.utils.ProgressBar(1)

    def report(stage: str, done: int, total: int) -> None:
        bar.update_absolute(done, total)
        comfy.model_management.throw_exception_if_processing_interrupted()

    return report


def learning(execute: Callable[..., Any]) -> Callable[..., Any]:
    """Run a node outside of inference mode, in which ComfyUI runs all: a fit needs gradients, and weights that allow them."""

    @functools.wraps(execute)
    def run(*args: Any, **inputs: Any) -> Any:
        with torch.inference_mode(False):
            return execute(*args, **inputs)

    return run


def lora_file(text: str) -> str:
    """The place of a LoRA file, with its weight: one of ComfyUI's own by its name there, any other by its path."""
    name, weight = split_weight(text)
    return f"{folder_paths.get_full_path('loras', name) or name}{weight}"


def new_path_file(prefix: str) -> Path:
    """The next free name in ComfyUI's output folder, numbered as ComfyUI numbers pictures."""
    folder, name, counter, *_ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    return Path(folder) / f"{name}_{counter:05}_.morph"


def path_files() -> dict[str, Path]:
    """Saved paths in ComfyUI's output and input folders, by the names under which a node offers them."""
    places = {"output": folder_paths.get_output_directory(), "input": folder_paths.get_input_directory()}
    return {
        f"{name}/{file.relative_to(place).as_posix()}": file
        for name, place in places.items()
        for file in sorted(Path(place).rglob("*.morph"))
    }
