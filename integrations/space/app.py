"""A page for Hugging Face Spaces: pictures in, a film out. On ZeroGPU it borrows a GPU for each film.

The full page, with its slider and saved work, is `diffmorpher web`; that keeps prepared paths in memory, and a borrowed GPU
keeps nothing.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

try:
    import spaces  # before torch: on ZeroGPU it makes a GPU seem to be there
except ImportError:
    spaces = None

import gradio as gr
from PIL import Image

from diffmorpher import Morpher, Recipe
from diffmorpher.errors import ConfigError
from diffmorpher.files.pictures import load_image
from diffmorpher.settings import BY_NAME
from diffmorpher.web.jobs import explain
from diffmorpher.web.settings import MAX_PICTURES, MOST, chosen

#: Another model is set among the Space's variables: a hub id or a name that `diffmorpher info` lists.
MODEL = os.environ.get("DIFFMORPHER_MODEL", "mini")
#: Seconds that a film may take on a borrowed GPU, and that it can be watched.
GPU_SECONDS, KEPT_SECONDS = 120, 3600
FILMS = Path(tempfile.mkdtemp(prefix="films-"))

morpher = Morpher.from_pretrained(MODEL)


def on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have it run on a borrowed GPU, where `spaces` is there; elsewhere it runs on what this machine has."""
    return function if spaces is None else spaces.GPU(duration=GPU_SECONDS)(function)


@on_gpu
def film(recipe: Recipe, pictures: list[Image.Image], progress: gr.Progress) -> bytes:
    """The film as mp4. It crosses to another process and back, so it takes and gives nothing that cannot."""
    result = morpher.make(recipe, pictures, lambda stage, done, total: progress((done, total), desc=stage))
    with tempfile.TemporaryDirectory() as folder:
        return result.save(Path(folder) / "film.mp4").read_bytes()


def morph(
    files: list[str],
    prompts: str,
    frames: float,
    fps: float,
    loop: bool,
    preview: bool,
    seed: float,
    progress: gr.Progress = gr.Progress(),  # noqa: B008 (where gradio looks for it)
) -> str:
    """A film of two pictures or more; prompts one a line: one for all, one each, or none."""
    try:
        recipe = asked(
            files or [], prompts, frames=frames, fps=fps, loop=loop, seed=seed, preset="preview" if preview else ""
        )
        made = film(recipe, [load_image(file) for file in files], progress)
    except Exception as error:
        raise gr.Error(explain(error), print_exception=False) from error
    for old in FILMS.iterdir():
        if time.time() - old.stat().st_mtime > KEPT_SECONDS:
            old.unlink(missing_ok=True)
    file = FILMS / f"morph-{secrets.token_urlsafe(8)}.mp4"
    file.write_bytes(made)
    return str(file)


def asked(files: list[str], prompts: str, **settings: Any) -> Recipe:
    """The recipe of what was chosen, with the model's own settings. Raises `ConfigError`."""
    if len(files) > MAX_PICTURES:
        raise ConfigError(f"{len(files)} pictures are too many for one film here: take at most {MAX_PICTURES}.")
    said = tuple(line.strip() for line in prompts.splitlines() if line.strip())
    recipe = replace(chosen({"model": MODEL} | settings), pictures=tuple(files), prompts=said)
    recipe.check()
    return recipe


def widget(kind: Any, name: str, **more: Any) -> Any:
    """A field of the page, called and explained as everywhere else."""
    return kind(label=BY_NAME[name].label, info=BY_NAME[name].help, **more)


with gr.Blocks(title="DiffMorpher", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
    gr.Markdown("# DiffMorpher\nTwo pictures or more go in; a film comes out in which one turns into the other.")
    with gr.Row():
        with gr.Column():
            pictures = gr.File(label="Pictures, in order", file_count="multiple", file_types=["image"])
            prompts = gr.Textbox(label="What they show", info="One line for all, or one for each.", lines=2)
            frames = widget(gr.Slider, "frames", minimum=2, maximum=MOST["frames"], value=Recipe().frames, step=1)
            fps = widget(gr.Slider, "fps", minimum=1, maximum=MOST["fps"], value=Recipe().fps, step=1)
            loop = widget(gr.Checkbox, "loop")
            preview = gr.Checkbox(label=BY_NAME["preview"].label, info="A rough film soon.")
            seed = widget(gr.Number, "seed", value=0, precision=0)
            button = gr.Button("Morph", variant="primary")
        result = gr.Video(label="Film", autoplay=True, loop=True)
    button.click(morph, [pictures, prompts, frames, fps, loop, preview, seed], result, api_name="morph")

if __name__ == "__main__":
    page.launch(max_file_size="25mb")
