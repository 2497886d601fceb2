"""The nodes. Each is thin over `diffmorpher`: ComfyUI's values in, one call of the library, its values out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import comfy.model_management
import folder_paths
from comfy_api.latest import ComfyExtension, io

from diffmorpher import Morpher, MorphPath
from diffmorpher.models.catalog import CATALOG

from .host import learning, new_path_file, path_files, progress, to_images, to_pil
from .widgets import ALL, FILM, FIT, recipe, widgets

MorphModel, MorphPathType = io.Custom("MORPH_MODEL"), io.Custom("MORPH_PATH")
CATEGORY = "DiffMorpher"
#: Models that are in use somewhere in a graph, by how they were loaded: two loaders that ask for the same share one.
_LOADED: WeakValueDictionary[tuple[Any, ...], Morpher] = WeakValueDictionary()


@dataclass(frozen=True)
class Prepared:
    """A MORPH_PATH: the prepared way between pictures, and the model that made it."""

    morpher: Morpher
    path: MorphPath


class LoadMorphModel(io.ComfyNode):
    """A model of the catalog, of ComfyUI's checkpoints, of the hub, or of a folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffMorpherLoadModel",
            display_name="Load Morph Model",
            category=CATEGORY,
            description="Loads a model to morph with: one that is known by name, or one of your checkpoints.",
            inputs=[
                io.Combo.Input(
                    "model", options=[*CATALOG, *folder_paths.get_filename_list("checkpoints")], default="mini",
                    tooltip="mini is bundled with diffmorpher; other names are fetched from the hub once.",
                ),
                io.String.Input("other", default="", tooltip="In place of the above: a hub id (owner/name), or a folder."),
                io.Combo.Input("dtype", options=["auto", "float32", "bfloat16", "float16"], default="auto"),
                io.Boolean.Input("low_memory", default=False, tooltip="The same film in less memory and more time."),
                io.Combo.Input(
                    "prediction", options=["auto", "epsilon", "v"], default="auto", tooltip="For files that do not say.",
                ),
            ],
            outputs=[MorphModel.Output(display_name="model")],
        )  # fmt: skip

    @classmethod
    @learning
    def execute(cls, model: str, other: str, dtype: str, low_memory: bool, prediction: str) -> io.NodeOutput:
        source = other.strip() or (
            model if model in CATALOG else folder_paths.get_full_path_or_raise("checkpoints", model)
        )
        device = comfy.model_management.get_torch_device()
        asked = (source, str(device), dtype, low_memory, prediction)
        morpher = _LOADED.get(asked)
        if morpher is None:
            comfy.model_management.unload_all_models()  # what ComfyUI holds on the GPU; it loads it again when it needs it
            morpher = Morpher.from_pretrained(
                source,
                device=device,
                dtype=None if dtype == "auto" else dtype,
                low_memory=low_memory,
                prediction=None if prediction == "auto" else prediction,
            )
            _LOADED[asked] = morpher
        return io.NodeOutput(morpher)


class FitPictures(io.ComfyNode):
    """The slow part, once; ComfyUI keeps its result as long as these inputs stay."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffMorpherFit",
            display_name="Fit Pictures",
            category=CATEGORY,
            description="Learns the pictures of a batch, in order. Slow, and done once: frames are then quick.",
            inputs=[MorphModel.Input("model"), io.Image.Input("images"), *widgets(FIT)],
            outputs=[MorphPathType.Output(display_name="path")],
        )

    @classmethod
    @learning
    def execute(cls, model: Morpher, images: Any, **values: Any) -> io.NodeOutput:
        pictures = to_pil(images)
        asked = recipe(model, len(pictures), values)
        path = model.prepare(
            pictures, asked.prompts or None, asked.loras or None, asked.fit, asked.seed, size=asked.size, resize=asked.resize,
            focus=asked.focus, styles=asked.styles, steps=asked.sample.steps, loop=asked.loop, progress=progress(),
        )  # fmt: skip
        return io.NodeOutput(Prepared(model, path))


class MorphFrames(io.ComfyNode):
    """A film of a prepared path."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffMorpherFrames",
            display_name="Morph Frames",
            category=CATEGORY,
            description="The frames of a film, evenly spaced to the eye.",
            inputs=[MorphPathType.Input("path"), *widgets(FILM)],
            outputs=_film_outputs(),
        )

    @classmethod
    @learning
    def execute(cls, path: Prepared, **values: Any) -> io.NodeOutput:
        asked = recipe(path.morpher, path.path.num_images, values, path.path.sample_config)
        return _film(path.morpher.film(path.path, asked.frames, asked.sample, asked.schedule, progress()))


class MorphFrameAt(io.ComfyNode):
    """One frame, wherever a slider stands."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffMorpherFrameAt",
            display_name="Morph Frame At",
            category=CATEGORY,
            description="One frame between two neighbouring pictures.",
            inputs=[
                MorphPathType.Input("path"),
                io.Float.Input(
                    "alpha", default=0.5, min=0.0, max=1.0, step=0.01, display_mode=io.NumberDisplay.slider,
                    tooltip="0 is the picture to start from, 1 the one after it.",
                ),
                io.Int.Input("start", default=0, min=0, max=9999, tooltip="The picture to start from; the first is 0."),
            ],
            outputs=[io.Image.Output(display_name="image")],
        )  # fmt: skip

    @classmethod
    @learning
    def execute(cls, path: Prepared, alpha: float, start: int) -> io.NodeOutput:
        return io.NodeOutput(to_images(path.path.sample([start + alpha], progress=progress())))


class Morph(io.ComfyNode):
    """All in one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffMorpherMorph",
            display_name="Morph",
            category=CATEGORY,
            description="A film that leads through the pictures of a batch, in order.",
            inputs=[MorphModel.Input("model"), io.Image.Input("images"), *widgets(ALL)],
            outputs=_film_outputs(),
        )

    @classmethod
    @learning
    def execute(cls, model: Morpher, images: Any, **values: Any) -> io.NodeOutput:
        pictures = to_pil(images)
        return _film(model.make(recipe(model, len(pictures), values), pictures, progress()))


class SaveMorphPath(io.ComfyNode):
    """A prepared path into a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffMorpherSavePath",
            display_name="Save Morph Path",
            category=CATEGORY,
            description="Keeps what was learnt of the pictures, in ComfyUI's output folder.",
            inputs=[MorphPathType.Input("path"), io.String.Input("filename_prefix", default="morphs/path")],
            outputs=[io.String.Output(display_name="file")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, path: Prepared, filename_prefix: str) -> io.NodeOutput:
        file = path.path.save(new_path_file(filename_prefix))
        return io.NodeOutput(str(file), ui={"text": (str(file),)})


class LoadMorphPath(io.ComfyNode):
    """A prepared path from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffMorpherLoadPath",
            display_name="Load Morph Path",
            category=CATEGORY,
            description="What was learnt of pictures before, by the same model.",
            inputs=[MorphModel.Input("model"), io.Combo.Input("file", options=list(path_files()))],
            outputs=[MorphPathType.Output(display_name="path")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **inputs: Any) -> Any:
        """Of the file as it is now: ComfyUI reads it again when it was written anew."""
        found = path_files().get(file)
        return (file, found.stat().st_mtime_ns) if found else file

    @classmethod
    @learning
    def execute(cls, model: Morpher, file: str) -> io.NodeOutput:
        found = path_files().get(file)
        if found is None:
            raise FileNotFoundError(f"there is no {file!r} in ComfyUI's output and input folders; save a path first.")
        return io.NodeOutput(Prepared(model, MorphPath.load(found, model)))


def _film_outputs() -> list[Any]:
    return [
        io.Image.Output(display_name="images"),
        io.Float.Output(
            display_name="alphas", is_output_list=True, tooltip="Each frame's position: 0 is the first picture."
        ),
        io.Float.Output(
            display_name="distances", is_output_list=True, tooltip="Perceptual, from each frame to the next."
        ),
    ]


def _film(result: Any) -> io.NodeOutput:
    return io.NodeOutput(to_images(result.frames), result.alphas, result.distances)


class DiffMorpherExtension(ComfyExtension):
    """The pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node."""
        return [LoadMorphModel, FitPictures, MorphFrames, MorphFrameAt, Morph, SaveMorphPath, LoadMorphPath]


async def comfy_entrypoint() -> DiffMorpherExtension:
    """What ComfyUI calls."""
    return DiffMorpherExtension()
