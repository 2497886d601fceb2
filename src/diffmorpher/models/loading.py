"""How any model is loaded: on which device, in which dtype, from a hub id, a folder or a single file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..errors import ModelError, OutOfMemory
from .backbone import Backbone
from .bundled import check_sums
from .catalog import ASSETS, NOT_ON_HUB, ModelSpec, catalogued, check_model, not_loaded
from .clip_vocabulary import CONFIGS
from .flux import Flux
from .flux2 import Flux2
from .memory import is_out_of_memory
from .qwen_image import QwenImage
from .single_file import Prediction, load_single_file, predicting
from .stable_diffusion import StableDiffusion
from .stable_diffusion_3 import StableDiffusion3
from .stable_diffusion_xl import StableDiffusionXL
from .unsuited import check_class, check_suits
from .vae import check_fits, load_vae, of_any_class
from .z_image import ZImage

#: Parameters from which on a network is large: mini has 22 M, Stable Diffusion 1.x 860 M.
LARGE = 500_000_000

UNETS: tuple[type[Backbone], ...] = (StableDiffusion, StableDiffusionXL)
FLOWS: tuple[type[Backbone], ...] = (StableDiffusion3, Flux, Flux2, ZImage, QwenImage)


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
        torch.empty(1, device=chosen).tolist()  # on "meta" nothing can be computed
    except Exception as error:
        raise ModelError(f"the device {str(device)!r} is not usable here; try {str(default_device())!r}.") from error
    return chosen


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device, parameters: int = 0) -> torch.dtype:
    """The dtype asked for; else float32, on CUDA bfloat16 (float16 where the card has no bfloat16).

    On a CPU that multiplies in bfloat16 a network of more than `LARGE` parameters gets that too.
    """
    if dtype is None:
        if device.type == "cpu" and parameters > LARGE and _multiplies_in_bfloat16():
            return torch.bfloat16
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if isinstance(dtype, str):
        names = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
        if dtype not in names:
            raise ModelError(f"the dtype {dtype!r} is not known; use one of {', '.join(names)}.")
        return names[dtype]
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError(f"the dtype is {dtype!r}, but must be a floating-point one, such as torch.float32.")
    return dtype


def _check_parts(folder: Path, parts: Mapping[str, Any]) -> None:
    """Raise `ModelError` for a part that the model's index names and its folder has not, or for no VAE."""
    named = {name: of[0] for name, of in parts.items() if isinstance(of, (list, tuple)) and len(of) == 2}
    lost = [name for name, of in named.items() if (not (folder / name).is_dir() if of else name == "vae")]
    if lost:
        raise ModelError(
            f"the model {str(folder)!r} lacks {', '.join(lost)}: copy what is so called from the model that it was made from, "
            f"and let its model_index.json name it{', or give one with --vae' if lost == ['vae'] else ''}."
        )


def _vae_config(place: str, parts: Mapping[str, Any]) -> str | Path | None:
    """Where the configuration of a model's own autoencoder is: with the model, or the bundled one of its family, if any."""
    if "vae" in parts and (not Path(place).is_dir() or (Path(place) / "vae" / "config.json").is_file()):
        return place
    if "unet" not in parts:
        return None
    return CONFIGS / ("sdxl" if "XL" in str(parts.get("_class_name")) else "sd1")


def _multiplies_in_bfloat16() -> bool:
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.6 has none
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def count_parameters(model: Path) -> int:
    """How many parameters the network of a folder or a .safetensors file has, by the headers; 0 where these do not say."""
    one = model.suffix.lower() == ".safetensors"
    files = [model] if one else [f for p in ("unet", "transformer") for f in (model / p).glob("*model*.safetensors")]
    try:  # of variants, such as model.fp16.safetensors, none is loaded
        return sum(_count_in(file) for file in files if one or file.name.count(".") == 1)
    except Exception:  # loading says what is wrong with it
        return 0


def _count_in(file: Path) -> int:
    """Those of a whole checkpoint's network alone, where it has more than that."""
    with safe_open(file, "np") as opened:
        sizes = {key: math.prod(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    network = {key: size for key, size in sizes.items() if key.startswith("model.diffusion_model.")}
    return sum((network or sizes).values())


def as_backbone(pipe: Any, name: str = "", low_memory: bool = False, tf32: bool = False) -> Backbone:
    """A pipeline as the method sees it, by its family. Raises `ModelError` for one of a family that is not known.

    Warns of one that is distilled to a few steps, where its name or scheduler says so.
    """
    transformer = getattr(pipe, "transformer", None)
    if transformer is not None:
        family = next((each for each in FLOWS if isinstance(transformer, each.network_class)), None)
        if family is None:
            names = ", ".join(each.family for each in UNETS + FLOWS)
            raise ModelError(f"{type(pipe).__name__} is of a family that is not supported; there are {names}.")
        backbone = family(pipe, name, low_memory, tf32)
        check_suits(pipe, backbone.name)
        return backbone
    xl = getattr(pipe, "text_encoder_2", None) is not None
    backbone = UNETS[xl](pipe, name, low_memory, tf32)
    check_suits(pipe, backbone.name)
    return backbone


def load_pipeline(
    model: str,
    device: torch.device,
    dtype: str | torch.dtype | None = None,
    offload: bool = False,
    prediction: Prediction | None = None,
    vae: str | None = None,
) -> tuple[Any, ModelSpec | None]:
    """Load an alias, hub id, folder or .safetensors file as a diffusers pipeline, with its entry in the catalog.

    dtype: None takes what suits the device and the network, see `choose_dtype`.
    offload: leave each network in the machine's memory while it is not at work (on a CPU this changes nothing). prediction:
    what the U-Net predicts; None takes what the model says. vae: a folder or file whose autoencoder takes the place of the
    model's own. A single file is `single_file.py`'s affair. Raises `ModelError`.
    """
    from diffusers import DiffusionPipeline

    check_model(model)
    if prediction not in (None, "epsilon", "v"):
        raise ModelError(f"the prediction {prediction!r} is not known; use epsilon or v.")
    wanted = choose_dtype(dtype, device)
    spec = catalogued(model)
    name = spec.source if spec else model
    source = Path(name).expanduser()
    options: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    try:
        if source.suffix.lower() == ".safetensors":
            wanted = choose_dtype(dtype, device, count_parameters(source))
            other = partial(load_vae, vae, dtype=wanted) if vae else None
            pipe = load_single_file(source, wanted, prediction, other)
        else:
            place = str(source) if source.is_dir() else name
            if source.parent == ASSETS:
                check_sums(source)
            parts = DiffusionPipeline.load_config(place)
            check_class(str(parts.get("_class_name")))  # before gigabytes are fetched
            if "safety_checker" not in parts:
                options = {}
            if source.is_dir():
                left_out = {*options, *(["vae"] if vae else [])}
                _check_parts(source, {name: of for name, of in parts.items() if name not in left_out})
            if dtype is None and device.type == "cpu" and _multiplies_in_bfloat16():
                folder = Path(place if source.is_dir() else DiffusionPipeline.download(place, **options))
                wanted = choose_dtype(None, device, count_parameters(folder))
            if vae:
                options["vae"] = load_vae(vae, _vae_config(place, parts), wanted)
            # Of a T5 that is done without diffusers says that it is missing.
            options = {part: None for part, of in parts.items() if of in ([None, None], (None, None))} | options
            with of_any_class() if vae else nullcontext():
                pipe = DiffusionPipeline.from_pretrained(place, dtype=wanted, **options)
            pipe = predicting(pipe, prediction)
        if vae:
            check_fits(pipe.vae, getattr(pipe, "transformer", None) or pipe.unet, vae)
    except ModelError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            less = "--dtype bfloat16" if wanted == torch.float32 else "a smaller model"
            raise OutOfMemory(f"not enough memory to load {model}; what needs less: {less}.") from error
        raise not_loaded(model, error, "" if source.exists() else NOT_ON_HUB) from error
    if device.type != "cpu":  # on a CPU exact networks are quicker without: benchmarks/README.md
        for network in (getattr(pipe, part, None) for part in ("unet", "vae")):  # other kinds are refused later
            if network is not None and all(p.ndim < 5 for p in network.parameters()):  # a VAE of films has 5
                network.to(memory_format=torch.channels_last)
    if offload and device.type != "cpu":
        pipe.enable_model_cpu_offload(device=device)
        return pipe, spec
    return pipe.to(device), spec
