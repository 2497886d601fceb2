"""The settings on the page: all of `web_settings`, each with a line that says when to touch it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from ..config import FitConfig, SampleConfig
from ..models.catalog import CATALOG, cached_models
from .settings import MAX_FRAMES, Settings


def models(typed: bool) -> list[tuple[str, str]]:
    """(label, name) of the models to choose from; typed: also those that would be downloaded first."""
    cached, found = cached_models(), []
    for name, spec in CATALOG.items():
        here = Path(spec.source).is_dir() or spec.source in cached
        if here or typed:
            found.append((f"{name}: {spec.about}{'' if here else ' (downloads some GB first)'}", name))
    known = {spec.source for spec in CATALOG.values()}
    return found + [(f"{name} ({about})", name) for name, about in cached.items() if name not in known]


def settings_panel(typed_models: bool, run: Callable[[], None]) -> tuple[dict[str, Any], gr.File, gr.File]:
    """All settings by name, those that few need folded away below the button that `run` makes; LoRA files; a path file.

    Each says in one line when to touch it.
    """
    d, fit = Settings(), FitConfig()
    parts: dict[str, Any] = {}

    def add(name: str, part: Any) -> None:
        part.elem_id = name
        parts[name] = part

    def optional(name: str, label: str, placeholder: str, info: str) -> None:
        add(name, gr.Textbox("", label=label, placeholder=placeholder, info=info, max_lines=1))

    own = "Empty: the model's own."
    gr.HTML("<h2>2. Film</h2>")
    with gr.Row(elem_classes="pair"):
        add(
            "frames",
            gr.Slider(2, MAX_FRAMES, d.frames, step=1, label="Frames", info="More is smoother, and longer."),
        )
        add("fps", gr.Slider(1, 60, d.fps, step=1, label="Frames a second", info="More is faster, and shorter."))
    with gr.Row(elem_classes="pair"):
        add("loop", gr.Checkbox(d.loop, label="Loop", info="Leads back to the first picture."))
        add("ping_pong", gr.Checkbox(d.ping_pong, label="Ping-pong", info="Plays forwards, then backwards."))
    run()
    with gr.Column(elem_id="more"):
        with gr.Accordion("Model and size", open=False):
            add(
                "model",
                gr.Dropdown(
                    models(typed_models),
                    value=d.model,
                    label="Model",
                    allow_custom_value=typed_models,
                    info="The bundled one knows emoji. For photographs take a Stable Diffusion model"
                    + (", or type a hub id or a folder." if typed_models else "."),
                ),
            )
            with gr.Row(elem_classes="pair"):
                add("size", gr.Textbox(d.size, label="Size", placeholder="512x512", max_lines=1, info=own))
                add(
                    "resize",
                    gr.Radio(
                        [("Crop", "crop"), ("Pad with white", "pad")],
                        value=d.resize,
                        label="Other shapes",
                        info="Pad when nothing may be cut off.",
                    ),
                )
            add("seed", gr.Number(d.seed, label="Seed", precision=0, info="Another number, another film."))
        with gr.Accordion("Learning the pictures (LoRA)", open=False):
            add(
                "no_lora",
                gr.Checkbox(d.no_lora, label="Quick preview", info="To see a rough film soon: learns nothing."),
            )
            # Text, as a number field cannot be left empty.
            with gr.Row(elem_classes="pair"):
                optional("lora_steps", "LoRA steps", str(fit.steps), f"More when the ends lack detail. {own}")
                optional("lora_rank", "LoRA rank", str(fit.rank), f"More for crowded pictures. {own}")
            with gr.Row(elem_classes="pair"):
                optional("lora_lr", "LoRA rate", f"{fit.learning_rate:g}", f"Less when frames break up. {own}")
                optional(
                    "fix_lora", "Fix the LoRA at", "interpolated", "0 keeps to the first picture's manner throughout."
                )
        with gr.Accordion("Making the frames", open=False):
            with gr.Row(elem_classes="pair"):
                optional("steps", "Steps", str(SampleConfig().steps), f"Fewer to try things out. {own}")
                add(
                    "attention_lambda",
                    gr.Slider(
                        0,
                        1,
                        d.attention_lambda,
                        step=0.05,
                        label="Attention λ",
                        info="More when frames flicker, 0 is off.",
                    ),
                )
            with gr.Row(elem_classes="pair"):
                add("adain", gr.Checkbox(d.adain, label="Match colours (AdaIN)", info="Off when colours look dull."))
                add(
                    "reschedule",
                    gr.Checkbox(
                        d.reschedule, label="Even speed (reschedule)", info="Off when it should follow the positions."
                    ),
                )
            add(
                "guidance",
                gr.Slider(
                    1, 15, d.guidance, step=0.5, label="Guidance", info="More to heed the prompts, in twice the time."
                ),
            )
        return ({name: parts[name] for name in Settings.__dataclass_fields__}, *_saved_work())


def _saved_work() -> tuple[gr.File, gr.File]:
    """Files of earlier runs: LoRAs, and a path."""
    with gr.Accordion("Start from saved work", open=False):
        loras = gr.File(
            label="LoRA files, one for each picture: nothing has to be learnt then",
            file_count="multiple",
            file_types=[".safetensors"],
            height=110,
            elem_id="loras",
        )
        path = gr.File(label="A path file: needs no pictures", file_types=[".morph"], height=110, elem_id="path")
    return loras, path
