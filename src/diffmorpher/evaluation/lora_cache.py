"""Fitted LoRAs kept on disk, so that methods, runs and processes that need the same fit make it once.

The key is the content: model, picture as fitted, prompt, settings, seed and version. (The published code names its cache
after the output folder, and a second pair silently gets the first pair's LoRAs.)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from ..config import FitConfig
from ..errors import LoraError
from ..files.loras import Lora, load_lora, save_lora
from ..files.pictures import fit_image, image_hash, load_image
from ..morpher import Morpher
from ..progress import ProgressCallback


def cache_folder() -> Path:
    """$DIFFMORPHER_CACHE, or the user's cache folder of the platform."""
    import platformdirs

    return Path(os.environ.get("DIFFMORPHER_CACHE") or platformdirs.user_cache_dir("diffmorpher", appauthor=False))


def cached_loras(
    morpher: Morpher,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    fit: FitConfig,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> list[Lora]:
    """One LoRA for each image, from the cache where it has them; what is missing is fitted in one batch and kept.

    A second process that wants the same fit waits for the first. A file that is damaged is fitted anew.
    """
    from filelock import FileLock

    folder = cache_folder() / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    files = [
        folder / f"{_key(morpher, image, prompt, fit, seed)}.safetensors"
        for image, prompt in zip(images, prompts, strict=True)
    ]
    with ExitStack() as locks:
        for file in sorted(set(files)):  # in one order everywhere, so that no two processes wait for each other
            locks.enter_context(FileLock(file.with_suffix(".lock")))
        found = {file: _load(file) for file in files}
        missing = [i for i, file in enumerate(files) if found[file] is None and file not in files[:i]]
        if missing:
            fitted = morpher.fit_all(
                [images[i] for i in missing], [prompts[i] for i in missing], fit, seed, progress=progress
            )
            for i, new in zip(missing, fitted, strict=True):
                save_lora(new, files[i])
                found[files[i]] = new
    return [lora for file in files if (lora := found[file])]


def _load(file: Path) -> Lora | None:
    try:
        return load_lora(file) if file.is_file() else None
    except LoraError:
        return None


def _key(morpher: Morpher, image: Image.Image, prompt: str, fit: FitConfig, seed: int) -> str:
    picture = fit_image(load_image(image), morpher.working_size())
    about = {
        "model": morpher.backbone.signature(),
        "dtype": str(morpher.backbone.network.dtype),
        **({"prediction": morpher.prediction} if morpher.prediction else {}),
        "image": image_hash(picture),
        "size": picture.size,
        "prompt": prompt,
        "fit": fit.described(),
        "seed": seed,
        "version": version("diffmorpher"),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
