"""One .safetensors file: what it says of itself, and how it is loaded with no network.

What the weights do not say, a diffusers configuration does: bundled for Stable Diffusion 1.x, 2.x and XL, for the others in a
folder of the same name beside the file (`model.safetensors`, `model/`), which wins over what is bundled.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ..errors import ModelError
from .clip_vocabulary import CONFIGS, clip_tokenizer
from .families import FAMILIES, Family, Shapes, family, for_editing
from .memory import is_out_of_memory
from .unsuited import check_class, few_steps_by_name, few_steps_sentence, read_index

Prediction = Literal["epsilon", "v"]
#: Texts of a header, by what in them means v and what epsilon: modelspec's, then that of kohya's trainer.
_SAYS = {
    "modelspec.prediction_type": (r"^v", r"^eps"),
    "modelspec.architecture": (r"-v$", r"v2-512"),
    "ss_base_model_version": (r"^sd_v\d_v$", r"^sd_v\d$"),
}
#: Names that say v, or epsilon, of any family; and those of Stable Diffusion 2's own files: 768-v-ema, v2-1_512-ema-pruned.
_NAMED = (r"v[-_ ]?pred", r"eps[-_ ]?pred|epsilon|(?<![a-z])eps(?![a-z])")
_NAMED_SD2 = (r"768|(?<![a-z0-9])v(?![a-z0-9])", r"512|(?<![a-z])base(?![a-z])")
#: Pipelines whose text encoders diffusers reads from the same file; those of the others come from the folder.
_WHOLE = ("StableDiffusion3Pipeline", "FluxPipeline")
#: What a whole checkpoint also holds, by the beginnings of the keys.
_PARTS = {"a VAE": ("first_stage_model.", "vae."), "a text encoder": ("cond_stage_model.", "conditioner.")}


# ---- what a file says


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A .safetensors file without its weights: keys with shapes and dtypes, and the texts of its header."""

    file: Path
    shapes: Shapes
    dtypes: frozenset[str]
    metadata: Mapping[str, str]

    @classmethod
    def read(cls, file: Path) -> Checkpoint:
        """Raises `ModelError` for what is no .safetensors file."""
        try:
            with safe_open(file, "pt") as opened:
                parts = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
                shapes = {key: tuple(part.get_shape()) for key, part in parts.items()}
                dtypes = frozenset(part.get_dtype() for part in parts.values())
                return cls(file, shapes, dtypes, opened.metadata() or {})
        except Exception as error:
            raise ModelError(f"the model {str(file)!r} could not be loaded: it is no .safetensors file.") from error

    @cached_property
    def family(self) -> Family:
        found = family(self.shapes)
        return for_editing(self.file.stem, found) or found

    @property
    def folder(self) -> Path | None:
        """The configuration beside the file, if there is one."""
        folder = self.file.with_suffix("")
        return folder if folder.is_dir() else None

    @property
    def prediction(self) -> Prediction | None:
        """What its U-Net predicts, by its header, else a mark among its keys, else its name; None where nothing says it."""
        if not self.family.config:
            return None
        for name, patterns in _SAYS.items():
            if said := _one_of(patterns, self.metadata.get(name, "")):
                return said
        if "v_pred" in self.shapes:
            return "v"
        by_name = _one_of(_NAMED, self.file.stem)
        if self.family == FAMILIES["sd2"]:
            return by_name or _one_of(_NAMED_SD2, self.file.stem)
        return by_name or "epsilon"

    @property
    def few_steps(self) -> str:
        """A sentence for a file whose name says that it is distilled, else nothing."""
        name = self.file.name
        klein = self.family == FAMILIES["flux2-klein"] and "base" not in name.lower()
        return few_steps_sentence(name) if klein else few_steps_by_name(name)

    def check(self, prediction: Prediction | None = None, vae: bool = False) -> Path:
        """The folder of its configuration. Raises `ModelError`, which says what to take instead, if it cannot be used.

        vae: whether another one takes the place of its own, which it may then lack.
        """
        found, beside = self.family, self.file.with_suffix("")
        if found.instead and not (self.folder and found == FAMILIES["unknown"]):
            raise ModelError(f"{self.file.name} holds {found.name}: {found.instead}.")
        if self.folder:
            check_class(str(read_index(self.folder).get("_class_name")))
            return self.folder
        if not found.config:
            raise ModelError(
                f"{self.file.name} holds {found.name}, of which no configuration is bundled: put the rest of its diffusers "
                f"folder (model_index.json and what it names) into the folder {beside}."
            )
        for part, prefixes in _PARTS.items():
            if not any(key.startswith(prefixes) for key in self.shapes) and not (vae and part == "a VAE"):
                more = ", or give one with --vae" if part == "a VAE" else ""
                raise ModelError(
                    f"{self.file.name} holds {found.name} without {part}: take the whole checkpoint{more}."
                )
        predicts = prediction or self.prediction
        if predicts is None:
            raise ModelError(
                f"{self.file.name} is a {found.name} file that does not say what it predicts: give --prediction v for a "
                "model of 768 pixels, --prediction epsilon for one of 512 (the other one gives noise)."
            )
        return CONFIGS / (found.config_v if predicts == "v" and found.config_v else found.config)


def _one_of(patterns: tuple[str, str], text: str) -> Prediction | None:
    """What a text says by the patterns for v and for epsilon; None for neither, or both."""
    v, epsilon = (re.search(pattern, text.lower()) for pattern in patterns)
    return None if bool(v) == bool(epsilon) else "v" if v else "epsilon"


# ---- loading


def load_single_file(
    file: Path, dtype: torch.dtype, prediction: Prediction | None = None, vae: Callable[[Path], Any] | None = None
) -> Any:
    """A diffusers pipeline of one file and its configuration. Raises `ModelError` for one that cannot be used.

    vae: gives another autoencoder in place of the file's, from the folder of that configuration.
    """
    import diffusers

    checkpoint = Checkpoint.read(file)
    config, found = checkpoint.check(prediction, vae is not None), checkpoint.family
    if checkpoint.few_steps:
        warnings.warn(checkpoint.few_steps, stacklevel=2)
    kind = getattr(diffusers, found.pipeline or FAMILIES["sd1"].pipeline)
    bundled = not checkpoint.folder
    # A T5 that is done without: diffusers says that it is missing.
    options: dict[str, Any] = {part: None for part, of in read_index(config).items() if of == [None, None]}
    options |= {"dtype": dtype, "local_files_only": True}
    if bundled:
        options |= {folder.name: clip_tokenizer(folder) for folder in sorted(config.glob("tokenizer*"))}
    elif kind is diffusers.StableDiffusionPipeline:
        options |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if vae is not None:
        options["vae"] = vae(config)
    has_texts = any(key.startswith("text_encoders.") for key in checkpoint.shapes)
    if found.network and not (has_texts and found.pipeline in _WHOLE):
        network = _network(file, found, config, dtype)
        pipe = kind.from_pretrained(str(config), transformer=network, **options)
    else:
        with with_small_letters(file) as place:
            pipe = kind.from_single_file(place, config=str(config), **options)
    _check_whole(pipe, file.name, found.name)
    says = prediction or (checkpoint.prediction if bundled else None)
    return predicting(pipe, says, zero_snr=bundled and "ztsnr" in checkpoint.shapes)


def _network(file: Path, found: Family, config: Path, dtype: torch.dtype) -> Any:
    """The transformer of a file, whatever else the file holds. Raises `ModelError` for one that diffusers cannot read."""
    import diffusers

    weights, prefix = load_file(file), "model.diffusion_model."  # which not all of diffusers' converters take off
    named = {key.removeprefix(prefix): weight for key, weight in weights.items() if key.startswith(prefix)}
    try:
        network = getattr(diffusers, found.network).from_single_file(
            named or weights, config=str(config), subfolder="transformer", dtype=dtype, local_files_only=True
        )
    except OSError:  # of the configuration: says what it lacks
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{file.name} is not a whole {found.name} file, or not one that diffusers {diffusers.__version__} can read: take "
            "another copy, or the model's diffusers folder."
        ) from error
    return network


@contextmanager
def with_small_letters(file: Path) -> Iterator[str]:
    """A name of the file that ends in .safetensors: diffusers takes .SAFETENSORS for a pickle."""
    small = file.with_suffix(".safetensors")
    if small.exists():  # the same file where capitals do not matter
        yield str(small)
        return
    with TemporaryDirectory() as folder:
        link = Path(folder, small.name)
        link.symlink_to(file.resolve())
        yield str(link)


def predicting(pipe: Any, prediction: Prediction | None, zero_snr: bool = False) -> Any:
    """The pipeline, told what its network predicts; None leaves what its scheduler says. Raises `ModelError`.

    zero_snr: its noise levels were stretched so that the last is noise alone.
    """
    if prediction is not None or zero_snr:
        config = getattr(getattr(pipe, "scheduler", None), "config", {})
        if "prediction_type" not in config:
            raise ModelError(f"{type(pipe).__name__} predicts neither epsilon nor v: leave out --prediction.")
        changes: dict[str, Any] = {"rescale_betas_zero_snr": True} if zero_snr else {}
        if prediction is not None:
            changes["prediction_type"] = {"epsilon": "epsilon", "v": "v_prediction"}[prediction]
        pipe.scheduler = type(pipe.scheduler).from_config(config, **changes)
    return pipe


def _check_whole(pipe: Any, file: str, name: str) -> None:
    """Raise `ModelError` if a weight was not in the file: diffusers leaves it without a word."""
    for part, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            lost = next((key for key, weight in module.named_parameters() if weight.device.type == "meta"), None)
            if lost:
                raise ModelError(f"{file} is not a whole {name} file: {part} lacks {lost}; take another copy.")
