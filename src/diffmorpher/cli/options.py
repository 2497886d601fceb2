"""The command line's options: their names and help. Defaults are read from the library, which alone holds them."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..config import NUM_FRAMES, FitConfig, SampleConfig
from ..files.films import save_film

_FIT, _SAMPLE = FitConfig(), SampleConfig()
_FPS = signature(save_film).parameters["fps"].default


def _option(panel: str, names: str, text: str, metavar: str = " ", default: object = None) -> Any:
    """An option that is None, or False, unless typed; flags have a blank metavar."""
    shown = text if default is None else f"{text} Default: {default}."
    return typer.Option(*names.split(), help=shown, metavar=metavar, rich_help_panel=panel, show_default=False)


def _argument(metavar: str, text: str) -> Any:
    return typer.Argument(metavar=metavar, help=text, show_default=False)


Images = Annotated[list[Path], _argument("IMAGE", "Two or more pictures, of any size.")]
Image = Annotated[Path, _argument("IMAGE", "The picture, of any size.")]
Version = Annotated[bool, typer.Option("--version", help="Print the version.", metavar=" ", show_default=False)]

Out = Annotated[
    Path, _option("Output", "-o --out", ".mp4, .gif, .webp, .png (contact sheet) or a folder for frames.", "OUT")
]
OutFolder = Annotated[Path, typer.Option("-o", "--out", help="Folder for the results.", metavar="DIR")]
OutLora = Annotated[Path, _option("Output", "-o --out", "A .safetensors file, for 'morph --lora' or others.", "OUT")]
Frames = Annotated[int | None, _option("Output", "--frames", "How many; at least one for each image.", "N", NUM_FRAMES)]
Fps = Annotated[float | None, _option("Output", "--fps", "Frames per second.", "F", _FPS)]
PingPong = Annotated[bool, _option("Output", "--ping-pong", "Play forwards, then backwards.")]
Loop = Annotated[bool, _option("Output", "--loop", "Return to the first image.")]
SaveFrames = Annotated[Path | None, _option("Output", "--save-frames", "Also write every frame as PNG.", "DIR")]
SavePath = Annotated[
    Path | None, _option("Output", "--save-path", "Also write what Python's MorphPath.load reads.", "FILE")
]

Prompts = Annotated[
    list[str] | None, _option("Pictures", "-p --prompt", "What they show: one for all, or repeat it for each.", "TEXT")
]
Prompt = Annotated[str, _option("Pictures", "-p --prompt", "What it shows; give 'morph' the same.", "TEXT")]
Size = Annotated[
    str | None, _option("Pictures", "--size", "Working size, such as 512x512.", "WxH", "what suits the model")
]
Resize = Annotated[
    Literal["crop", "pad"] | None,
    _option("Pictures", "--resize", "Cut what stands over, or pad with white.", "crop|pad", "crop"),
]

LoraSteps = Annotated[
    int | None, _option("LoRAs", "--lora-steps", "More keep finer detail, fewer are quicker.", "N", f"{_FIT.steps} *")
]
LoraRank = Annotated[
    int | None, _option("LoRAs", "--lora-rank", "Larger holds more of a picture.", "R", f"{_FIT.rank} *")
]
LoraLr = Annotated[
    float | None,
    _option("LoRAs", "--lora-lr", "Lower it if frames break up.", "X", f"{_FIT.learning_rate:g} *"),
]
Loras = Annotated[
    list[Path] | None, _option("LoRAs", "--lora", "Use files fitted before: repeat it, one for each image.", "FILE")
]
NoLora = Annotated[bool, _option("LoRAs", "--no-lora", "Do without: quick but rough.")]
FixLora = Annotated[
    float | None, _option("LoRAs", "--fix-lora", "Hold the mix: 0 is the first image's LoRA, 1 the second's.", "W")
]
LoraBlend = Annotated[
    Literal["auto", "factors", "product"] | None,
    _option("LoRAs", "--lora-blend", "How two are mixed.", "auto|factors|product", _SAMPLE.lora_blend),
]

Steps = Annotated[
    int | None, _option("Method", "--steps", "Diffusion steps; fewer are quicker.", "T", f"{_SAMPLE.steps} *")
]
AttentionLambda = Annotated[
    float | None,
    _option("Method", "--attention-lambda", "0 to 1; more makes steadier frames.", "L", _SAMPLE.attention_lambda),
]
AttentionMode = Annotated[
    Literal["features", "kv", "outer"] | None,
    _option("Method", "--attention-mode", "What of the ends is mixed.", "features|kv|outer", _SAMPLE.attention_mode),
]
NoAttention = Annotated[bool, _option("Method", "--no-attention", "Do not mix self-attention.")]
NoAdain = Annotated[bool, _option("Method", "--no-adain", "Do not match the colours of the two ends.")]
NoReschedule = Annotated[bool, _option("Method", "--no-reschedule", "Do not even out the speed.")]
Paper = Annotated[
    bool,
    _option(
        "Method", "--paper", "The paper's settings throughout, in place of the model's own: some three times the work."
    ),
]
Preview = Annotated[
    bool,
    _option("Method", "--preview", "A rough film soon: --no-lora --no-reschedule --attention-mode outer."),
]
Guidance = Annotated[
    float | None,
    _option(
        "Method", "--guidance", "Above 1 heeds prompts more, in twice the time.", "G", f"{_SAMPLE.guidance_scale:g}"
    ),
]

Model = Annotated[
    str | None, _option("Model", "--model", "A name that 'info' lists, hub id, folder or .safetensors file.", "M")
]
Device = Annotated[str | None, _option("Model", "--device", "cpu, cuda, cuda:1, mps ...", "D", "the fastest present")]
Dtype = Annotated[
    str | None, _option("Model", "--dtype", "float32, bfloat16, float16.", "T", "float32, on CUDA 16 bits")
]
BatchSize = Annotated[
    str | None,
    _option("Model", "--batch-size", "Frames at once; lower it if memory runs out.", "B", _SAMPLE.batch_size),
]

LowMemory = Annotated[
    bool, _option("Model", "--low-memory", "The same film in less memory and more time; for GPUs of 8 GB.")
]
Tf32 = Annotated[bool, _option("Model", "--tf32", "Let a GPU round float32 products to TF32: faster, less exact.")]

Host = Annotated[
    str,
    _option("Page", "--host", "Where to listen; 0.0.0.0 lets other machines in.", "H", "127.0.0.1, this machine alone"),
]
Port = Annotated[int | None, _option("Page", "--port", "Port to listen on.", "P", "the first free one from 7860")]
Share = Annotated[bool, _option("Page", "--share", "Also give it a public address, through gradio.live.")]
Auth = Annotated[str | None, _option("Page", "--auth", "Ask visitors for this name and password.", "USER:PASSWORD")]

Seed = Annotated[int | None, _option("Other", "--seed", "The same one repeats a result, another gives another.", "S")]
Json = Annotated[bool, _option("Other", "--json", "Print the run's figures to standard output, as one JSON object.")]
Debug = Annotated[bool, _option("Other", "--debug", "Show where an error comes from, and all warnings.")]
