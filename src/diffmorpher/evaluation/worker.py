"""One process's part of the benchmark: a loaded model, the methods of a pair, and what each result depends on."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file

from ..config import FitConfig, SampleConfig
from ..errors import Cancelled, ConfigError, DataError, DiffMorpherError
from ..files.atomic import temporary
from ..files.cache import default_cache
from ..files.films import save_film
from ..files.pictures import fit_image, load_image
from ..method.perceptual import perceptual_distance
from ..models.catalog import CATALOG, spec_of
from ..morpher import Morpher
from ..path import to_pil, to_pixels
from ..settings import BY_NAME, LIMITS, check_size
from .datasets import Pair
from .methods import METHODS, Effort, clear_paths, resolve_methods, run_method
from .metrics import figures, perceptual_features

#: Part of every key: raise it when what a result holds changes its meaning.
FORMAT = 1
#: The distance that every figure is made with.
DISTANCE = "shift-tolerant LPIPS, AlexNet (stlpips-pytorch 0.0.2, vST0.0)"
FPS = 8


@dataclass(frozen=True)
class Settings:
    """What a run of the benchmark is made with. The defaults are the protocol; with others its figures are not comparable.

    methods: names as `resolve_methods` gives them. frames: per film. steps: of DDIM. fit: of the LoRAs.
    model, device, dtype, prediction, vae: as `Morpher.from_pretrained` takes them. size: as a film's; None is the model's own.
    """

    methods: tuple[str, ...]
    frames: int = 17
    steps: int = SampleConfig.steps
    fit: FitConfig = field(default_factory=FitConfig)
    seed: int = 0
    model: str = "mini"
    device: str | None = None
    prediction: Literal["epsilon", "v"] | None = None
    vae: str | None = None
    dtype: str | None = None
    size: tuple[int, int] | str | None = None

    def __post_init__(self) -> None:
        if resolve_methods(",".join(self.methods)) != list(self.methods):
            raise ConfigError("the methods of a benchmark are single names, each once.")
        if self.frames < 3:
            raise ConfigError(f"frames is {self.frames}, but the benchmark's figures need at least 3.")
        LIMITS[""]["frames"].check(self.frames)
        if self.size is not None:
            object.__setattr__(self, "size", check_size(self.size))
        SampleConfig(steps=self.steps)

    @property
    def is_protocol(self) -> bool:
        return self.protocol == Settings(self.methods).protocol

    @property
    def protocol(self) -> dict[str, Any]:
        """What figures depend on, beside model and data."""
        return {
            "frames": self.frames,
            "steps": self.steps,
            "fit": self.fit.described(),
            "seed": self.seed,
            "distance": DISTANCE,
            "frames_are": "rounded to 8 bits, at the model's working size",
            "intervals": "95 % bootstrap over pairs, 10,000 draws, percentile",
            **({"size": BY_NAME["size"].said(self.size)} if self.size else {}),
        }


class Worker:
    """A loaded model and what it does: all methods of a pair, one after the other. One per process."""

    def __init__(self, settings: Settings, out: Path, device: str | None = None) -> None:
        self.settings, self.out = settings, out
        self.morpher = Morpher.from_pretrained(
            settings.model,
            device=device or settings.device,
            dtype=settings.dtype,
            prediction=settings.prediction,
            vae=settings.vae,
            cache=default_cache(),
        )
        if settings.size:
            self.morpher.spec = replace(self.morpher.spec, size=self.morpher.working_size(settings.size))
        self.distance = perceptual_distance(str(self.morpher.backbone.device))

    def run_pair(self, pair: Pair) -> Iterator[tuple[str, str]]:
        """Make what the pair lacks; yields (pair, method) as each is done or was found."""
        try:
            for method in self.settings.methods:
                if not finished(self.out, pair, method, self.settings):
                    self._run(pair, method)
                yield pair.name, method
        finally:
            clear_paths()

    def make_pair(self, pair: Pair) -> None:
        """The same at one go, for who waits for all of it."""
        for _ in self.run_pair(pair):
            pass

    def give_up(self, pair: Pair, reason: str) -> None:
        """Record what the pair lacks as failed."""
        for method in self.settings.methods:
            if not finished(self.out, pair, method, self.settings):
                self._run(pair, method, reason)

    def _run(self, pair: Pair, method: str, given_up: str | None = None) -> None:
        folder = self.out / pair.name / method
        if folder.is_dir() and any(folder.iterdir()) and not (folder / "result.json").is_file():
            raise DataError(f"{str(folder)!r} holds no result of a benchmark and would be removed: give another -o.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary(folder.parent, is_folder=True) as part:
            result = self._describe(pair, method)
            try:
                if given_up:
                    raise DiffMorpherError(given_up)
                result |= {"status": "done", "error": None} | self._make(pair, method, part)
            except Cancelled:
                raise
            except Exception as error:  # one bad pair does not stop the others
                shutil.rmtree(part)
                part.mkdir()
                result |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
            (part / "result.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(part, folder)

    def _describe(self, pair: Pair, method: str) -> dict[str, Any]:
        return {
            "pair": pair.name,
            "category": pair.category,
            "method": method,
            "key": result_key(pair, method, self.settings),
            "images": [image.name for image in pair.images],
            "prompts": list(pair.prompts),
            "model": self.settings.model,
            "device": str(self.morpher.backbone.device),
            "dtype": str(next(self.morpher.backbone.network.parameters()).dtype).removeprefix("torch."),
            "protocol": self.settings.protocol,
            "version": version("diffmorpher"),
        }

    def _make(self, pair: Pair, method: str, folder: Path) -> dict[str, Any]:
        settings = self.settings
        images = [load_image(image) for image in pair.images]
        effort = Effort(settings.steps, settings.fit)
        made = run_method(method, self.morpher, images, pair.prompts, settings.frames, settings.seed, effort)
        size = self.morpher.working_size()
        inputs = to_pixels([fit_image(image, size) for image in images])
        frames = to_pil(made.pixels)
        save_film(frames, folder / "film.mp4", fps=FPS)
        for i, frame in enumerate(frames):
            frame.save(folder / f"{i:03d}.png")
        features = {
            "frames": perceptual_features(made.pixels, self.distance).cpu(),
            "inputs": perceptual_features(inputs, self.distance).cpu(),
        }
        save_file(features, folder / "features.safetensors")
        return {
            "figures": figures(made.pixels, inputs[[0, -1]], self.distance),
            "alphas": made.alphas,
            "unet_rows": made.unet_rows,
            "seconds": {stage: round(value, 3) for stage, value in made.seconds.items()},
            "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        }


def result_key(pair: Pair, method: str, settings: Settings) -> str:
    """What a result depends on, as a digest: pictures, prompts, method, settings, model, versions."""
    about = {
        "format": FORMAT,
        "pair": pair.key,
        "method": method,
        "protocol": settings.protocol,
        "model": settings.model,
        "model_files": _model_digest(settings.model),
        **({"prediction": settings.prediction} if settings.prediction else {}),
        **({"suits": _suits(settings.model)} if METHODS[method].of_the_model else {}),
        **({"dtype": settings.dtype} if settings.dtype else {}),
        **({"vae": _model_digest(settings.vae)} if settings.vae else {}),
        "version": version("diffmorpher"),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]


def _suits(model: str) -> list[Any]:
    """What the catalog recommends, so that what was made with an older recommendation is made anew."""
    spec = spec_of(model)
    return [spec.fit.described(), asdict(spec.sample), spec.quick_attention]


def _model_digest(model: str) -> list[Any]:
    """The digests of a local model's weights, so that one that was trained anew is run anew; a hub id says it all."""
    place = Path(CATALOG[model].source if model in CATALOG else model)
    files = [place] if place.is_file() else sorted(place.rglob("*.safetensors")) if place.is_dir() else []
    return [[file.name, file.stat().st_size, _head(file)] for file in files]


def _head(file: Path) -> str:
    """A digest of the first and the last 64 kB: enough to tell two trainings apart, and quick for gigabytes."""
    with file.open("rb") as opened:
        first = opened.read(65536)
        opened.seek(max(0, file.stat().st_size - 65536))
        return hashlib.sha256(first + opened.read()).hexdigest()[:16]


def read_result(out: Path, pair: Pair, method: str) -> dict[str, Any] | None:
    try:
        result: dict[str, Any] = json.loads((out / pair.name / method / "result.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return result


def finished(out: Path, pair: Pair, method: str, settings: Settings) -> bool:
    result = read_result(out, pair, method)
    return result is not None and result["status"] == "done" and result["key"] == result_key(pair, method, settings)
