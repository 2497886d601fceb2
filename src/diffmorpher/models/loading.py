"""How any model is loaded: on which device, in which dtype, from a hub id, a folder or a single file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError
from .backbone import Backbone
from .catalog import CATALOG, ModelSpec, check_model
from .flux import Flux
from .single_file import Prediction, load_single_file, predicting
from .stable_diffusion import StableDiffusion
from .stable_diffusion_3 import StableDiffusion3
from .stable_diffusion_xl import StableDiffusionXL

UNETS: tuple[type[Backbone], ...] = (StableDiffusion, StableDiffusionXL)
FLOWS: tuple[type[Backbone], ...] = (StableDiffusion3, Flux)


def default_device() -> torch.device:
    """The fastest device present: CUDA, then Apple's MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the fastest one. Raises `ModelError` for one that this machine lacks."""
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


def as_backbone(pipe: Any, name: str = "", low_memory: bool = False, tf32: bool = False) -> Backbone:
    """A pipeline as the method sees it, by its family. Raises `ModelError` for one of a family that is not known."""
    transformer = getattr(pipe, "transformer", None)
    if transformer is not None:
        family = next((each for each in FLOWS if isinstance(transformer, each.network_class)), None)
        if family is None:
            names = ", ".join(each.family for each in UNETS + FLOWS)
            raise ModelError(f"{type(pipe).__name__} is of a family that is not supported; there are {names}.")
        return family(pipe, name, low_memory, tf32)
    xl = getattr(pipe, "text_encoder_2", None) is not None
    return UNETS[xl](pipe, name, low_memory, tf32)


def load_pipeline(
    model: str,
    device: torch.device,
    dtype: torch.dtype,
    offload: bool = False,
    prediction: Prediction | None = None,
) -> tuple[Any, ModelSpec]:
    """Load an alias, hub id, folder or .safetensors file as a diffusers pipeline.

    offload: leave each network in the machine's memory while it is not at work (on a CPU this changes nothing). prediction:
    what the U-Net predicts; None takes what the model says. A single file is `single_file.py`'s affair. Raises `ModelError`.
    """
    from diffusers import DiffusionPipeline

    check_model(model)
    if prediction not in (None, "epsilon", "v"):
        raise ModelError(f"the prediction {prediction!r} is not known; use epsilon or v.")
    spec = CATALOG.get(model, ModelSpec(model, ""))
    source = Path(spec.source).expanduser()
    options: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    try:
        if source.suffix == ".safetensors":
            pipe = load_single_file(source, dtype, prediction)
        else:
            place = str(source) if source.is_dir() else spec.source
            if "safety_checker" not in DiffusionPipeline.load_config(place):
                options = {}
            pipe = predicting(DiffusionPipeline.from_pretrained(place, dtype=dtype, **options), prediction)
    except ModelError:
        raise
    except Exception as error:
        where = "" if source.exists() else ", and the hub could not be reached or has no such model"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ModelError(f"the model {model!r} could not be loaded{where}: {reason}") from error
    for part in ("unet", "vae"):  # on a CPU exact networks are quicker without: benchmarks/README.md
        if device.type != "cpu" and hasattr(pipe, part):  # other kinds of pipelines are refused later
            getattr(pipe, part).to(memory_format=torch.channels_last)
    if offload and device.type != "cpu":
        pipe.enable_model_cpu_offload(device=device)
        return pipe, spec
    return pipe.to(device), spec
