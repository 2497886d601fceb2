"""Path files (`.morph`): what a prepared way between images is made of, tensors and a JSON header in one safetensors file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import is_real
from ..errors import OutputError, PathFileError
from .atomic import cannot_write, replacing
from .films import FORMATS
from .pictures import SUFFIXES

VERSION = "3"
_KEY = "diffmorpher.path"
_PARTS = re.compile(
    r"latents|opacity|conditioning\.\w+|trajectory\.[1-9][0-9]{0,3}|lora\.(down|up)\..+|style\.(down|up)\.(network|text_encoder(_[23])?)\..+"
)


def check_path_name(file: Any) -> None:
    """Raise `OutputError` for what is no path, or bears a picture's or a film's name, which it may replace."""
    if not isinstance(file, (str, os.PathLike)) or "\0" in os.fspath(file):
        raise OutputError(f"the path file is {file!r:.100}, but must be a path.")
    if Path(file).suffix.lower() in {*FORMATS, *SUFFIXES}:
        raise OutputError(f"the path file {str(file)!r} is called as a picture or a film is: call it .morph.")


def write_path(file: str | os.PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write both, whole or not at all. Raises `OutputError`; an older file is then left as it was."""
    out = Path(file)
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    metadata = {"format": "pt", _KEY: json.dumps({"version": VERSION, **header})}
    try:
        with replacing(out) as part:
            save_file(contiguous, part, metadata)
    except (OSError, SafetensorError) as error:
        raise cannot_write(f"the path file {out}", error) from error
    return out


def read_path(file: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(header, tensors on the CPU). Raises `PathFileError` for what is no path file of this version."""
    if not isinstance(file, (str, os.PathLike)):
        raise PathFileError(f"a path file is {file!r:.100}, but must be a path.")
    source = Path(file)
    try:
        with safe_open(source, "pt") as opened:
            header: dict[str, Any] = json.loads((opened.metadata() or {})[_KEY], parse_constant=_no_number)
            # Copied out of the mapped file: kernels round differently on memory that is not aligned.
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        version = header["version"]
    except FileNotFoundError as error:
        raise PathFileError(f"the path file {source} does not exist.") from error
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise not_a_path(source) from error
    if version == "2" and "conditioning" in tensors:  # text was all that a network could be told
        tensors["conditioning.text"] = tensors.pop("conditioning")
    elif version != VERSION:
        raise PathFileError(
            f"{source} was written by another version of diffmorpher (format {version}); make it again."
        )
    try:
        _check(header, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise not_a_path(source) from error
    return header, tensors


def _check(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` (or `KeyError`, `TypeError`) for what `write_path` does not write; the model is not asked here."""
    latents, prompts, loras = tensors["latents"], header["prompts"], header["loras"]
    images = len(latents)
    _demand(all(_PARTS.fullmatch(name) for name in tensors))
    _demand(all(t.dtype == torch.float32 and bool(t.isfinite().all()) for t in tensors.values()))
    _demand(latents.ndim == 4 and images >= 2 and latents.numel() > 0)
    _demand(
        isinstance(header["model"], str) and isinstance(header["loop"], bool) and isinstance(header["settings"], dict)
    )
    _demand(isinstance(prompts, list) and len(prompts) == images and all(isinstance(text, str) for text in prompts))
    _demand((loras is None) == (not any(name.startswith("lora.") for name in tensors)))
    if loras is not None:
        _demand(isinstance(loras, list) and len(loras) == images)
        _demand(all(isinstance(lora, dict) and all(isinstance(x, str) for x in lora.values()) for lora in loras))
    for numbers in (header["signature"]["sizes"], header["signature"]["weights"]):
        _demand(isinstance(numbers, list) and all(is_real(number) for number in numbers))
    for name, tensor in tensors.items():
        rows = 1 if name.startswith("style.") else images
        _demand(tensor.shape[1:] == latents.shape if name.startswith("trajectory.") else tensor.shape[:1] == (rows,))
        if name.startswith(("lora.", "style.")):
            _demand(tensor.ndim == 3 or (tensor.ndim == 5 and ".down." in name))
    if "opacity" in tensors:
        _demand(tensors["opacity"].ndim == 3 and bool(((tensors["opacity"] >= 0) & (tensors["opacity"] <= 255)).all()))
    for kind in ("lora", "style"):
        down, up = ({n.removeprefix(p) for n in tensors if n.startswith(p)} for p in (f"{kind}.down.", f"{kind}.up."))
        _demand(down == up)
        for name in down:
            _demand(tensors[f"{kind}.down.{name}"].shape[1] == tensors[f"{kind}.up.{name}"].shape[2])


def _demand(holds: bool) -> None:
    if not holds:
        raise ValueError


def _no_number(text: str) -> None:
    raise ValueError(text)  # NaN and infinity, which are no JSON


def not_a_path(source: Path) -> PathFileError:
    return PathFileError(f"{source} is not a morph path, or is damaged; make it again with --save-path.")
