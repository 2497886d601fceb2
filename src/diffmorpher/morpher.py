"""`Morpher`: a model, and the way from pictures to a film."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from operator import index
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from .config import NUM_FRAMES, FitConfig, SampleConfig, ScheduleConfig, stretches_and_gaps
from .errors import ConfigError
from .files.loras import Lora, load_lora
from .files.pictures import ImageSource, fit_image, image_hash, load_image
from .gather import gather
from .method.attention import check_mode
from .method.fit import fit_loras
from .method.lora import LoraBank
from .models.catalog import ModelSpec, bare_name
from .models.conditioning import Conditioning
from .models.loading import as_backbone, choose_device, choose_dtype, load_pipeline
from .models.single_file import Prediction
from .path import MorphPath, to_pixels
from .progress import ProgressCallback, Stopwatch
from .recipe import VERSION as RECIPE_VERSION
from .recipe import Recipe
from .result import MorphResult
from .stream import FrameStream

#: Takes a film's frames, as they are made, and its settings.
Writer = Callable[[Iterable[Image.Image], dict[str, Any]], object]


class Morpher:
    """A diffusion model that morphs.

    pipe: a diffusers pipeline of Stable Diffusion 1.x, 2.x, XL, 3.x or FLUX.1, on the device and in the dtype to be used; left
    as it was found. Use `Morpher.from_pretrained` to load one by name. Raises `ModelError` for another kind of pipeline.
    low_memory: the same films in less memory and more time: images are encoded and fitted one by one, with gradient
    checkpointing, and frames sampled two at a time. (`from_pretrained` also keeps idle networks off the GPU; for a pipeline of
    your own, `pipe.enable_model_cpu_offload()` does.)
    tf32: on a GPU, let float32 products be rounded to TF32: faster, less exact.
    """

    def __init__(
        self, pipe: Any, *, spec: ModelSpec | None = None, name: str = "", low_memory: bool = False, tf32: bool = False
    ) -> None:
        self.backbone = as_backbone(pipe, name, low_memory, tf32)
        self.spec = spec or ModelSpec("", "")
        self.load_seconds = 0.0
        self.prediction: Prediction | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str = "mini",
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        low_memory: bool = False,
        tf32: bool = False,
        prediction: Prediction | None = None,
    ) -> Morpher:
        """Load a model: a name of the catalog ("mini" is bundled), a hub id, a folder, or a .safetensors file.

        device: None takes the fastest present; dtype: None takes float32, on CUDA a 16-bit one. low_memory, tf32: as in the
        class. prediction: "epsilon" or "v", for a file that does not say what its U-Net predicts. Raises `ModelError`.
        """
        started = time.perf_counter()
        on = choose_device(device)
        pipe, spec = load_pipeline(str(model), on, choose_dtype(dtype, on), low_memory, prediction)
        morpher = cls(pipe, spec=spec, name=bare_name(str(model)), low_memory=low_memory, tf32=tf32)
        morpher.prediction = prediction
        morpher.load_seconds = time.perf_counter() - started
        return morpher

    @property
    def pipe(self) -> Any:
        """The diffusers pipeline."""
        return self.backbone.pipe

    # ---- the slow part

    def prepare(
        self,
        images: Sequence[ImageSource],
        prompts: str | Sequence[str] | None = None,
        loras: Sequence[str | os.PathLike[str] | Lora] | None = None,
        fit: FitConfig | Literal["recommended"] | None = "recommended",
        seed: int = 0,
        *,
        size: Sequence[int] | None = None,
        resize: Literal["crop", "pad"] = "crop",
        steps: int | None = None,
        loop: bool = False,
        progress: ProgressCallback | None = None,
    ) -> MorphPath:
        """Encode the images, fit a LoRA to each, invert them: once, for any number of frames after.

        images: two or more. prompts: one for all, one each, or none. loras: one file (or `Lora`) per image, instead of
        fitting. fit: "recommended" takes the model's own settings, else the paper's; None without `loras` means no LoRA.
        size: (width, height), multiples of the VAE's factor; None takes the model's. resize: "crop" fills that size and
        cuts what stands over, "pad" shows all of each image on white. steps: of the inversion, as in `SampleConfig`;
        None takes the model's.
        loop: a path that returns to the first image. Raises `ConfigError`, `ImageError`, `LoraError`.
        """
        _check_images(images)
        sample = self.spec.sample if steps is None else replace(self.spec.sample, steps=steps)
        size = self.working_size(size)
        texts = _one_each(prompts, len(images))
        loaded = [load_image(image) for image in images]
        pictures = [fit_image(image, size, resize) for image in loaded]
        hashes = [image_hash(picture) for picture in pictures]
        settings: dict[str, Any] = {
            "pictures": [_name(image, k) for k, image in enumerate(images)],
            "picture_hashes": [image_hash(image) for image in loaded],
            "images": hashes,
            "prompts": texts,
            "size": list(size),
            "resize": resize,
            "seed": seed,
            "loop": loop,
        }
        mean, std, conditioning = self._encode(pictures, texts)

        bank: LoraBank | None = None
        if loras is not None:
            files = [loras] if isinstance(loras, (str, os.PathLike)) else loras
            if len(files) != len(images):
                raise ConfigError(f"{len(files)} LoRA files were given for {len(images)} images; give one for each.")
            names = [f"LoRA {k}" if isinstance(lora, Lora) else str(lora) for k, lora in enumerate(files)]
            fitted = [lora if isinstance(lora, Lora) else load_lora(lora) for lora in files]
            for lora, name, digest in zip(fitted, names, hashes, strict=True):
                if lora.metadata.get("image_hash", digest) != digest:
                    warnings.warn(f"{name} was fitted to another picture, or at another size.", stacklevel=2)
            bank = LoraBank.stack(fitted, self.backbone.network, names, mean.device)
            settings["loras"] = [Path(name).name for name in names]
        elif fit is not None:
            config = self._fit_config(fit)
            bank = self._fit(mean, std, conditioning, config, seed, progress, texts, hashes)
            settings["fit"] = asdict(config)
        else:
            settings["fit"] = False

        path = MorphPath(self.backbone, mean, conditioning, bank, texts, loop, settings, sample)
        path.noises_at(sample.steps, progress)
        return path

    def fit(
        self,
        image: ImageSource,
        prompt: str = "",
        fit: FitConfig | Literal["recommended"] = "recommended",
        seed: int = 0,
        *,
        size: Sequence[int] | None = None,
        resize: Literal["crop", "pad"] = "crop",
        progress: ProgressCallback | None = None,
    ) -> Lora:
        """Fit one image's LoRA, the same as `prepare` would, to be written with `save_lora` and passed in `loras` later."""
        return self.fit_all([image], prompt, fit, seed, size=size, resize=resize, progress=progress)[0]

    def fit_all(
        self,
        images: Sequence[ImageSource],
        prompts: str | Sequence[str] | None = None,
        fit: FitConfig | Literal["recommended"] = "recommended",
        seed: int = 0,
        *,
        size: Sequence[int] | None = None,
        resize: Literal["crop", "pad"] = "crop",
        progress: ProgressCallback | None = None,
    ) -> list[Lora]:
        """Fit one LoRA to each of one or more images, all in one batch, as `prepare` does."""
        texts = _one_each(prompts, len(images))
        pictures = [fit_image(load_image(image), self.working_size(size), resize) for image in images]
        mean, std, conditioning = self._encode(pictures, texts)
        hashes = [image_hash(picture) for picture in pictures]
        bank = self._fit(mean, std, conditioning, self._fit_config(fit), seed, progress, texts, hashes)
        return [bank.lora(k) for k in range(len(images))]

    def _fit_config(self, fit: FitConfig | str) -> FitConfig:
        if isinstance(fit, FitConfig):
            return fit
        if fit != "recommended":
            raise ConfigError(f'fit is {fit!r}, but must be a FitConfig, "recommended", or None for no LoRA.')
        return self.spec.fit

    def _encode(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> tuple[Tensor, Tensor, Conditioning]:
        with torch.no_grad(), self.backbone.borrowed():
            mean, std = self.backbone.encode(to_pixels(pictures))
            return mean, std, self.backbone.encode_prompts(prompts)

    def _fit(
        self,
        mean: Tensor,
        std: Tensor,
        conditioning: Conditioning,
        config: FitConfig,
        seed: int,
        progress: ProgressCallback | None,
        prompts: Sequence[str],
        hashes: Sequence[str],
    ) -> LoraBank:
        bank = fit_loras(self.backbone, mean, std, conditioning, config, seed, progress)
        for metadata, prompt, digest in zip(bank.metadata, prompts, hashes, strict=True):
            metadata |= {"prompt": prompt, "model": self.backbone.name, "image_hash": digest}
        return bank

    def working_size(self, size: Sequence[int] | None = None) -> tuple[int, int]:
        """(width, height) in pixels that the model can work at; None takes its own."""
        factor, smallest = self.backbone.size_multiple, self.backbone.smallest_side
        try:
            width, height = map(index, size or self.spec.size or self.backbone.native_size)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the size is {size!r}, but must be two whole numbers, (width, height).") from error
        for side in (width, height):
            if not smallest <= side <= 4096 or side % factor:
                near = min(4096, max(smallest, round(side / factor) * factor))
                raise ConfigError(
                    f"the size {width}x{height} cannot be used: each side must be a multiple of {factor} "
                    f"from {smallest} to 4096; for {side} take {near}."
                )
        return width, height

    # ---- the film

    def film(
        self,
        path: MorphPath,
        num_frames: int = NUM_FRAMES,
        sample: SampleConfig | None = None,
        schedule: ScheduleConfig | None = None,
        progress: ProgressCallback | None = None,
        write: Writer | None = None,
    ) -> MorphResult:
        """Sample a prepared path at `num_frames` positions, evenly spaced by perceptual distance.

        In a loop the last frame leads back to the first, which is not repeated. write: a function that is given the frames
        as they are made, and the film's settings; they are then not kept in the result, so that a film of any length needs no
        more memory than a short one. Raises `ConfigError` if the frames are fewer than the images.
        """
        sample, schedule = sample or path.sample_config, schedule or ScheduleConfig()
        _check_frames(num_frames)
        rows_before = self.backbone.unet_rows
        stream = FrameStream(path, num_frames, sample, schedule, progress)
        stream.plan()
        settings = {
            "recipe": RECIPE_VERSION,
            "diffmorpher": version("diffmorpher"),
            "model": self.backbone.name,
            "device": str(self.backbone.device),
            "dtype": str(self.backbone.network.dtype).removeprefix("torch."),
            "low_memory": self.backbone.low_memory,
            "tf32": self.backbone.tf32,
            **({"prediction": self.prediction} if self.prediction else {}),  # else the model says it
            **path.settings,
            "frames": num_frames,
            "sample": asdict(sample),
            "schedule": asdict(schedule),
            "alphas": stream.positions,
        }
        frames: list[Image.Image] = []
        if write is None:
            frames += stream
        else:
            write(stream, settings)
        return MorphResult(
            frames,
            stream.positions,
            stream.distances,
            stream.seconds,
            self.backbone.unet_rows - rows_before,
            settings,
            path,
            stream.distances_before,
        )

    def make(
        self,
        recipe: Recipe,
        pictures: Sequence[Image.Image] | None = None,
        progress: ProgressCallback | None = None,
        write: Writer | None = None,
    ) -> MorphResult:
        """The film of a recipe, whose model, device and dtype are this Morpher's affair.

        pictures: the recipe's, where they are in memory already (by `gather`); None reads them. write: as in `film`.
        Raises `RecipeError` for pictures that are missing or other ones.
        """
        if pictures is None:
            recipe, pictures = gather(recipe)
        about = {name: value for name, value in recipe.document().items() if name in _FILM_KEYS}
        result = self(
            pictures,
            recipe.prompts or None,
            recipe.frames,
            loras=recipe.loras or None,
            fit=recipe.fit,
            sample=recipe.sample,
            schedule=recipe.schedule,
            size=recipe.size,
            resize=recipe.resize,
            loop=recipe.loop,
            seed=recipe.seed,
            progress=progress,
            write=write and (lambda frames, settings: write(frames, settings | about)),
        )
        result.path.settings |= about
        return replace(result, settings=result.settings | about)

    def __call__(
        self,
        images: Sequence[ImageSource],
        prompts: str | Sequence[str] | None = None,
        num_frames: int = NUM_FRAMES,
        *,
        loras: Sequence[str | os.PathLike[str] | Lora] | None = None,
        fit: FitConfig | Literal["recommended"] | None = "recommended",
        sample: SampleConfig | None = None,
        schedule: ScheduleConfig | None = None,
        size: Sequence[int] | None = None,
        resize: Literal["crop", "pad"] = "crop",
        loop: bool = False,
        seed: int = 0,
        progress: ProgressCallback | None = None,
        write: Writer | None = None,
    ) -> MorphResult:
        """Pictures to a film in one call: `prepare`, then `film`; see there for what each setting means."""
        sample = sample or self.spec.sample
        rows_before = self.backbone.unet_rows
        watch = Stopwatch(progress)
        _check_images(images)  # what cannot work is said before the slow part
        _check_frames(num_frames)
        stretches_and_gaps(num_frames, len(images), loop)
        sample.check_images(len(images))
        check_mode(self.backbone, sample.attention_mode)
        path = self.prepare(
            images,
            prompts or None,
            loras,
            fit,
            seed,
            size=size,
            resize=resize,
            steps=sample.steps,
            loop=loop,
            progress=watch,
        )
        seconds = {"load": self.load_seconds, **watch.seconds("fit", "invert")}
        result = self.film(path, num_frames, sample, schedule, progress, write)
        rows = self.backbone.unet_rows - rows_before
        return replace(result, seconds=seconds | result.seconds, unet_rows=rows)


#: What a recipe says of a film beyond what `prepare` and `film` know.
_FILM_KEYS = ("pictures", "picture_hashes", "loras", "lora_hashes", "fps", "ping_pong")


def _name(image: ImageSource, k: int) -> str:
    """A picture's name as it goes into a film: without its folder."""
    return Path(image).name if isinstance(image, (str, os.PathLike)) else f"image {k}"


def _check_images(images: Any) -> None:
    if isinstance(images, (str, os.PathLike, Image.Image)) or not hasattr(images, "__len__") or len(images) < 2:
        raise ConfigError("a morph needs at least two images; give a list of two or more.")


def _check_frames(num_frames: Any) -> None:
    if isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 2:
        raise ConfigError(f"frames is {num_frames!r}, but must be a whole number of at least 2.")


def _one_each(prompts: str | Sequence[str] | None, count: int) -> list[str]:
    if prompts is None or isinstance(prompts, str):
        return [prompts or ""] * count
    if len(prompts) not in (1, count):
        raise ConfigError(f"{len(prompts)} prompts were given for {count} images; give one for all, one each, or none.")
    return [prompt or "" for prompt in prompts] * (count if len(prompts) == 1 else 1)
