"""The command line's options. Those of a film's settings are made from their table; here are those that are its own."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..recipe import Recipe
from ..settings import BY_NAME, SETTINGS, VALUE, Setting, parse_size

_PLAIN = Recipe()


def _option(panel: str, names: str, text: str, metavar: str = " ", default: object = None) -> Any:
    """An option that is None, or False, unless typed; flags have a blank metavar."""
    shown = text if default is None else f"{text} Default: {default}."
    return typer.Option(*names.split(), help=shown, metavar=metavar, rich_help_panel=panel, show_default=False)


def _argument(metavar: str, text: str) -> Any:
    return typer.Argument(metavar=metavar, help=text, show_default=False)


Images = Annotated[list[Path] | None, _argument("IMAGE", "Two or more pictures, of any size.")]
Image = Annotated[Path, _argument("IMAGE", "The picture, of any size.")]
ModelFile = Annotated[Path | None, _argument("[FILE]", "A .safetensors file: which model it is, and how it is used.")]
Version = Annotated[bool, typer.Option("--version", help="Print the version.", metavar=" ", show_default=False)]

Out = Annotated[
    Path | None, _option("Output", "-o --out", ".mp4, .gif, .webp, .png (contact sheet) or a folder for frames.", "OUT")
]
OutFolder = Annotated[Path, typer.Option("-o", "--out", help="Folder for the results.", metavar="DIR")]
OutLora = Annotated[Path, _option("Output", "-o --out", "A .safetensors file, for 'morph --lora' or others.", "OUT")]
SaveFrames = Annotated[Path | None, _option("Output", "--save-frames", "Also write every frame as PNG.", "DIR")]
SavePath = Annotated[
    Path | None, _option("Output", "--save-path", "Also write what Python's MorphPath.load reads.", "FILE")
]

From = Annotated[
    Path | None,
    _option(
        "Output",
        "--from",
        "A film made before, to make it again, or changed by further options (--no-loop switches off what it has on); a "
        "recipe (.toml); or a batch (.toml, .csv).",
        "FILE",
    ),
]
SaveRecipe = Annotated[
    Path | None, _option("Output", "--save-recipe", "Also write all settings, as --from reads them.", "FILE.toml")
]

Prompt = Annotated[str, _option("Pictures", "-p --prompt", "What it shows; give 'morph' the same.", "TEXT")]

Host = Annotated[
    str,
    _option("Page", "--host", "Where to listen; 0.0.0.0 lets other machines in.", "H", "127.0.0.1, this machine alone"),
]
Port = Annotated[int | None, _option("Page", "--port", "Port to listen on.", "P", "the first free one from 7860")]
Share = Annotated[bool, _option("Page", "--share", "Also give it a public address, through gradio.live.")]
Auth = Annotated[str | None, _option("Page", "--auth", "Ask visitors for this name and password.", "USER:PASSWORD")]

Json = Annotated[bool, _option("Other", "--json", "Print the run's figures to standard output, as one JSON object.")]
Debug = Annotated[bool, _option("Other", "--debug", "Show where an error comes from, and all warnings.")]


# ---- settings

#: Settings of a film in the order of the help; those that say how one LoRA is fitted; those of the model alone.
FILM = tuple(each.name for each in SETTINGS)
MODEL = ("model", "prediction", "device", "dtype", "low_memory", "tf32")
FIT = ("lora_steps", "lora_rank", "lora_lr", "size", "resize", *MODEL, "seed")


#: Before the name of a switch, for its other way.
_BACK = "back_"


def takes(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of these settings; it is called with those that were typed, by the settings' names."""
    settings = [BY_NAME[name] for name in names]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
        last = [p for p in own if p.name in ("as_json", "debug")]
        both_ways = [each for each in settings if each.is_switch and each.sets is VALUE]
        shown = [*(p for p in own if p not in last), *map(_parameter, settings), *map(_back, both_ways), *last]

        @functools.wraps(command)
        def with_typed(**values: Any) -> None:
            chosen = {each: values.pop(each.name) for each in settings}
            back = [each for each in both_ways if values.pop(_BACK + each.name)]
            typed = {each.name: _read(each, value) for each, value in chosen.items() if not _untouched(value)}
            typed |= {each.name: each.is_on for each in back}
            command(**values, **typed)

        with_typed.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [p.replace(kind=p.KEYWORD_ONLY) for p in shown]
        )
        return with_typed

    return decorate


def _parameter(each: Setting) -> inspect.Parameter:
    limits, default = each.limits, each.get(_PLAIN)
    if each.is_switch:
        kind: Any = bool
    elif each.is_list:
        kind = list[str] | None
    elif limits is None or each.name == "batch_size":
        kind = str | None
    else:
        kind = (Literal[limits.choices] if limits.choices else limits.kind) | None
    shown = each.said(default) if default not in (None, ()) else each.unset or None
    if each.is_model_own:
        paper = each.get(_PLAIN.changed(paper=True))
        shown = f"what suits the model (the paper: {each.said(paper)})"
    names = "-p --prompt" if each.name == "prompt" else each.option
    option = _option(each.group, names, each.help, each.metavar, None if each.is_switch else shown)
    start = False if each.is_switch else None
    return inspect.Parameter(
        each.name, inspect.Parameter.KEYWORD_ONLY, default=start, annotation=Annotated[kind, option]
    )


def _back(each: Setting) -> inspect.Parameter:
    """The other way of a switch, "--no-loop" or "--adain", which a film that is made again may need; not in the help."""
    option = typer.Option(each.flag(each.is_on), hidden=True)
    return inspect.Parameter(
        _BACK + each.name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option]
    )


def _untouched(value: Any) -> bool:
    return value is None or value is False or value == []


def _read(each: Setting, value: Any) -> Any:
    """What was typed as what the setting takes."""
    if each.is_on:
        return False  # its option switches it off
    if each.name == "size":
        return parse_size(value)
    if each.name == "batch_size":  # a whole number as an int; `SampleConfig` judges the rest
        return int(value) if re.fullmatch(r"-?[0-9]{1,9}", value) else value
    return value
