"""DiffMorpher as a community pipeline of diffusers: pictures in, the frames of a morph out.

    pipe = DiffusionPipeline.from_pretrained(model, custom_pipeline="<folder of this file>", trust_remote_code=True)
    frames = pipe(["cat.png", "dog.png"], prompt=["a cat", "a dog"]).frames

Thin over the package `diffmorpher`, which does all the work: pip install diffmorpher.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image

from diffmorpher import Cancelled, FitConfig, Morpher, MorphResult, SampleConfig, ScheduleConfig
from diffmorpher.models.catalog import bare_name

#: Of each network, the text-to-image pipeline that it belongs to.
PIPELINES = {
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "FluxTransformer2DModel": "FluxPipeline",
    "Flux2Transformer2DModel": "Flux2KleinPipeline",
    "ZImageTransformer2DModel": "ZImagePipeline",
    "QwenImageTransformer2DModel": "QwenImagePipeline",
}


@dataclass
class DiffMorpherPipelineOutput(BaseOutput):
    """A morph.

    frames: PIL images, an array (n, H, W, 3) or a tensor (n, 3, H, W) in [0, 1], as `output_type` says. alphas: positions, 0
    at the first picture and K - 1 at the last. distances: perceptual, from each frame to the next. result: all that the
    library knows of the film; `result.save("film.mp4")` writes it with its recipe.
    """

    frames: Any
    alphas: list[float]
    distances: list[float]
    result: MorphResult


class DiffMorpherPipeline(DiffusionPipeline):
    """Morphs between two or more pictures, with a model of any family that `diffmorpher` knows.

    The parts are those of the model's own text-to-image pipeline; it has a `unet` or a `transformer`.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->unet->transformer->vae"
    _optional_components = [  # noqa: RUF012 (diffusers reads a list)
        "unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3",
    ]  # fmt: skip

    def __init__(
        self,
        vae: Any,
        scheduler: Any,
        unet: Any = None,
        transformer: Any = None,
        text_encoder: Any = None,
        text_encoder_2: Any = None,
        text_encoder_3: Any = None,
        tokenizer: Any = None,
        tokenizer_2: Any = None,
        tokenizer_3: Any = None,
        force_zeros_for_empty_prompt: bool = True,
        is_distilled: bool = False,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae, scheduler=scheduler, unet=unet, transformer=transformer,
            text_encoder=text_encoder, text_encoder_2=text_encoder_2, text_encoder_3=text_encoder_3,
            tokenizer=tokenizer, tokenizer_2=tokenizer_2, tokenizer_3=tokenizer_3,
        )  # fmt: skip
        self.register_to_config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt, is_distilled=is_distilled)
        self._interrupt = False

    @property
    def interrupt(self) -> bool:
        """Whether a callback asked for the end, by `pipeline._interrupt = True`."""
        return self._interrupt

    def __call__(
        self,
        image: Sequence[Any],
        prompt: str | Sequence[str] | None = None,
        num_frames: int = 16,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        output_type: Literal["pil", "np", "pt"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], Any] | None = None,
        *,
        fit: FitConfig | Literal["recommended"] | None = "recommended",
        sample: SampleConfig | None = None,
        schedule: ScheduleConfig | None = None,
        loras: Sequence[Any] | None = None,
        resize: Literal["crop", "pad", "blur"] = "crop",
        focus: str | Sequence[str] = (),
        loop: bool = False,
    ) -> DiffMorpherPipelineOutput | tuple[Any]:
        """The frames of a morph through `image`, two pictures or more: paths, PIL images or uint8 arrays.

        prompt: one for all, one each, or none. height, width: both or neither; None takes the model's. num_inference_steps,
        guidance_scale: go before what `sample` says. generator: the seed that it was made with is the film's seed, however much
        was drawn from it since; None is seed 0. callback_on_step_end: called as (pipeline, step, timestep, {"stage", "total"}):
        `step` counts through the whole film, `timestep` within the stage ("fit", "invert", "schedule", "sample"); what it gives
        back is not used, and `pipeline._interrupt = True` ends the run with `diffmorpher.Cancelled`. The rest is as in
        `diffmorpher.Morpher`. Raises `diffmorpher.UserError` for what cannot be made.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f'output_type is {output_type!r}, but must be "pil", "np" or "pt".')
        if (height is None) != (width is None):
            raise ValueError(f"height is {height} and width {width}: give both, or neither.")
        self._interrupt = False
        morpher = Morpher(self._family_pipeline(), name=bare_name(str(self.name_or_path or "")))
        given = {"steps": num_inference_steps, "guidance_scale": guidance_scale}
        changes = {name: value for name, value in given.items() if value is not None}
        steps = _Steps(self, callback_on_step_end)
        try:
            result = morpher(
                image,
                prompt,
                num_frames,
                loras=loras,
                fit=fit,
                sample=replace(sample or morpher.spec.sample, **changes),
                schedule=schedule,
                size=None if width is None else (width, height),
                resize=resize,
                focus=focus,
                loop=loop,
                seed=0 if generator is None else generator.initial_seed() % 2**63,
                progress=steps,
            )
        finally:
            steps.close()
            self.maybe_free_model_hooks()
        frames = _as_type(result.frames, output_type)
        if not return_dict:
            return (frames,)
        return DiffMorpherPipelineOutput(frames=frames, alphas=result.alphas, distances=result.distances, result=result)

    def _family_pipeline(self) -> Any:
        """The model's own text-to-image pipeline of the same parts: it knows how its prompts are encoded."""
        if self.unet is not None:
            name = "StableDiffusionPipeline" if self.text_encoder_2 is None else "StableDiffusionXLPipeline"
        else:
            kind = type(self.transformer).__name__
            if kind not in PIPELINES:
                raise ValueError(f"the network is a {kind}, but must be a U-Net or one of {', '.join(PIPELINES)}.")
            name = PIPELINES[kind]
        family = getattr(diffusers, name)
        plain = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        plain |= {name: self.config[name] for name in ("force_zeros_for_empty_prompt", "is_distilled")}
        parts = plain | self.components
        return family(**{name: parts[name] for name in inspect.signature(family).parameters if name in parts})


class _Steps:
    """A progress callback of the library that draws diffusers' bar, a stage each, and calls diffusers' callback."""

    def __init__(self, pipe: DiffMorpherPipeline, callback: Callable[..., Any] | None) -> None:
        self.pipe, self.callback = pipe, callback
        self.step, self.stage, self.bar = 0, "", None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self.stage:
            self.close()
            self.stage, self.bar = stage, self.pipe.progress_bar(total=total)
            self.bar.set_description(stage)
        self.bar.total = total  # frames are added as gaps are found
        self.bar.update(done - self.bar.n)
        if self.callback is not None:
            self.callback(self.pipe, self.step, done, {"stage": stage, "total": total})
        self.step += 1
        if self.pipe.interrupt:
            raise Cancelled("the callback asked for the end.")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _as_type(frames: list[Image.Image], output_type: str) -> Any:
    if output_type == "pil":
        return frames
    pixels = np.stack([np.asarray(frame, np.float32) for frame in frames]) / 255
    return pixels if output_type == "np" else torch.from_numpy(pixels).permute(0, 3, 1, 2)
