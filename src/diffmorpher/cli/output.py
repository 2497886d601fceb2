"""What a command leaves behind: files, the summary of a run, and its figures as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.films import read_settings, save_made
from ..files.pictures import said_cut
from ..progress import say
from .terminal import show_seconds

if TYPE_CHECKING:
    from PIL import Image

    from ..recipe import Recipe
    from ..result import MorphResult


def write(out: Path, frames: Iterable[Image.Image], settings: dict[str, Any]) -> None:
    """Write a film as its frames come."""
    save_made(frames, out, settings)
    say(f"Wrote {out}")


def save(
    result: MorphResult, outputs: Sequence[Path], started: float, loaded: float, save_path: Path | None = None
) -> dict[str, float]:
    """Write the film in each place; return the seconds of every stage, of which "save" is what the others are not."""
    for output in outputs:
        result.save(output)
        say(f"Wrote {output}")  # at once, as the next may fail
    if save_path:
        result.path.save(save_path)
        say(f"Wrote {save_path}")
    work = sum(seconds for stage, seconds in result.seconds.items() if stage != "load")
    return result.seconds | {"load": loaded - started, "save": max(0.0, time.perf_counter() - loaded - work)}


def say_cut(recipe: Recipe, pictures: Sequence[Image.Image], size: tuple[int, int]) -> None:
    """How much of each picture is cut off, where anything is."""
    cut = said_cut(recipe.pictures, pictures, size)
    if cut and recipe.resize == "crop":
        say(f"{cut} (--focus says where, --resize pad or blur keeps all.)")


def summary(result: MorphResult, seconds: dict[str, float]) -> None:
    """How long each stage took and the film is, and whether it fades; its figures are in `--json`."""
    from ..method.ghost import said_ghost

    show_seconds(seconds)
    say(f"{len(result.alphas)} frames, {result.length:.3g} s.")
    if said := said_ghost(result.ghost):
        say(said)


def figures(result: MorphResult, output: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """What `--json` prints of a film."""
    return {
        "output": str(output),
        "frames": len(result.alphas),
        "alphas": result.alphas,
        "times": result.times,
        "distances": result.distances,
        "ppl": result.ppl,
        "pdv": result.pdv,
        "ghost": result.ghost,
        "seconds": {stage: round(s, 3) for stage, s in seconds.items()},
        "unet_rows": result.unet_rows,
        **{name: result.settings[name] for name in ("model", "device", "seed")},
        "settings": read_settings(output),
    }


def print_json(found: dict[str, Any]) -> None:
    print(json.dumps(found, allow_nan=False))
