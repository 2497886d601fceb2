"""`Morpher`: a model, and the way from pictures to a film."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from .arguments import (
    Styling,
    check,
    check_frames,
    check_images,
    check_loading,
    check_pace,
    fit_config,
    name_each,
    one_each,
    read_loras,
    style_list,
    whole_seed,
)
from .config import NUM_FRAMES, FitConfig, SampleConfig, ScheduleConfig, stretches_and_gaps
from .errors import ConfigError
from .files.cache import NOT_KEPT, Cache, Kept
from .files.loras import Lora
from .files.pictures import ImageSource, image_hash
from .framing import framed, warn_of, warn_of_photographs, working_size
from .gather import gather
from .inputs import encode, fitted, given_bank
from .method.attention import check_mode
from .method.lora import LoraBank
from .method.style import Styles
from .models.catalog import ModelSpec, bare_name, family_spec
from .models.loading import as_backbone, choose_device, load_pipeline
from .models.memory import explained
from .models.single_file import Prediction
from .models.turns import in_turn
from .path import MorphPath
from .progress import ProgressCallback, Stopwatch
from .recipe import VERSION, Recipe
from .result import MorphResult
from .stream import FrameStream, Helpers

Resize = Literal["crop", "pad", "blur"]
#: Takes a film's frames, as they are made, and its settings.
Writer = Callable[[Iterable[Image.Image], dict[str, Any]], object]


class Morpher:
    """A diffusion model that morphs.

    pipe: a diffusers pipeline of a family that is supported (docs/models.md), on the device and dtype to be used; left as
    it was found. Use `Morpher.from_pretrained` to load one by name. Raises `ModelError` for another kind.
    low_memory: the same films in less memory and more time: images are encoded and fitted one by one, with gradient
    checkpointing, and frames sampled two at a time. (`from_pretrained` also keeps idle networks off the GPU; for a pipeline of
    your own, `pipe.enable_model_cpu_offload()` does.)
    tf32: on a GPU, let float32 products be rounded to TF32: faster, less exact.
    cache: where fits (half-finished ones too), inversions and frames that were made before are found, and go to; None does
    without.
    """

    @in_turn
    def __init__(
        self,
        pipe: Any,
        *,
        spec: ModelSpec | None = None,
        name: str = "",
        low_memory: bool = False,
        tf32: bool = False,
        cache: Cache | None = None,
    ) -> None:
        self.backbone = as_backbone(pipe, name, low_memory, tf32)
        self.spec = spec or family_spec(self.backbone.network_part)
        self.cache = cache
        self.load_seconds = 0.0
        self._asked: dict[str, str] = {}  # of what the model would not say by itself

    @classmethod
    @in_turn
    def from_pretrained(
        cls,
        model: str = "mini",
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        low_memory: bool = False,
        tf32: bool = False,
        prediction: Prediction | None = None,
        vae: str | os.PathLike[str] | None = None,
        cache: Cache | None = None,
    ) -> Morpher:
        """Load a model: a name of the catalog ("mini" is bundled), a hub id, a folder, or a .safetensors file.

        device: None takes the fastest present; dtype: None takes float32, on CUDA a 16-bit one, and bfloat16 for more than
        500 M parameters on a CPU that multiplies in it (AVX-512 BF16, AMX). low_memory, tf32, cache: as in the class.
        prediction: "epsilon" or "v", for a file that does not say what its U-Net predicts. vae: a folder or .safetensors file
        with an autoencoder in place of the model's own. Raises `ModelError`.
        """
        started = time.perf_counter()
        check_loading(vae, cache)
        on = choose_device(device)
        pipe, spec = load_pipeline(
            str(model), on, dtype, low_memory, prediction, None if vae is None else os.fspath(vae)
        )
        morpher = cls(pipe, spec=spec, name=bare_name(str(model)), low_memory=low_memory, tf32=tf32, cache=cache)
        morpher._asked |= {"prediction": prediction} if prediction else {}
        morpher._asked |= {} if vae is None else {"vae": Path(vae).name}
        morpher.load_seconds = time.perf_counter() - started
        return morpher

    @property
    def pipe(self) -> Any:
        """The diffusers pipeline."""
        return self.backbone.pipe

    # ---- the slow part

    @in_turn
    def prepare(
        self,
        images: Sequence[ImageSource],
        prompts: str | Sequence[str] | None = None,
        loras: Sequence[str | os.PathLike[str] | Lora] | None = None,
        fit: FitConfig | Literal["recommended"] | None = "recommended",
        seed: int = 0,
        *,
        size: Sequence[int] | str | None = None,
        resize: Resize = "crop",
        focus: str | Sequence[str] = (),
        styles: Styling = (),
        transparent: bool = False,
        steps: int | None = None,
        loop: bool = False,
        progress: ProgressCallback | None = None,
    ) -> MorphPath:
        """Encode the images, fit a LoRA to each, invert them: once, for any number of frames after.

        images: two or more. prompts: one for all, one each, or none. loras: one file, "FILE:WEIGHT" or `Lora` for all or one
        each, in place of fitting. fit: "recommended" takes what suits the model (`models.catalog`); None is no LoRA.
        size: (width, height), multiples of the VAE's factor, or a shape such as "16:9"; None takes the model's. resize: "crop"
        fills that size and cuts what stands over, "pad" shows all of each image on white, "blur" on itself, enlarged and
        blurred. focus: what a crop has in its middle, "center", "auto" or "X,Y" in shares of width and height; one for all, one
        each, or none. styles: LoRAs of others that act on every frame and on the fit. transparent: frames are RGBA, with the
        images' transparency, which is white else. steps: of the inversion; None takes the model's. loop: a path that returns to
        the first image. Raises `ConfigError`, `ImageError`, `LoraError`.
        """
        check_images(images)
        check(progress=progress, loop=loop)
        seed, size = whole_seed(seed), self._checked_size(size)
        sample = self.spec.sample if steps is None else replace(self.spec.sample, steps=steps)
        texts = one_each(prompts, len(images))
        shown = framed(images, size, resize, focus, transparent)
        warn_of_photographs(shown.whole, name_each(images, "image"), self.spec.photographs, stacklevel=3)
        hashes = [image_hash(picture) for picture in shown.pictures]
        settings: dict[str, Any] = {
            "pictures": name_each(images, "image"),
            "picture_hashes": [image_hash(image) for image in shown.whole],
            "images": hashes,
            "prompts": texts,
            "size": list(size),
            "resize": resize,
            **({"focus": list(shown.focus)} if any(shown.focus) else {}),
            "transparent": transparent,
            "seed": seed,
            "loop": loop,
        }
        if given := style_list(styles):
            settings["styles"] = name_each(given, "style")
        acting = Styles.of(*read_loras(given, text=True), self.backbone)
        with acting.attached(self.backbone):
            mean, std, conditioning = encode(self.backbone, shown.pictures, texts)

        bank: LoraBank | None = None
        if loras is not None:
            bank, names = given_bank(self.backbone, loras, hashes)
            settings["loras"] = [Path(name).name for name in names]
        elif fit is not None:
            config = fit_config(fit, self.spec.fit)
            with acting.attached(self.backbone):
                kept = self._kept(acting)
                bank = fitted(self.backbone, mean, std, conditioning, config, seed, progress, texts, hashes, kept)
            settings["fit"] = asdict(config)
        else:
            settings["fit"] = False

        path = MorphPath(
            self.backbone, mean, conditioning, bank, texts, loop, settings, sample, styles=acting, opacity=shown.opacity,
            cache=self.cache,
        )  # fmt: skip
        path.noises_at(sample.steps, progress)
        return path

    def fit(
        self,
        image: ImageSource,
        prompt: str = "",
        fit: FitConfig | Literal["recommended"] = "recommended",
        seed: int = 0,
        **options: Any,
    ) -> Lora:
        """Fit one image's LoRA, the same as `prepare` would, to be written with `save_lora` and passed in `loras` later.

        options: size, resize, focus, styles and progress, as in `prepare`.
        """
        return self.fit_all([image], prompt, fit, seed, **options)[0]

    @in_turn
    def fit_all(
        self,
        images: Sequence[ImageSource],
        prompts: str | Sequence[str] | None = None,
        fit: FitConfig | Literal["recommended"] = "recommended",
        seed: int = 0,
        *,
        size: Sequence[int] | str | None = None,
        resize: Resize = "crop",
        focus: str | Sequence[str] = (),
        styles: Styling = (),
        progress: ProgressCallback | None = None,
    ) -> list[Lora]:
        """Fit one LoRA to each of one or more images, all in one batch, as `prepare` does."""
        check_images(images, least=1)
        check(progress=progress)
        seed, size, texts = whole_seed(seed), self._checked_size(size), one_each(prompts, len(images))
        pictures = framed(images, size, resize, focus).pictures
        hashes = [image_hash(picture) for picture in pictures]
        acting = Styles.of(*read_loras(style_list(styles), text=True), self.backbone)
        with acting.attached(self.backbone):
            mean, std, conditioning = encode(self.backbone, pictures, texts)
            config = fit_config(fit, self.spec.fit)
            kept = self._kept(acting)
            bank = fitted(self.backbone, mean, std, conditioning, config, seed, progress, texts, hashes, kept)
        return [bank.lora(k) for k in range(len(images))]

    def _kept(self, styles: Styles) -> Kept:
        return Kept.of(self.cache, self.backbone.identity(), styles.tensors) if self.cache else NOT_KEPT

    def working_size(self, size: Sequence[int] | str | None = None) -> tuple[int, int]:
        """(width, height) in pixels that the model can work at; None takes its own, a shape the nearest that suits it."""
        return working_size(self.backbone, self.own_size if size is None or isinstance(size, str) else (0, 0), size)

    @property
    def own_size(self) -> tuple[int, int]:
        """(width, height) that the model was made for."""
        width, height = self.spec.size or self.backbone.native_size
        return width, height

    def _checked_size(self, size: Sequence[int] | str | None) -> tuple[int, int]:
        """`working_size`, with a warning where that is far from what the model was made for."""
        checked = self.working_size(size)
        warn_of(checked, self.own_size, stacklevel=4)  # whoever called `prepare` or `fit_all`
        return checked

    # ---- the film

    def film(
        self,
        path: MorphPath,
        num_frames: int = NUM_FRAMES,
        sample: SampleConfig | None = None,
        schedule: ScheduleConfig | None = None,
        progress: ProgressCallback | None = None,
        write: Writer | None = None,
        pace: Sequence[float] | None = None,
        helpers: Helpers | None = None,
    ) -> MorphResult:
        """Sample a prepared path at `num_frames` positions, evenly spaced by perceptual distance.

        In a loop the last frame leads back to the first, which is not repeated. write: a function that is given the frames
        as they are made, and the film's settings; they are then not kept in the result, so that a film of any length needs no
        more memory than a short one. pace: how much of the way is to be covered between each frame and the next, in
        proportion, in place of equal parts. helpers: others who make frames too. Raises `ConfigError` if the frames are fewer
        than the images.
        """
        if not isinstance(path, MorphPath):
            raise ConfigError(f"the path is {path!r:.100}, but must be a MorphPath, as prepare() gives it.")
        check(sample, schedule, progress, write)
        sample, schedule = sample or path.sample_config, schedule or ScheduleConfig()
        check_frames(num_frames)
        check_pace(pace, stretches_and_gaps(num_frames, path.num_images, path.loop)[1])
        backbone = path.backbone
        rows_before = backbone.unet_rows
        stream = FrameStream(path, num_frames, sample, schedule, progress, pace, helpers)
        with explained(backbone, "space the frames", path.cells):
            stream.plan()
        settings = {
            "recipe": VERSION,
            "diffmorpher": version("diffmorpher"),
            "model": backbone.name,
            "device": str(backbone.device),
            "dtype": str(backbone.network.dtype).removeprefix("torch."),
            "low_memory": backbone.low_memory,
            "tf32": backbone.tf32,
            **self._asked,
            **path.settings,
            "frames": num_frames,
            "sample": asdict(sample),
            "schedule": asdict(schedule),
            "alphas": stream.positions,
        }
        frames: list[Image.Image] = []
        with explained(backbone, "make the film", path.cells):
            if write is None:
                frames += stream
            else:
                write(stream, settings)
        rows = backbone.unet_rows - rows_before
        made = (stream.positions, stream.distances, stream.seconds, rows, settings, path)
        return MorphResult(frames, *made, stream.distances_before, stream.ghosts)

    def make(
        self,
        recipe: Recipe,
        pictures: Sequence[Image.Image] | None = None,
        progress: ProgressCallback | None = None,
        write: Writer | None = None,
        helpers: Helpers | None = None,
    ) -> MorphResult:
        """The film of a recipe, whose model, device and dtype are this Morpher's affair.

        pictures: the recipe's, where they are in memory already (by `gather`); None reads them. write, helpers: as in `film`.
        Raises `RecipeError` for pictures that are missing or other ones.
        """
        if pictures is None:
            recipe, pictures = gather(recipe)
        count = recipe.frame_count(len(pictures))
        sound = {"audio": recipe.audio} if recipe.audio else {}  # where it lies, which no file says
        result = self(
            pictures,
            num_frames=count,
            **recipe.options(),
            progress=progress,
            write=write and (lambda frames, settings: write(frames, recipe.about_film(settings) | sound)),
            pace=recipe.pace(count),
            helpers=helpers,
        )
        result.path.settings = recipe.about_film(result.path.settings)
        return replace(result, settings=recipe.about_film(result.settings) | sound)

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
        size: Sequence[int] | str | None = None,
        resize: Resize = "crop",
        focus: str | Sequence[str] = (),
        styles: Styling = (),
        transparent: bool = False,
        loop: bool = False,
        seed: int = 0,
        progress: ProgressCallback | None = None,
        write: Writer | None = None,
        pace: Sequence[float] | None = None,
        helpers: Helpers | None = None,
    ) -> MorphResult:
        """Pictures to a film in one call: `prepare`, then `film`; see there for what each setting means."""
        check(sample, schedule, progress, write, loop)  # what cannot work is said before the slow part
        sample = sample or self.spec.sample
        rows_before = self.backbone.unet_rows
        watch = Stopwatch(progress)
        check_images(images)
        check_frames(num_frames)
        check_pace(pace, stretches_and_gaps(num_frames, len(images), loop)[1])
        (schedule or ScheduleConfig()).check_images(len(images), loop)
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
            focus=focus,
            styles=styles,
            transparent=transparent,
            steps=sample.steps,
            loop=loop,
            progress=watch,
        )
        seconds = {"load": self.load_seconds, **watch.seconds("fit", "invert")}
        result = self.film(path, num_frames, sample, schedule, progress, write, pace, helpers)
        rows = self.backbone.unet_rows - rows_before
        return replace(result, seconds=seconds | result.seconds, unet_rows=rows)
