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
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from ..config import FitConfig, SampleConfig, ScheduleConfig
from ..errors import DiffMorpherError, OutputError, UserError
from ..files.films import check_output
from ..files.pictures import load_image
from ..progress import console, quiet_bars, say
from . import bench
from . import options as o
from .checks import (
    check_alone,
    check_counts,
    check_file,
    check_fps,
    check_loras,
    check_outputs,
    check_port,
    check_seed,
    load_pictures,
    parse_auth,
    parse_batch_size,
    parse_size,
    warn_unused,
)
from .output import given, print_json, save, summary, write
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
def demo(
    out: o.OutFolder = Path("diffmorpher-demo"), seed: o.Seed = None, as_json: o.Json = False, debug: o.Debug = False
) -> None:
    """Morph two bundled pictures with the bundled model: a film, a gif and a contact sheet."""
    started = time.perf_counter()
    begin(debug)
    check_seed(seed)
    stem = "-".join(name for name, _ in DEMO)
    outputs = [check_output(out / f"{stem}{suffix}") for suffix in (".mp4", ".gif", ".png")]
    from ..models.catalog import ASSETS

    images = [load_image(ASSETS / "demo" / f"{name}.png") for name, _ in DEMO]
    morpher = _load()
    loaded = time.perf_counter()
    with StageBars() as progress:
        result = morpher(images, [prompt for _, prompt in DEMO], progress=progress, **given(seed=seed))
    seconds = save(result, outputs, started, loaded)
    summary(result, seconds)
    if as_json:
        print_json(result, outputs[0], seconds)
    say(f"Look at {outputs[0]} (film), {outputs[1].name} (for web pages) and {outputs[2].name} (all frames at once).")


@app.command()
def morph(
    images: o.Images,
    out: o.Out,
    frames: o.Frames = None,
    fps: o.Fps = None,
    loop: o.Loop = False,
    ping_pong: o.PingPong = False,
    save_frames: o.SaveFrames = None,
    save_path: o.SavePath = None,
    prompts: o.Prompts = None,
    size: o.Size = None,
    resize: o.Resize = None,
    lora_steps: o.LoraSteps = None,
    lora_rank: o.LoraRank = None,
    lora_lr: o.LoraLr = None,
    lora: o.Loras = None,
    no_lora: o.NoLora = False,
    fix_lora: o.FixLora = None,
    lora_blend: o.LoraBlend = None,
    steps: o.Steps = None,
    attention_lambda: o.AttentionLambda = None,
    attention_mode: o.AttentionMode = None,
    no_attention: o.NoAttention = False,
    no_adain: o.NoAdain = False,
    no_reschedule: o.NoReschedule = False,
    paper: o.Paper = False,
    preview: o.Preview = False,
    guidance: o.Guidance = None,
    model: o.Model = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    low_memory: o.LowMemory = False,
    tf32: o.Tf32 = False,
    batch_size: o.BatchSize = None,
    seed: o.Seed = None,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Morph pictures into a film."""
    started = time.perf_counter()
    begin(debug)
    check_outputs(out, save_frames, save_path, images)
    check_fps(fps)
    check_seed(seed)
    pixels = parse_size(size)
    lora, prompts = lora or [], prompts or []
    check_alone(("--lora", lora), ("--no-lora", no_lora))
    check_alone(("--lora", lora), ("--preview", preview))
    if preview:
        no_lora, no_reschedule = True, True
        attention_mode = attention_mode or "outer"
    fitting = {"--lora-steps": lora_steps, "--lora-rank": lora_rank, "--lora-lr": lora_lr}
    if no_lora:
        warn_unused(
            "--preview" if preview else "--no-lora", fitting | {"--fix-lora": fix_lora, "--lora-blend": lora_blend}
        )
    if lora:
        warn_unused("--lora", fitting)
    if no_attention:
        typed_mode = None if preview else attention_mode
        warn_unused("--no-attention", {"--attention-lambda": attention_lambda, "--attention-mode": typed_mode})
    fit = given(steps=lora_steps, rank=lora_rank, learning_rate=lora_lr)
    FitConfig(**fit)
    sampling = given(
        steps=steps,
        attention_lambda=0.0 if no_attention else attention_lambda,
        attention_mode=attention_mode,
        lora_blend=lora_blend,
        adain=False if no_adain else None,
        guidance_scale=guidance,
        fix_lora=fix_lora,
        batch_size=parse_batch_size(batch_size),
    )
    check_counts(len(images), len(prompts), len(lora), frames, loop)
    SampleConfig(**sampling).check_images(len(images))
    pictures = load_pictures(images, loop)
    check_loras(lora)
    from ..models.catalog import ModelSpec

    morpher = _load(model, device, dtype, low_memory, tf32)
    loaded = time.perf_counter()
    options = given(
        num_frames=frames,
        loras=lora or None,
        size=pixels,
        resize=resize,
        seed=seed,
    )
    recommended = ModelSpec("", "") if paper else morpher.spec
    options["sample"] = replace(recommended.sample, **sampling)
    options["fit"] = None if no_lora else replace(recommended.fit, **fit)
    if paper or no_reschedule:
        options["schedule"] = ScheduleConfig(enabled=not no_reschedule, method="two-pass" if paper else "insert")
    outputs = [out, *([save_frames] if save_frames else [])]
    if len(outputs) == 1 and out.suffix.lower() in ("", ".mp4") and not ping_pong:  # written as it is made
        options["write"] = partial(write, out, fps)
        outputs = []
    with StageBars() as progress:
        result = morpher(pictures, prompts or None, loop=loop, progress=progress, **options)
    seconds = save(result, outputs, started, loaded, fps, save_path, ping_pong)
    summary(result, seconds)
    if as_json:
        print_json(result, out, seconds)


@app.command()
def fit(
    image: o.Image,
    prompt: o.Prompt,
    out: o.OutLora,
    lora_steps: o.LoraSteps = None,
    lora_rank: o.LoraRank = None,
    lora_lr: o.LoraLr = None,
    size: o.Size = None,
    resize: o.Resize = None,
    model: o.Model = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    low_memory: o.LowMemory = False,
    tf32: o.Tf32 = False,
    seed: o.Seed = None,
    debug: o.Debug = False,
) -> None:
    """Fit one picture's LoRA, to be used in any number of morphs."""
    started = time.perf_counter()
    begin(debug)
    if out.suffix.lower() != ".safetensors":
        raise OutputError(f"output {str(out)!r} must end in .safetensors: a LoRA is written in no other format.")
    check_file(out)
    check_seed(seed)
    pixels = parse_size(size)
    typed = given(steps=lora_steps, rank=lora_rank, learning_rate=lora_lr)
    FitConfig(**typed)
    picture = load_image(image)
    morpher = _load(model, device, dtype, low_memory, tf32)
    from ..files.loras import save_lora

    options = given(size=pixels, resize=resize, seed=seed)
    with StageBars() as progress:
        made = morpher.fit(picture, prompt, replace(morpher.spec.fit, **typed), progress=progress, **options)
    save_lora(made, out)
    say(f"Wrote {out} in {time.perf_counter() - started:.1f} s.")


@app.command()
def info(debug: o.Debug = False) -> None:
    """Versions, devices, and which models are here."""
    begin(debug)
    from .about import about_table

    Console(markup=False, emoji=False, highlight=False).print(about_table())


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


def _load(
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    low_memory: bool = False,
    tf32: bool = False,
) -> Morpher:
    """The model, after its name, the device and the dtype have been checked, which is quicker than loading it."""
    from ..models.catalog import check_model
    from ..models.loading import choose_device, choose_dtype

    if model is not None:
        check_model(model)
    choose_dtype(dtype, choose_device(device))
    with console.status("loading the model"):
        from ..morpher import Morpher

        quiet_bars()
        return Morpher.from_pretrained(
            **given(model=model, device=device, dtype=dtype), low_memory=low_memory, tf32=tf32
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
