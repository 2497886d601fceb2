"""Path files (`.morph`): what a prepared way between images is made of, tensors and a JSON header in one safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import OutputError, PathFileError
from .atomic import replacing

VERSION = "3"
_KEY = "diffmorpher.path"


def write_path(file: str | os.PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write both, whole or not at all. Raises `OutputError`; an older file is then left as it was."""
    out = Path(file)
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    metadata = {"format": "pt", _KEY: json.dumps({"version": VERSION, **header})}
    try:
        with replacing(out) as part:
            save_file(contiguous, part, metadata)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"the path file {out} cannot be written: {error}.") from error
    return out


def read_path(file: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(header, tensors on the CPU). Raises `PathFileError` for what is no path file of this version."""
    source = Path(file)
    try:
        with safe_open(source, "pt") as opened:
            header: dict[str, Any] = json.loads((opened.metadata() or {})[_KEY])
            # Copied out of the mapped file: kernels round differently on memory that is not aligned.
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        version = header["version"]
    except FileNotFoundError as error:
        raise PathFileError(f"the path file {source} does not exist.") from error
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise not_a_path(source) from error
    if version == "2" and "conditioning" in tensors:  # text was all that a network could be told
        tensors["conditioning.text"] = tensors.pop("conditioning")
    elif version != VERSION:
        raise PathFileError(
            f"{source} was written by another version of diffmorpher (format {version}); make it again."
        )
    return header, tensors


def not_a_path(source: Path) -> PathFileError:
    return PathFileError(f"{source} is not a morph path, or is damaged; make it again with --save-path.")
