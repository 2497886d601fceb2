"""The settings on the page, made from their table, each with a line that says when to touch it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from ..files.films import FORMATS
from ..models.catalog import CATALOG, cached_models
from ..recipe import Recipe
from ..settings import BY_NAME, PRESETS, Setting
from .settings import LEAST_FPS, MOST, NAMES, shown


def models(typed: bool) -> list[tuple[str, str]]:
    """(label, name) of the models to choose from; typed: also those that would be downloaded first."""
    cached, found = cached_models(), []
    for name, spec in CATALOG.items():
        here = Path(spec.source).is_dir() or spec.source in cached
        if here or typed:
            found.append((f"{name}: {spec.about}{'' if here else ' (downloads some GB first)'}", name))
    known = {spec.source for spec in CATALOG.values()}
    return found + [(f"{name} ({about})", name) for name, about in cached.items() if name not in known]


#: (least, most, step) of the settings that have a slider, and the words for the choices of those that have them.
_SLIDERS = {
    "frames": (2, MOST["frames"], 1),
    "fps": (LEAST_FPS, MOST["fps"], 1),
    "attention_lambda": (0, 1, 0.05),
    "guidance": (1, MOST["guidance"], 0.5),
}
_CHOICES = {
    "resize": [("Crop", "crop"), ("Pad with white", "pad"), ("Pad with blur", "blur")],
    "ease": [("Even", "linear"), ("Slow start", "in"), ("Slow end", "out"), ("Both", "in-out")],
    "prediction": [("As the model says", ""), ("Epsilon", "epsilon"), ("v", "v")],
    "quality": [("Small files", "small"), ("Good", "good"), ("Best", "best")],
}
#: The folded sections below the button, and the pairs of fields in them.
_SECTIONS = {
    "Pacing and file": [["seconds", "hold"], ["stretch", "ease"], ["reverse", "transparent"], ["quality"]],
    "Model and size": [["model"], ["size", "resize"], ["focus", "seed"], ["prediction"]],
    "Learning the pictures (LoRA)": [["no_lora"], ["lora_steps", "lora_rank"], ["lora_lr", "fix_lora"]],
    "Making the frames": [["steps", "attention_lambda"], ["adain", "reschedule"], ["guidance"]],
}
_PLAIN = Recipe()


@dataclass(frozen=True)
class Panel:
    """The fields: settings by name, and files. film: whose settings fill the form; the notes say what a file does."""

    settings: dict[str, Any]
    audio: gr.File
    styles: gr.File
    weights: gr.Textbox
    loras: gr.File
    path: gr.File
    path_note: gr.HTML
    film: gr.File
    film_note: gr.HTML


def settings_panel(typed_models: bool, run: Callable[[], None]) -> Panel:
    """All settings, most folded away below the button that `run` makes."""
    parts: dict[str, Any] = {}

    def add(rows: list[list[str]]) -> None:
        for names in rows:
            with gr.Row(elem_classes="pair") if len(names) > 1 else nullcontext():
                for name in names:
                    parts[name] = _field(name, typed_models)

    gr.HTML("<h2>2. Film</h2>")
    add([["frames", "fps"], ["loop", "ping_pong"]])
    parts["preset"] = gr.Radio(
        [("As the model suggests", ""), *((BY_NAME[name].label, name) for name in reversed(PRESETS))],
        value="",
        label="Settings",
        info="Quick is rough: no LoRA, no even speed. As the paper is some four times the work.",
        elem_id="preset",
    )
    run()
    with gr.Column(elem_id="more"):
        for title, rows in _SECTIONS.items():
            with gr.Accordion(title, open=False):
                add(rows)
        with gr.Accordion("Sound", open=False):
            audio = gr.File(
                label="A sound under the film: wav, mp3, flac, ogg, m4a",
                file_types=["audio", ".m4a"],
                height=110,
                elem_id="audio",
            )
            add([["beat"]])
        with gr.Accordion("Style", open=False):
            styles = gr.File(
                label="LoRAs of others, which act on every frame",
                file_count="multiple",
                file_types=[".safetensors"],
                height=110,
                elem_id="styles",
            )
            weights = gr.Textbox(
                label="Their strengths",
                info="One for all, or one each, such as 0.8, 1.",
                placeholder="1",
                max_lines=1,
                elem_id="weights",
            )
        return Panel({name: parts[name] for name in NAMES}, audio, styles, weights, *_saved_work())


def placeholders(model: str, preset: str) -> dict[str, str]:
    """What an empty field stands for, by name, with that model and preset."""
    recipe = _PLAIN.changed(**({"model": model} if model else {}), **({preset: True} if preset in PRESETS else {}))
    fields = [name for name in NAMES if _is_text(name)]
    return {name: _stands_for(BY_NAME[name], recipe) for name in fields}


def _is_text(name: str) -> bool:
    plain = name in ("model", "preset", "seed") or BY_NAME[name].is_switch
    return not plain and name not in _SLIDERS and name not in _CHOICES


def _stands_for(each: Setting, recipe: Recipe) -> str:
    own = each.get(recipe)
    nothing = {"hold": "none", "focus": "center"}
    return each.unset or ("interpolated" if own is None else each.said(own) or nothing.get(each.name, ""))


def _field(name: str, typed_models: bool) -> Any:
    """The part of the page in which a setting is chosen."""
    each, value = BY_NAME[name], shown(BY_NAME[name], _PLAIN)
    common: dict[str, Any] = {"label": each.label, "info": each.help, "elem_id": name}
    if name == "model":
        about = "The bundled one knows emoji. For photographs take a Stable Diffusion model"
        common["info"] = about + (", or type a hub id or a folder." if typed_models else ".")
        return gr.Dropdown(models(typed_models), value=value, allow_custom_value=typed_models, **common)
    if each.is_switch:
        return gr.Checkbox(value, **common)
    if name in _SLIDERS:
        least, most, step = _SLIDERS[name]
        if name == "frames":
            common["info"] += f" At most {most} here; the command line takes more."
        return gr.Slider(least, most, value, step=step, **common)
    if name in _CHOICES:
        return gr.Radio(_CHOICES[name], value=value, **common)
    if name == "seed":
        return gr.Number(value, precision=0, **common)
    if name == "focus":
        common["info"] = (
            "What a crop has in its middle: center, or X,Y in shares such as 0.5,0.3; one for all, or one each with ; between."
        )
    # Text, as a number field cannot be left empty.
    common["info"] += " Empty: the model's own." if each.is_model_own else ""
    return gr.Textbox(value, placeholder=_stands_for(each, _PLAIN), max_lines=1, **common)


def _saved_work() -> tuple[gr.File, gr.File, gr.HTML, gr.File, gr.HTML]:
    """Files of earlier runs: LoRAs, a path, a film."""
    with gr.Accordion("Start from saved work", open=False):
        loras = gr.File(
            label="LoRA files, one for each picture: nothing has to be learnt then",
            file_count="multiple",
            file_types=[".safetensors"],
            height=110,
            elem_id="loras",
        )
        path = gr.File(label="A path file: needs no pictures", file_types=[".morph"], height=110, elem_id="path")
        path_note = gr.HTML(visible=False, elem_id="path-note")
        film = gr.File(
            label="Start from a film: its settings fill the form",
            file_types=[*FORMATS, ".toml"],
            height=110,
            elem_id="start",
        )
        note = gr.HTML(visible=False, elem_id="start-note")
    return loras, path, path_note, film, note
