"""The command line: `diffmorpher demo`, `morph`, `fit`, `info` and `web`; `bench`, `compare` and `study` are in bench.py.

Nothing is decided here: an option that was not typed is not passed on, so the library's default holds. What needs no
model is checked before anything slow is imported or loaded.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Collection
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from ..errors import ConfigError, DiffMorpherError, ModelError, OutputError, UserError
from ..files.films import check_output
from ..files.pictures import load_image
from ..gather import gather
from ..models.catalog import ASSETS, check_model
from ..progress import console, quiet_bars, say
from ..recipe import Recipe, read_recipes
from ..settings import check_typed, unused
from . import bench
from . import options as o
from .batch import run_batch
from .checks import check_file, check_loras, check_outputs, check_port, parse_auth
from .output import figures, print_json, save, summary, write
from .terminal import StageBars, begin

if TYPE_CHECKING:
    from ..morpher import Morpher

#: What `diffmorpher demo` morphs: the name of a picture in assets/demo, and its prompt.
DEMO = (("tiger-face", "a tiger face"), ("wolf-face", "a wolf face"))

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


# ---- commands


@app.callback(invoke_without_command=True)
def _top(context: typer.Context, show_version: o.Version = False) -> None:
    """Smooth, natural morphs between pictures with a diffusion model.

    Start with [bold]diffmorpher demo[/bold], then [bold]diffmorpher morph a.png b.png -o film.mp4[/bold].
    """
    if show_version:
        typer.echo(version("diffmorpher"))
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
@o.takes("seed")
def demo(
    out: o.OutFolder = Path("diffmorpher-demo"), as_json: o.Json = False, debug: o.Debug = False, **typed: Any
) -> None:
    """Morph two bundled pictures with the bundled model: a film, a gif and a contact sheet."""
    started = time.perf_counter()
    begin(debug)
    names, prompts = zip(*DEMO, strict=True)
    recipe = Recipe(tuple(str(ASSETS / "demo" / f"{name}.png") for name in names), prompts).changed(**typed)
    outputs = [check_output(out / f"{'-'.join(names)}{suffix}") for suffix in (".mp4", ".gif", ".png")]
    recipe, pictures = gather(recipe)
    morpher = _load(recipe)
    loaded = time.perf_counter()
    with StageBars() as progress:
        result = morpher.make(recipe, pictures, progress)
    seconds = save(result, outputs, started, loaded)
    summary(result, seconds)
    if as_json:
        print_json(figures(result, outputs[0], seconds))
    say(f"Look at {outputs[0]} (film), {outputs[1].name} (for web pages) and {outputs[2].name} (all frames at once).")


@app.command()
@o.takes(*o.FILM)
def morph(
    images: o.Images = None,
    out: o.Out = None,
    from_file: o.From = None,
    save_frames: o.SaveFrames = None,
    save_path: o.SavePath = None,
    save_recipe: o.SaveRecipe = None,
    as_json: o.Json = False,
    debug: o.Debug = False,
    **typed: Any,
) -> None:
    """Morph pictures into a film."""
    started = time.perf_counter()
    begin(debug)
    check_typed(typed)
    images = images or []
    if from_file is None and not images:
        raise ConfigError("Missing argument 'IMAGE': give two pictures or more, or a film with --from.")
    films = [(Recipe(tuple(map(str, images))), None)] if from_file is None else read_recipes(from_file)
    films = [(recipe.changed(**typed), name) for recipe, name in films]
    for sentence in dict.fromkeys(sentence for recipe, _ in films for sentence in unused(recipe, typed)):
        warnings.warn(sentence, stacklevel=2)
    load = partial(_load, typed=typed)
    if films[0][1] is not None:
        if images or save_frames or save_path or save_recipe:
            raise ConfigError(
                "a batch says itself which pictures and outputs it has: give -o a folder, and no other output."
            )
        run_batch([(recipe, name or "") for recipe, name in films], out, started, as_json, load)
        return
    recipe = films[0][0]
    if out is None and (not save_recipe or save_frames or save_path or as_json):
        raise ConfigError("Missing option '-o': say where the film goes, such as -o film.mp4.")
    source = [from_file, *from_file.glob("frame_*.png")] if from_file else []
    known = {"a picture to be morphed": images, "what the film is made from": source}
    check_outputs(out, save_frames, save_path, save_recipe, known)
    recipe, pictures = gather(recipe, images if from_file else ())
    inputs = {"a picture to be morphed": recipe.pictures, "a LoRA to be used": recipe.loras}
    check_outputs(
        out, save_frames, save_path, save_recipe, {what: [*map(Path, files)] for what, files in inputs.items()}
    )
    check_loras(recipe.loras)
    if save_recipe:
        recipe.write(save_recipe)
    if out is None:
        say(f"Wrote {save_recipe}")
        return
    morpher = load(recipe)
    loaded = time.perf_counter()
    outputs = [out, *([save_frames] if save_frames else [])]
    as_made = len(outputs) == 1 and out.suffix.lower() in ("", ".mp4") and not recipe.ping_pong
    with StageBars() as progress:
        result = morpher.make(recipe, pictures, progress, partial(write, out) if as_made else None)
    seconds = save(result, [] if as_made else outputs, started, loaded, save_path)
    if save_recipe:
        say(f"Wrote {save_recipe}")
    summary(result, seconds)
    if as_json:
        print_json(figures(result, out, seconds))


@app.command()
@o.takes(*o.FIT)
def fit(image: o.Image, prompt: o.Prompt, out: o.OutLora, debug: o.Debug = False, **typed: Any) -> None:
    """Fit one picture's LoRA, to be used in any number of morphs."""
    started = time.perf_counter()
    begin(debug)
    if out.suffix.lower() != ".safetensors":
        raise OutputError(f"output {str(out)!r} must end in .safetensors: a LoRA is written in no other format.")
    check_file(out)
    recipe = Recipe().changed(**typed)
    picture = load_image(image)
    morpher = _load(recipe)
    from ..files.loras import save_lora

    assert recipe.fit is not None
    with StageBars() as progress:
        made = morpher.fit(
            *(picture, prompt, recipe.fit, recipe.seed), size=recipe.size, resize=recipe.resize, progress=progress
        )
    save_lora(made, out)
    say(f"Wrote {out} in {time.perf_counter() - started:.1f} s.")


@app.command()
def info(file: o.ModelFile = None, debug: o.Debug = False) -> None:
    """Versions, devices, and which models are here; or what a model's file holds."""
    begin(debug)
    if file is not None:
        check_model(str(file))
    from .about import about_file, about_table

    table = about_table() if file is None else about_file(file)
    Console(markup=False, emoji=False, highlight=False).print(table)


@app.command()
def web(
    host: o.Host = "127.0.0.1",
    port: o.Port = None,
    share: o.Share = False,
    auth: o.Auth = None,
    debug: o.Debug = False,
) -> None:
    """Open a page in the browser that does all this without commands."""
    begin(debug)
    check_port(port)
    login = parse_auth(auth)
    with tempfile.TemporaryDirectory(prefix="diffmorpher-web-", ignore_cleanup_errors=True) as root:
        os.environ["GRADIO_TEMP_DIR"] = os.path.join(root, "uploads")  # gradio reads it when it is imported
        try:
            from ..web.page import serve
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] not in ("gradio", "gradio_client"):
                raise
            raise UserError("the page needs another package: pip install 'diffmorpher[web]'.") from error
        serve(Path(root), host, port, share, login)


app.command()(bench.bench)
app.command()(bench.compare)
app.command()(bench.study)


# ---- steps of a command


def _load(recipe: Recipe, typed: Collection[str] = ()) -> Morpher:
    """The recipe's model, after its name, the device and the dtype have been checked, which is quicker than loading it.

    typed: settings that must be as they are; the device that a recipe from a file names may be missing here.
    """
    from ..models.loading import choose_device, choose_dtype

    check_model(recipe.model)
    try:
        device = choose_device(recipe.device)
    except ModelError:
        if recipe.origin is None or "device" in typed:
            raise
        device = choose_device(None)  # the film was made on another machine
        warnings.warn(
            f"{recipe.origin} was made on {recipe.device!r}, which is not here: frames may differ.", stacklevel=2
        )
    choose_dtype(recipe.dtype, device)
    with console.status("loading the model"):
        from ..morpher import Morpher

        quiet_bars()
        return Morpher.from_pretrained(
            recipe.model,
            device=device,
            dtype=recipe.dtype,
            low_memory=recipe.low_memory,
            tf32=recipe.tf32,
            prediction=recipe.prediction,
        )


# ---- the way in and out


def main() -> None:
    """The console script. Exit status 0; 2 for a mistake of the user's; 1 for a failure at work; 130 when stopped."""
    arguments = bench.complete(sys.argv[1:])
    try:
        status = typer.main.get_command(app).main(arguments, prog_name="diffmorpher", standalone_mode=False) or 0
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except BrokenPipeError:
        status = 1
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        message, status = _explain(error)
        say(f"diffmorpher: error: {message}")
    if status == 130:  # typer returns it for Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would only break into the way out
        say("diffmorpher: stopped")
    _close_stdout()
    sys.exit(status)


def _explain(error: Exception) -> tuple[str, int]:
    """One sentence for the user, and the exit status."""
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "diffmorpher"
        message = error.format_message().rstrip(".").replace("Value error, ", "")
        for problem in getattr(error.__cause__, "errors", list)():  # typer leaves out what was typed
            if repr(problem["input"]) not in message:
                message += f", not {problem['input']!r}"
        return f"{message}; see '{command} --help'.", 2
    if isinstance(error, UserError):
        full = isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
        return str(error), 1 if full else 2
    if isinstance(error, DiffMorpherError):
        return str(error), 1
    text = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or any(sign in text for sign in ("out of memory", "can't allocate memory")):
        return "out of memory: try --low-memory, or a smaller --size.", 1
    return f"{type(error).__name__}: {text} (--debug shows where)", 1


def _close_stdout() -> None:
    """Nobody may be left to read standard output: then Python must not complain on its way out."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
