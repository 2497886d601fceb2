"""The command line's options. Those of a film's settings are made from their table; here are those that are its own."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..files.films import FORMATS
from ..files.places import expanded
from ..recipe import Recipe
from ..settings import BY_NAME, SETTINGS, VALUE, Setting

_PLAIN = Recipe()


def _option(panel: str, names: str, text: str, metavar: str = " ", default: object = None, parser: Any = None) -> Any:
    """An option that is None, or False, unless typed; flags have a blank metavar."""
    shown = text if default is None else f"{text} Default: {default}."
    return typer.Option(
        *names.split(), help=shown, metavar=metavar, rich_help_panel=panel, show_default=False, parser=parser
    )


def _place(names: str, text: str, metavar: str) -> Any:
    """An option that names a file or folder."""
    return _option("Output", names, text, metavar, parser=expanded)


def _argument(metavar: str, text: str) -> Any:
    return typer.Argument(metavar=metavar, help=text, show_default=False)


Images = Annotated[list[Path] | None, _argument("IMAGE", "Two or more pictures, of any size.")]
Image = Annotated[Path, _argument("IMAGE", "The picture, of any size.")]
ModelFile = Annotated[Path | None, _argument("[FILE]", "A .safetensors file: which model it is, and how it is used.")]
Version = Annotated[bool, typer.Option("--version", help="Print the version.", metavar=" ", show_default=False)]

Out = Annotated[Path | None, _place("-o --out", f"{', '.join(FORMATS)} (contact sheet) or a folder for frames.", "OUT")]
OutFolder = Annotated[Path, typer.Option("-o", "--out", help="Folder for the results.", metavar="DIR", parser=expanded)]
OutLora = Annotated[Path, _place("-o --out", "A .safetensors file, for 'morph --lora' or others.", "OUT")]
LoraFormat = Annotated[
    Literal["diffusers", "kohya"] | None,
    _option(
        *("Output", "--format"),
        "kohya is read by ComfyUI, the web UIs, kohya's scripts and diffusers; diffusers by diffusers alone, of transformers "
        "(Stable Diffusion 3, FLUX ...) by ComfyUI too.",
        "kohya|diffusers",
        "kohya; diffusers for transformers, for which there is no other",
    ),
]
SaveFrames = Annotated[Path | None, _place("--save-frames", "Also write every frame as PNG.", "DIR")]
Keyframes = Annotated[
    Path | None,
    _place("--keyframes", "Also write stills for video models, evenly spaced, and where LTX and Wan take them.", "DIR"),
]
Stills = Annotated[int | None, _option("Output", "--stills", "How many of them.", "N", "5")]
SavePath = Annotated[Path | None, _place("--save-path", "Also write what Python's MorphPath.load reads.", "FILE")]

From = Annotated[
    Path | None,
    _place(
        "--from",
        "A film made before, to make it again, or changed by further options (--no-loop switches off what it has on); a "
        "recipe (.toml); or a batch (.toml, .csv).",
        "FILE",
    ),
]
SaveRecipe = Annotated[
    Path | None, _place("--save-recipe", "Also write all settings, as --from reads them.", "FILE.toml")
]

Prompt = Annotated[str, _option("Pictures", "-p --prompt", "What it shows; give 'morph' the same.", "TEXT")]

Host = Annotated[
    str,
    _option("Page", "--host", "Where to listen; 0.0.0.0 lets other machines in.", "H", "127.0.0.1, this machine alone"),
]
Port = Annotated[int | None, _option("Page", "--port", "Port to listen on.", "P", "the first free one from 7860")]
Share = Annotated[bool, _option("Page", "--share", "Also give it a public address, through gradio.live.")]
Auth = Annotated[str | None, _option("Page", "--auth", "Ask visitors for this name and password.", "USER:PASSWORD")]

Keep = Annotated[
    float,
    typer.Option(
        "--keep",
        help="How long a visit's pictures and films are kept after its page was closed or loaded anew.",
        metavar="MINUTES",
        rich_help_panel="Page",
        min=0,
    ),
]
ServicePort = Annotated[int, typer.Option("--port", help="Port to listen on.", metavar="P", rich_help_panel="Service")]
Data = Annotated[
    Path, typer.Option("--data", help="Folder of the jobs and their films.", metavar="DIR", rich_help_panel="Service")
]

WithPage = Annotated[
    bool,
    typer.Option(
        "--page",
        help="Also show the page of 'web', whose films wait in the same line.",
        metavar=" ",
        show_default=False,
        rich_help_panel="Service",
    ),
]

Json = Annotated[bool, _option("Other", "--json", "Print the run's figures to standard output, as one JSON object.")]
NoCache = Annotated[
    bool, _option("Other", "--no-cache", "Make everything anew, and keep nothing for a later run; see 'info'.")
]
Debug = Annotated[bool, _option("Other", "--debug", "Show where an error comes from, and all warnings.")]


Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="Hand the work to the Ray cluster there; without an address, start one here.",
        show_default=False,
        rich_help_panel="Cluster",
    ),
]
Jobs = Annotated[str, typer.Option("--jobs", metavar="J", help="Processes; auto: one for each GPU, on a CPU one.")]
RayJobs = Annotated[
    str | None,
    _option(
        "Cluster", "--jobs", "Workers of a Ray that is started here; auto: one for each GPU, on a CPU one.", "J", "auto"
    ),
]


def complete(arguments: list[str]) -> list[str]:
    """The arguments with --ray's address filled in where it was left out, which typer cannot do."""
    filled = list(arguments)
    if "--ray" in filled:
        after = filled.index("--ray") + 1
        if after == len(filled) or filled[after].startswith("-"):
            filled.insert(after, "local")
    return filled


# ---- settings

#: Settings of a film in the order of the help; those that say how one LoRA is fitted; those of the model alone.
FILM = tuple(each.name for each in SETTINGS)
MODEL = ("model", "prediction", "vae", "device", "dtype", "low_memory", "tf32")
FIT = ("lora_steps", "lora_rank", "lora_lr", "style", "size", "resize", "focus", *MODEL, "seed")


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
    elif limits is None or limits.many or each.name == "batch_size":
        kind = str | None
    else:
        kind = (Literal[limits.choices] if limits.choices else limits.kind) | None
    shown = each.said(default) if default not in (None, ()) else each.unset or None
    if each.is_model_own:
        shown = _own_default(each, _PLAIN)
    names = "-p --prompt" if each.name == "prompt" else each.option
    option = _option(each.group, names, each.help, each.metavar, None if each.is_switch else shown)
    start = False if each.is_switch else None
    return inspect.Parameter(
        each.name, inspect.Parameter.KEYWORD_ONLY, default=start, annotation=Annotated[kind, option]
    )


def _own_default(each: Setting, recipe: Recipe) -> str:
    """What a setting is for a model where it is not typed, and in the paper."""
    own, paper = each.said(each.get(recipe)), each.said(each.get(recipe.changed(paper=True)))
    return f"{own}, which suits {recipe.model}" + (f" (the paper: {paper})" if own != paper else ", as in the paper")


def for_model(command: Any, arguments: Sequence[str]) -> None:
    """Let the help of a command (and of its commands) show the defaults of the model that is typed beside --help."""
    given = [b for a, b in pairwise(arguments) if a == "--model"]
    given += [a.removeprefix("--model=") for a in arguments if a.startswith("--model=")]
    if "--help" not in arguments or not given:
        return
    recipe = Recipe(model=given[-1])
    for each in getattr(command, "commands", {}).values():
        for parameter in each.params:
            setting = BY_NAME.get(parameter.name or "")
            if setting is not None and setting.is_model_own and getattr(parameter, "help", None):
                parameter.help = f"{setting.help} Default: {_own_default(setting, recipe)}."


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
    if each.name == "batch_size":  # a whole number as an int; `SampleConfig` judges the rest
        return int(value) if re.fullmatch(r"-?[0-9]{1,9}", value) else value
    return each.read(value) if isinstance(value, str) else value
