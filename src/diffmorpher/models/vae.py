"""An autoencoder in place of a model's own, from a folder or one file: `--vae`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from safetensors.torch import load_file

from ..errors import ModelError
from .families import FAMILIES
from .single_file import Checkpoint, with_small_letters


def load_vae(place: str, config: str | Path | None, dtype: torch.dtype) -> Any:
    """The autoencoder of a folder (its own, or a whole model's) or of a .safetensors file, in diffusers' or the old layout.

    A file alone does not say its class and scale; the model's does. config: a folder, or hub id, in which that is
    `vae/config.json`; None where there is none. Raises `ModelError` for what is none.
    """
    path = Path(place).expanduser()
    try:
        if path.is_dir():
            return _of_folder(path, dtype)
        if path.suffix.lower() != ".safetensors" or not path.is_file():
            raise ModelError(f"the VAE {place!r} is neither a folder nor a .safetensors file: check the path.")
        return _of_file(path, config, dtype)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"the VAE {place!r} could not be loaded: {str(error).splitlines()[0]:.200}") from error


def _of_folder(folder: Path, dtype: torch.dtype) -> Any:
    for each in (folder, folder / "vae"):
        if kind := _kind(each):
            return kind.from_pretrained(each, dtype=dtype, local_files_only=True)
    raise ModelError(
        f"the VAE {str(folder)!r} is a folder without an autoencoder's config.json: give the one that is called vae in a model."
    )


def _kind(folder: Path) -> Any:
    """The class of a folder's autoencoder; None where it holds none."""
    import diffusers

    try:
        name = json.loads((folder / "config.json").read_text("utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return getattr(diffusers, str(name), None) if str(name).startswith("Autoencoder") else None


def _of_file(file: Path, config: str | Path | None, dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKL, AutoencoderTiny

    checkpoint = Checkpoint.read(file)
    keys = checkpoint.shapes
    if "decoder.layers.0.weight" in keys and "encoder.layers.0.weight" in keys:  # TAESD's names in diffusers
        last = max(int(key.split(".")[2]) for key in keys if key.startswith("encoder.layers."))
        vae: Any = AutoencoderTiny(latent_channels=keys[f"encoder.layers.{last}.weight"][0])
        _fill(vae, file)
    elif "decoder.up_blocks.0.resnets.0.conv1.weight" in keys:
        kind = _kind(file.parent)
        vae = kind.from_config(kind.load_config(file.parent)) if kind else _like_the_models(config, file)
        _fill(vae, file)
    elif any(key.endswith("decoder.conv_in.weight") for key in keys):
        if type(_like_the_models(config, file)) is not AutoencoderKL:
            raise ModelError(
                f"the VAE {file.name} is in a layout that is not read for this family: give one in diffusers' layout, "
                "such as the folder that is called vae in the model."
            )
        with with_small_letters(file) as name:
            vae = AutoencoderKL.from_single_file(
                name, config=str(config), subfolder="vae", local_files_only=True, dtype=dtype
            )
        if lost := next((key for key, weight in vae.named_parameters() if weight.device.type == "meta"), None):
            raise ModelError(f"the VAE {file.name} lacks {lost}: take another copy.")
    else:
        found = checkpoint.family
        holds = "no autoencoder that is known" if found == FAMILIES["unknown"] else found.name
        raise ModelError(f"the VAE {file.name} holds {holds}: give an autoencoder of the model's family.")
    return torch.nn.Module.to(vae, dtype).eval()  # diffusers' own warns of layers that these have not


def _like_the_models(config: str | Path | None, file: Path) -> Any:
    """An autoencoder with random weights, built as the model's own."""
    import diffusers

    if config is None:
        raise ModelError(
            f"neither the VAE {file.name} nor the model says how it is built: give a folder with its config.json."
        )
    about = diffusers.AutoencoderKL.load_config(config, subfolder="vae")
    return getattr(diffusers, about.get("_class_name", "AutoencoderKL")).from_config(about)


def _fill(vae: Any, file: Path) -> None:
    weights, wanted = load_file(file), vae.state_dict()
    if other := next((k for k, w in wanted.items() if k not in weights or weights[k].shape != w.shape), None):
        raise ModelError(
            f"the VAE {file.name} {'has another shape of' if other in weights else 'lacks'} {other}: take another copy, "
            "give one of this model's family, or the folder in which it has its config.json."
        )
    vae.load_state_dict(weights)


@contextmanager
def of_any_class() -> Iterator[None]:
    """While open, diffusers does not warn that a pipeline expects another class of autoencoder."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def check_fits(vae: Any, network: Any, place: str) -> None:
    """Raise `ModelError` for an autoencoder whose latents the network cannot read."""
    has = int(getattr(vae.config, "latent_channels", None) or vae.config.z_dim)
    reads = int(network.config.in_channels)
    if reads not in (has, 4 * has):  # transformers may read 2 x 2 latents as one
        raise ModelError(
            f"the VAE {place!r} makes {has} channels, but the model reads {reads}: give one of this model's family."
        )
