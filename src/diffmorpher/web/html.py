"""The page's own pieces of HTML: pictures as text and numbers as drawings. Pure functions; text is escaped here."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ..files.pictures import on_white

if TYPE_CHECKING:
    from .line import Job

#: The stages of a job in their order, as a person would call them.
STAGES = {
    "load": "Load the model",
    "fit": "Learn the pictures",
    "invert": "Turn them into noise",
    "schedule": "Measure the way",
    "sample": "Make the frames",
    "save": "Write the film",
}

#: What a film can be downloaded as: kind -> (label, what it is for).
DOWNLOADS = {
    "mp4": ("MP4", "film for players and social media"),
    "gif": ("GIF", "for chats and old web pages"),
    "webp": ("WebP", "smaller and finer than a GIF"),
    "webm": ("WebM", "for web pages and free software"),
    "mov": ("ProRes", "for editing"),
    "frames": ("Frames", "every frame as PNG, in a zip"),
    "path": ("Path", "to load again under “Start from saved work”"),
    "loras": ("LoRAs", "what was learnt of each picture, for any diffusers pipeline"),
}


def data_uri(picture: Image.Image, side: int | None = None) -> str:
    """The picture inside the page itself, so that no file has to be served; side: of its thumbnail, in pixels."""
    small = on_white(picture)
    if side is not None:
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, "WEBP", quality=80 if side else 95, method=2)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def thumbnail(picture: Image.Image, name: str, crop: tuple[float, float, float, float] | None = None) -> str:
    """crop: left, top, width and height of what is kept, in shares of the picture; None where nothing is cut off."""
    said = escape(name)
    title = f'title="{said}: drag it to its place"'
    image = f'<img class="thumb" draggable="true" src="{data_uri(picture, 216)}" alt="{said}" {title}>'
    if crop is None:
        return f'<div class="framed">{image}</div>'
    left, top, width, height = crop
    middle = left + width / 2 if width < height else top + height / 2
    style = "left:{:.2%};top:{:.2%};width:{:.2%};height:{:.2%}".format(*crop)
    return (
        f'<div class="framed">{image}<div class="crop" tabindex="0" role="slider" aria-label="What is kept of {said}" '
        f'aria-valuemin="0" aria-valuemax="100" aria-valuenow="{100 * middle:.0f}" data-width="{width:.4f}" '
        f'data-height="{height:.4f}" style="{style}" title="What is kept: drag it, or use the arrow keys" '
        # Of its own each time: where the frame was dragged meanwhile, equal text would leave it there.
        f'data-drawn="{time.monotonic_ns()}"></div>'
        f'<span class="grip" draggable="true" {title}>⠿</span></div>'
    )


def note(text: str, kind: str = "info") -> str:
    """A line for a person; kind: "info" or "error"."""
    role = "alert" if kind == "error" else "status"
    return f'<div class="note {kind}" role="{role}">{escape(text)}</div>'


def progress(job: Job) -> str:
    """A bar for each stage so far, with the time left in the one at work; or the place in line."""
    if job.ahead:
        others = "one job is" if job.ahead == 1 else f"{job.ahead} jobs are"
        return note(f"In line: {others} before yours. It starts by itself.")
    rows = []
    for stage, (done, total, began, moved) in list(job.stages.items()):
        name, percent = STAGES.get(stage, stage), 100 * done / total if total else 0.0
        spent = max(moved - began, 0.0)
        if done >= total:
            left = _seconds(spent)
        elif done and spent:
            left = f"{_seconds(spent / done * (total - done))} left"
        else:
            left = "…"
        count = f"{done:.0f} of {total:.0f}" if total > 1 else ""
        rows.append(
            f'<div class="stage{" over" if done >= total else ""}"><span>{name}</span>'
            f'<span class="count">{count}</span><span class="time">{left}</span>'
            f'<div class="bar" role="progressbar" aria-label="{name}" aria-valuemin="0" aria-valuemax="100" '
            f'aria-valuenow="{percent:.0f}"><i style="width:{percent:.1f}%"></i></div></div>'
        )
    return f'<div class="stages" role="status">{"".join(rows) or note("Starting …")}</div>'


def _seconds(seconds: float) -> str:
    if seconds < 9.5:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def video(url: str, name: str) -> str:
    return (
        f'<video class="film" src="{escape(url)}" title="{escape(name)}" '
        'autoplay loop muted playsinline controls></video><button type="button" class="full">Full screen</button>'
    )


def frame(picture: Image.Image, alpha: float) -> str:
    return f'<img class="frame" src="{data_uri(picture)}" alt="The frame at {alpha:.2f}">'


def strip(frames: Sequence[Image.Image], alphas: Sequence[float]) -> str:
    """All frames in a row; a click on one tells its position."""
    return (
        '<div class="strip" role="list" tabindex="0" aria-label="All frames">'
        + "".join(
            f'<button type="button" role="listitem" data-alpha="{alpha:.6f}" title="Frame {i + 1}, position {alpha:.2f}">'
            f'<img src="{data_uri(picture, 128)}" alt="Frame {i + 1}"></button>'
            for i, (picture, alpha) in enumerate(zip(frames, alphas, strict=True))
        )
        + "</div>"
    )


def downloads(links: Mapping[str, tuple[str, Path]], waiting: Sequence[str] = ()) -> str:
    """links: kind -> (url, file); waiting: kinds that are still being written."""
    pieces = []
    for kind, (label, purpose) in DOWNLOADS.items():
        if kind in links:
            url, file = links[kind]
            try:
                size = file.stat().st_size
            except FileNotFoundError:  # the page was closed while this was being drawn: its files are gone
                continue
            size_text = f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{max(1, size // 1000)} kB"
            pieces.append(
                f'<a class="download" href="{escape(url)}" download="{escape(file.name)}" title="{escape(purpose)}">'
                f"{label}<small>{size_text}</small></a>"
            )
        elif kind in waiting:
            pieces.append(f'<span class="download" title="{escape(purpose)}">{label}<small>…</small></span>')
    return f'<div class="downloads">{"".join(pieces)}</div>'


def films(earlier: Sequence[tuple[str, str, Image.Image, str, str]]) -> str:
    """Films of the visit, the last made first. earlier: (url, name, poster, a few words, url of the recipe or "") of each."""
    cards = [
        f'<figure class="earlier"><video src="{escape(url)}" poster="{data_uri(poster, 320)}" controls loop muted playsinline '
        f'preload="none" title="{escape(name)}"></video><figcaption><b>{escape(Path(name).stem)}</b> {escape(about)}<br>'
        f'<a href="{escape(url)}" download="{escape(name)}">Film</a>'
        + (f' <a href="{escape(recipe)}" download="{escape(Path(name).stem)}.toml">Recipe</a>' if recipe else "")
        + "</figcaption></figure>"
        for url, name, poster, about, recipe in reversed(earlier)
    ]
    return f'<h2>Films of this visit</h2><div class="films">{"".join(cards)}</div>' if cards else ""


def expectation(length: float, seconds: float | None) -> str:
    """What the button will make, and in what time."""
    takes = "" if seconds is None else f"; about {_seconds(seconds)} to make, less where something is known already"
    return f'<p class="expectation" role="status">A film of {length:.1f} s{takes}.</p>'


def chart(before: Sequence[float], after: Sequence[float], ghost: float | None = None) -> str:
    """The perceptual distance of each gap between frames, before and after rescheduling: flat means even speed; the ghost."""
    width, height, left, top, bottom = 480, 150, 36, 10, 24
    highest = max([*before, *after, 1e-9])
    gaps = len(after)

    def points(values: Sequence[float]) -> str:
        step = (width - left - 8) / max(1, len(values) - 1)
        scale = (height - top - bottom) / (highest * 1.05)
        return " ".join(f"{left + i * step:.1f},{height - bottom - v * scale:.1f}" for i, v in enumerate(values))

    lines = f'<polyline class="before" points="{points(before)}"/>' if before else ""
    lines += f'<polyline class="after" points="{points(after)}"/>'
    faded = "" if ghost is None else f"<br>Ghost {ghost:.2f}: 0 is new pictures in the middle, 1 a cross-fade."
    floor = height - bottom
    legend = '<span class="key after"></span>this film' + (
        '<span class="key before"></span>with evenly spaced positions' if before else ""
    )
    return (
        f'<figure class="chart"><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="Perceptual distance of each of the {gaps} gaps">'
        f'<line x1="{left}" y1="{floor}" x2="{width - 8}" y2="{floor}"/><line x1="{left}" y1="{top}" x2="{left}" y2="{floor}"/>'
        f'<text x="{left - 5}" y="{top + 8}" text-anchor="end">{highest:.2g}</text>'
        f'<text x="{left - 5}" y="{floor}" text-anchor="end">0</text>'
        f'<text x="{left}" y="{height - 8}">first gap</text>'
        f'<text x="{width - 8}" y="{height - 8}" text-anchor="end">gap {gaps}</text>{lines}</svg>'
        "<figcaption>How much changes from frame to frame (perceptual distance): flat is even speed. "
        f"{legend}{faded}</figcaption>"
        "</figure>"
    )
