"""The command line: `demo`, `morph`, `fit`, `info`, `web` and `serve`; `bench`, `compare` and `study` are in bench.py.

Nothing is decided here: an option that was not typed is not passed on, so the library's default holds. What needs no
model is checked before anything slow is imported or loaded.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from ..config import check_prompts
from ..errors import ConfigError, DiffMorpherError, ModelError, OutputError, UserError, WriteError
from ..files.films import check_output, unused_in
from ..files.keyframes import MAX_STILLS, NAME
from ..files.pictures import load_image
from ..files.places import check_place
from ..files.video import CODECS
from ..gather import gather
from ..models.catalog import ASSETS, CATALOG, check_model, look_up
from ..progress import console, quiet_bars, say
from ..recipe import Recipe, read_recipes
from ..settings import check_typed, unused
from . import bench, signals
from . import options as o
from .batch import run_batch
from .checks import check_inputs_stay, check_loras, check_outputs, check_port, check_ray, inputs_of, parse_auth
from .output import figures, print_json, save, say_cut, summary, write
from .streams import close_stdout
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
    keyframes: o.Keyframes = None,
    stills: o.Stills = None,
    save_recipe: o.SaveRecipe = None,
    ray: o.Ray = None,
    jobs: o.RayJobs = None,
    as_json: o.Json = False,
    no_cache: o.NoCache = False,
    debug: o.Debug = False,
    **typed: Any,
) -> None:
    """Morph pictures into a film."""
    started = time.perf_counter()
    begin(debug)
    check_typed(typed)
    check_ray(ray, jobs)
    images = images or []
    if from_file is None and not images:
        raise ConfigError("Missing argument 'IMAGE': give two pictures or more, or a film with --from.")
    films = _films(images, from_file, typed)
    if any([look_up(model) for model in {recipe.model for recipe, _ in films}]):  # they recommend something, it may be
        films = _films(images, from_file, typed)
    for sentence in dict.fromkeys(sentence for recipe, _ in films for sentence in unused(recipe, typed)):
        warnings.warn(sentence, stacklevel=2)
    load = partial(_load, typed=typed, no_cache=no_cache)
    if films[0][1] is not None:
        if images or save_frames or save_path or save_recipe or keyframes:
            raise ConfigError(
                "a batch says itself which pictures and outputs it has: give -o a folder, and no other output."
            )
        run_batch([(recipe, name or "") for recipe, name in films], out, started, as_json, load, ray, jobs or "auto")
        return
    if ray is not None:
        raise ConfigError("--ray makes the films of a batch: give one with --from (a .toml or .csv of films).")
    recipe = films[0][0]
    if stills is not None and not 2 <= stills <= MAX_STILLS:
        raise ConfigError(f"--stills is {stills}, but must be a whole number from 2 to {MAX_STILLS}.")
    if stills is not None and keyframes is None:
        raise ConfigError("--stills says how many stills --keyframes writes: give that too, with a folder.")
    if out is None and (not save_recipe or save_frames or save_path or keyframes or as_json):
        raise ConfigError("Missing option '-o': say where the film goes, such as -o film.mp4.")
    source = [from_file, *from_file.glob("frame_*.png")] if from_file else []
    known = {"a picture to be morphed": images, "what the film is made from": source}
    check_outputs(out, (save_frames, keyframes), (save_path, save_recipe), known)
    recipe, pictures = gather(recipe, images if from_file else ())
    if recipe.audio and out is not None and out.suffix.lower() not in CODECS:
        warnings.warn(f"{out} can hold no sound: give one of {', '.join(CODECS)} for that.", stacklevel=2)
    for sentence in unused_in(out, typed) if out is not None else ():
        warnings.warn(sentence, stacklevel=2)
    check_outputs(out, (save_frames, keyframes), (save_path, save_recipe), known | inputs_of(recipe))
    check_loras((*recipe.loras, *recipe.styles))
    if save_recipe:
        recipe.write(save_recipe)
    if out is None:
        say(f"Wrote {save_recipe}")
        return
    morpher = load(recipe)
    loaded = time.perf_counter()
    say_cut(recipe, pictures, morpher.working_size(recipe.size))
    outputs = [out, *([save_frames] if save_frames else [])]
    as_made = len(outputs) == 1 and out.suffix.lower() in ("", *CODECS) and not (recipe.ping_pong or recipe.reverse)
    with StageBars() as progress:
        result = morpher.make(recipe, pictures, progress, partial(write, out) if as_made else None)
    seconds = save(result, [] if as_made else outputs, started, loaded, save_path)
    if keyframes:
        say(f"Wrote {result.save_keyframes(keyframes, stills or 5)}, with where each belongs in {NAME}")
    if save_recipe:
        say(f"Wrote {save_recipe}")
    summary(result, seconds)
    if as_json:
        print_json(figures(result, out, seconds))


@app.command()
@o.takes(*o.FIT)
def fit(
    image: o.Image,
    prompt: o.Prompt,
    out: o.OutLora,
    lora_format: o.LoraFormat = None,
    no_cache: o.NoCache = False,
    debug: o.Debug = False,
    **typed: Any,
) -> None:
    """Fit one picture's LoRA, to be used in any number of morphs."""
    started = time.perf_counter()
    begin(debug)
    if out.suffix.lower() != ".safetensors":
        raise OutputError(f"output {str(out)!r} must end in .safetensors: a LoRA is written in no other format.")
    recipe = Recipe().changed(**typed)
    check_inputs_stay(out, inputs_of(replace(recipe, pictures=(str(image),))))
    check_loras(recipe.styles)
    check_place(out)
    check_prompts([prompt])
    picture = load_image(image)
    if look_up(recipe.model):
        recipe = Recipe().changed(**typed)
    morpher = _load(recipe, no_cache=no_cache)
    from ..files.loras import save_lora

    assert recipe.fit is not None
    with StageBars() as progress:
        made = morpher.fit(
            *(picture, prompt, recipe.fit, recipe.seed),
            size=recipe.size,
            resize=recipe.resize,
            focus=recipe.focus,
            styles=recipe.styles,
            progress=progress,
        )
    save_lora(made, out, lora_format)
    say(f"Wrote {out} in {time.perf_counter() - started:.1f} s.")


@app.command()
def info(file: o.ModelFile = None, as_json: o.Json = False, debug: o.Debug = False) -> None:
    """Versions, devices, and which models are here; or what a model's file holds."""
    begin(debug)
    if str(file) in CATALOG:
        raise ConfigError(
            f"{str(file)!r} is a model that 'diffmorpher info' lists: it needs a file's name to say more."
        )
    if file is not None:
        check_model(str(file))
    from .about import about_file, about_machine, file_table, machine_table

    facts = about_machine() if file is None else about_file(file)
    if as_json:
        print_json(facts)
    else:
        table = machine_table(facts) if file is None else file_table(facts)
        Console(markup=False, emoji=False, highlight=False).print(table)


@app.command()
def web(
    host: o.Host = "127.0.0.1",
    port: o.Port = None,
    share: o.Share = False,
    auth: o.Auth = None,
    keep: o.Keep = 60,
    debug: o.Debug = False,
) -> None:
    """Open a page in the browser that does all this without commands."""
    begin(debug)
    check_port(port)
    login = parse_auth(auth)
    signals.stop_by_exception()  # there is a folder to be removed
    with tempfile.TemporaryDirectory(prefix="diffmorpher-web-", ignore_cleanup_errors=True) as root:
        os.environ["GRADIO_TEMP_DIR"] = os.path.join(root, "uploads")  # gradio reads it when it is imported
        try:
            from ..web.page import serve
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] not in ("gradio", "gradio_client"):
                raise
            raise UserError("the page needs another package: pip install 'diffmorpher[web]'.") from error
        serve(Path(root), host, port, share, login, 60 * keep)


@app.command()
def serve(
    host: o.Host = "127.0.0.1",
    port: o.ServicePort = 8000,
    data: o.Data = Path("diffmorpher-jobs"),
    page: o.WithPage = False,
    ray: o.Ray = None,
    jobs: o.RayJobs = None,
    debug: o.Debug = False,
) -> None:
    """Make films for programs, over HTTP; jobs outlive the server.

    The environment's DIFFMORPHER_TOKEN is then asked for with every request; other machines are let in with one alone.
    """
    begin(debug)
    check_port(port)
    check_ray(ray, jobs)
    try:
        from ..web.service import serve as start
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("fastapi", "uvicorn", "multipart", "python_multipart"):
            raise
        raise UserError("the service needs other packages: pip install 'diffmorpher[serve]'.") from error
    if page and ray is not None:
        raise ConfigError("the page's films are made on this machine: leave out --page, or --ray.")
    token = os.environ.get("DIFFMORPHER_TOKEN") or None
    if not page:
        from ..cluster.slots import choose_jobs

        start(data, host, port, token, ray, choose_jobs(jobs or "auto", None))
        return
    signals.stop_by_exception()  # there is a folder to be removed
    with tempfile.TemporaryDirectory(prefix="diffmorpher-web-", ignore_cleanup_errors=True) as root:
        os.environ["GRADIO_TEMP_DIR"] = os.path.join(root, "uploads")  # gradio reads it when it is imported
        start(data, host, port, token, page=Path(root))


app.command()(bench.bench)
app.command()(bench.compare)
app.command()(bench.study)


# ---- steps of a command


def _films(
    images: Sequence[Path], from_file: Path | None, typed: Mapping[str, Any]
) -> Sequence[tuple[Recipe, str | None]]:
    """The recipes of what was typed, each with its output where they are a batch."""
    films = [(Recipe(tuple(map(str, images))), None)] if from_file is None else read_recipes(from_file)
    return [(recipe.changed(**typed), name) for recipe, name in films]


def _load(recipe: Recipe, typed: Collection[str] = (), no_cache: bool = False) -> Morpher:
    """The recipe's model, after its name, the device and the dtype have been checked, which is quicker than loading it.

    typed: settings that must be as they are; the device that a recipe from a file names may be missing here. no_cache: what
    was made before is made again, and not kept.
    """
    from ..files.cache import default_cache
    from ..models.loading import choose_device, choose_dtype

    check_model(recipe.model)
    cache = None if no_cache else default_cache()
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
        return Morpher.from_pretrained(**recipe.loading() | {"device": device}, cache=cache)


# ---- the way in and out


def main() -> None:
    """The console script. Exit status 0; 2 for a mistake of the user's; 1 for a failure at work; 130 when stopped."""
    arguments = o.complete(sys.argv[1:])
    try:
        command = typer.main.get_command(app)
        o.for_model(command, arguments)
        status = command.main(arguments, prog_name="diffmorpher", standalone_mode=False) or 0
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        status = signals.status()
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        message, status = _explain(error)
        say(f"diffmorpher: error: {message}")
    if status == 130:  # typer returns it for whatever stopped it
        status = signals.status()
    if signals.stopped(status):
        say("diffmorpher: stopped")
    close_stdout()
    signals.leave(status)


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
    if sys.flags.optimize > 1 and isinstance(error, (ImportError, RuntimeError)):
        return "Python's -OO (PYTHONOPTIMIZE=2) removes texts that transformers reads: start it without.", 2
    if isinstance(error, UserError):
        return str(error), 1 if isinstance(error, WriteError) else 2
    if isinstance(error, DiffMorpherError):
        return str(error), 1
    text = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or any(sign in text for sign in ("out of memory", "can't allocate memory")):
        return "out of memory: try --low-memory, or a smaller --size.", 1
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{str(error.filename)!r} cannot be read or written ({error.strerror}).", 1
    if isinstance(error, FileNotFoundError) and not error.filename and not _is_somewhere():
        return "the folder this was started in is gone: change to another.", 2
    return f"{type(error).__name__}: {text} (--debug shows where)", 1


def _is_somewhere() -> bool:
    try:
        return bool(os.getcwd())
    except FileNotFoundError:
        return False
