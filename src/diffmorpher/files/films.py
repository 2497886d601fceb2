"""Films out: frames to a video, an animated picture, a contact sheet or a folder of PNG files, with the settings inside.

A film is written under a temporary name beside its place and moved there when complete, so that a failure or Ctrl-C
leaves neither half a film nor a damaged older one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from ..config import FPS
from ..errors import ConfigError, ImageError, OutputError
from .atomic import cannot_write, file_hash, replacing
from .folders import PNG_KEY, check_frames_are_ours, frame_files, png_info, save_folder, write_png
from .pictures import READ_FORMATS, on_white
from .places import check_place, is_plain
from .playback import Playback, Quality, played
from .sound import read_sound
from .video import CODECS, check_encoder, read_comment, write_video

#: Suffixes that `save_film` knows; a path without one means a folder of `frame_0000.png`, `frame_0001.png`, ...
FORMATS = (*CODECS, ".gif", ".webp", ".apng", ".png")

#: Browsers slow a frame of 10 ms or less down to 100 ms (gif counts in steps of 10 ms), so faster films skip frames.
_MAX_GIF_FPS, _MAX_FPS = 50, 90
#: What holds opacity; "" is a folder.
TRANSPARENT = (*(suffix for suffix, codec in CODECS.items() if codec.transparent), ".webp", ".apng", ".png", "")
#: How well a webp is compressed.
_WEBP: dict[Quality, int] = {"small": 70, "good": 90, "best": 98}
#: Pixels at least this bright in all channels count as white background in a gif.
_NEAR_WHITE = 250

PathLike = str | os.PathLike[str]


def check_output(out: PathLike) -> Path:
    """The path `out`, after a look at whether a film can be written there. Creates nothing; call it before long work.

    Raises `OutputError`: unknown suffix, no name, a folder where a file is wanted or the reverse, or a place that
    cannot be written. Folders on the way that do not exist yet are fine.
    """
    if not isinstance(out, (str, os.PathLike)) or not isinstance(os.fspath(out), str):
        raise OutputError(f"Output is {out!r:.100}, but must be a path.")
    path = Path(out)
    if path.name in ("", "..") or path.name.lower() in FORMATS or "\0" in path.name:
        raise OutputError(f"Output {str(out)!r} has no name: give one such as 'morph.mp4'.")
    if path.suffix and path.suffix.lower() not in FORMATS:
        raise OutputError(
            f"Output {str(out)!r} ends in {path.suffix!r}: "
            f"use {', '.join(FORMATS)}, or no suffix for a folder of frames."
        )
    folder = not path.suffix
    if folder and os.path.isfile(path):
        raise OutputError(
            f"Output {str(out)!r} is a file, but a name without suffix means a folder of frames: "
            f"add one of {', '.join(FORMATS)}, or give another name."
        )
    check_encoder(path)
    check_place(out, folder=folder)
    if folder:
        check_frames_are_ours(path)
    return path


def unused_in(out: PathLike, names: Collection[str]) -> list[str]:
    """A sentence for each setting, of those that were given, by its name in a recipe, that changes nothing in such a file."""
    suffix = Path(out).suffix.lower()
    once = "holds each frame once" if suffix in ("", ".png") else ""
    alike = "" if suffix in (".mp4", ".webm", ".mov", ".webp") else "loses nothing that could be less"
    reasons = {
        **dict.fromkeys(("hold", "reverse", "ping_pong"), once),
        "fps": "" if "seconds" in names else once,
        "quality": "is a gif, which has but one" if suffix == ".gif" else alike,
        "transparent": "" if suffix in TRANSPARENT else "can hold no transparency, so the film is on white",
    }
    return [
        f"--{name.replace('_', '-')} changes nothing in {out}, which {reason}."
        for name, reason in reasons.items()
        if reason and name in names
    ]


def save_film(
    frames: Iterable[Image.Image],
    out: PathLike,
    *,
    fps: float = FPS,
    metadata: Mapping[str, object] | None = None,
    order: Sequence[int] | None = None,
    quality: Quality = "good",
    audio: PathLike | None = None,
) -> Path:
    """Write the frames to `out` in the format of its suffix and return its path.

    frames: pictures of one size, one or more; a video or a folder is written as they come, and holds none of them in memory.
    out: .mp4 (H.264), .webm (VP9) or .mov (ProRes 422), in which an odd side grows by one pixel; .mkv (FFV1, lossless); .gif,
        .webp or .apng (looped); .png (a contact sheet); or no suffix: a folder of numbered PNG files, from which frames of an
        earlier film are removed.
    fps: frames per second, 0.01 to 240. A gif above 50, a webp or apng above 90, which browsers would play slowly, keeps its
        duration and skips frames.
    metadata: settings to store as JSON in the file (in each frame's file for a folder); see `read_settings`.
    order: which frame is seen in each place of the film, by its number; None for each once. No matter for sheets and folders,
        which hold each frame once. A video that only repeats frames still holds none in memory.
    quality: of .mp4, .webm, .mov and .webp; the others have but one.
    audio: a file whose sound a video gets, from its beginning, cut to the film's length; other films have none.

    Raises `ConfigError`, and `OutputError`; an older film at `out` is then still whole.
    """
    path = check_output(out)
    Playback(fps, quality=quality)  # refuses what cannot be
    # In one order, whoever put them together: the same film has the same bytes.
    settings = json.dumps(dict(sorted(metadata.items())), default=str) if metadata is not None else None
    suffix = path.suffix.lower()
    sounds = audio is not None and suffix in CODECS
    if sounds and order is None:  # how long it is must be known
        frames = list(frames)
        order = range(len(frames))
    coming = _Coming(frames, suffix in TRANSPARENT)
    sound = read_sound(audio, len(order or ()) / float(fps)) if audio is not None and sounds else None
    pictures = [] if suffix in ("", *CODECS) else _pictures(frames, suffix in TRANSPARENT)
    if order is not None and suffix != ".png":
        pictures = [pictures[i] for i in order] if pictures else pictures
    try:
        if not suffix:
            save_folder(coming, path, settings)
            return path
        with replacing(path) as part:
            if suffix in CODECS:
                rate = Fraction(float(fps)).limit_denominator(100_000)
                write_video(
                    coming if order is None else played(coming, order), part, suffix, rate, settings, quality, sound
                )
            elif suffix == ".gif":
                _write_gif(pictures, part, fps, settings)
            elif suffix == ".webp":
                _write_webp(pictures, part, fps, settings, _WEBP[quality])
            elif suffix == ".apng":
                _write_apng(pictures, part, fps, settings)
            else:
                write_png(contact_sheet(pictures), part, settings)
    except (OSError, ValueError, RuntimeError) as error:  # the latter two: Pillow on a size that a format cannot hold
        if coming.failure is error:
            raise
        raise cannot_write(f"Output {str(path)!r}", error) from error
    return path


def save_made(
    frames: Iterable[Image.Image],
    out: PathLike,
    settings: Mapping[str, Any],
    audio: PathLike | None = None,
    **changes: Any,
) -> Path:
    """`save_film` with the settings that the frames were made with, which say how they are played.

    audio: another sound. changes: of the `Playback`; None changes nothing. Raises `ConfigError`, `OutputError`.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    play = replace(Playback.of(settings), **changes)
    metadata: dict[str, Any] = {**settings, **changes, "ping_pong": play.ping_pong}
    metadata["fps"] = (
        int(play.fps) if play.fps == int(play.fps) else play.fps
    )  # 8 and 8.0 are one speed, and one metadata
    sound = audio or settings.get("audio")
    if sound is not None:
        read_sound(sound, 0.1)  # refuses what is none
        metadata |= {"audio": Path(sound).name, "audio_hash": file_hash(sound)}
    positions = settings.get("alphas")
    if changes and "seconds" in metadata and positions is not None:  # another length now
        metadata["frames"] = len(positions)
        del metadata["seconds"]
    order = None if positions is None else play.order(positions, bool(settings.get("loop")))
    return save_film(frames, out, fps=play.fps, metadata=metadata, order=order, quality=play.quality, audio=sound)


class _Coming:
    """Frames as they are made, checked one by one. failure: the error that the making of one ended in."""

    def __init__(self, frames: Iterable[Image.Image], transparent: bool) -> None:
        self._frames, self._transparent = frames, transparent
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[Image.Image]:
        size: tuple[int, int] | None = None
        try:
            for frame in self._frames:
                if size not in (None, frame.size):
                    raise _several_sizes(size, frame.size)
                size = frame.size
                yield _shown(frame, self._transparent)
        except Exception as error:
            self.failure = error
            raise
        if size is None:
            raise _no_frames()


def _no_frames() -> OutputError:
    return OutputError("There are no frames to save: give at least one.")


def _several_sizes(one: object, other: object) -> OutputError:
    return OutputError(f"The frames have several sizes, such as {one} and {other}: make them equal first.")


def read_settings(path: PathLike) -> dict[str, object] | None:
    """The settings that `save_film` stored in a film, contact sheet or folder (its first frame); None if none.

    Raises `ImageError` if the file is missing or damaged.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ImageError(f"settings are read from a path, not from {path!r:.100}.")
    file = Path(path)
    try:
        if file.is_dir():
            frames = frame_files(file)
            if not frames:
                return None
            file = frames[0]
        if not is_plain(file):
            raise ValueError("it is no plain file, but a pipe or a device")
        text = read_comment(file) if file.suffix.lower() in CODECS else _read_picture_comment(file)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"No settings can be read from {str(path)!r} ({error}): check the path.") from error
    try:
        settings = json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None  # somebody else's comment
    return settings if isinstance(settings, dict) else None


def contact_sheet(frames: Iterable[Image.Image], columns: int | None = None, gap: int = 4) -> Image.Image:
    """All frames in one picture, row by row on white, or on nothing if they are RGBA.

    columns: frames in a row; by default as square a grid as can be, at most 8 wide.
    gap: white pixels between frames.

    Raises `ConfigError` for a bad number, `OutputError` for no frames or frames of several sizes.
    """
    pictures = _pictures(frames)
    if columns is not None and columns < 1:
        raise ConfigError(f"columns is {columns!r}, but must be at least 1.")
    if gap < 0:
        raise ConfigError(f"gap is {gap!r}, but must be 0 or more pixels.")
    columns = min(columns or min(8, math.ceil(math.sqrt(len(pictures)))), len(pictures))
    rows = math.ceil(len(pictures) / columns)
    width, height = pictures[0].size
    mode = pictures[0].mode
    sheet = Image.new(
        mode,
        (columns * (width + gap) - gap, rows * (height + gap) - gap),
        "white" if mode == "RGB" else (255, 255, 255, 0),
    )
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def _shown(frame: Image.Image, transparent: bool) -> Image.Image:
    """A frame as a kind of file holds it: RGBA where both have opacity, else RGB."""
    return frame if transparent and frame.mode == "RGBA" else on_white(frame)


def _pictures(frames: Iterable[Image.Image], transparent: bool = True) -> list[Image.Image]:
    """All of them, before anything is touched on disk: an error in the making of a frame passes through as it is."""
    pictures = [_shown(frame, transparent) for frame in frames]
    if not pictures:
        raise _no_frames()
    sizes = sorted({picture.size for picture in pictures})
    if len(sizes) > 1:
        raise _several_sizes(*sizes[:2])
    return pictures


def _timing(count: int, fps: float, max_fps: float, tick: float) -> tuple[list[int], list[int]]:
    """Which frames to show, and each one's milliseconds, in whole ticks (of `tick` seconds).

    The ends of the frames are rounded, not their durations, so that rounding never adds up over a film.
    """
    shown = count if fps <= max_fps else max(1, int(count * max_fps / fps))
    indices = [round(i) for i in np.linspace(0, count - 1, shown)]  # first and last are always among them
    ends = [round((i + 1) * count / shown / fps / tick) for i in range(shown)]
    starts = [0, *ends[:-1]]
    return indices, [max(1, end - start) * round(tick * 1000) for start, end in zip(starts, ends, strict=True)]


def _write_gif(pictures: Sequence[Image.Image], file: Path, fps: float, settings: str | None) -> None:
    indices, milliseconds = _timing(len(pictures), fps, _MAX_GIF_FPS, 0.01)
    shown = [pictures[i] for i in indices]
    palette = _palette(shown)
    first, *others = (_to_palette(picture, palette) for picture in shown)
    comment = {"comment": settings.encode()} if settings is not None else {}
    first.save(
        file,
        format="GIF",
        save_all=True,
        append_images=others,
        duration=milliseconds,
        loop=0,
        palette=bytes(palette.getpalette() or ()),
        optimize=False,
        **comment,
    )


def _palette(pictures: Sequence[Image.Image]) -> Image.Image:
    """One palette for the whole film, so that colours do not flicker: white, and 255 chosen from up to 16 frames."""
    some = [pictures[i] for i in sorted({round(i) for i in np.linspace(0, len(pictures) - 1, 16)})]
    small = []
    for picture in some:
        copy = picture.copy()
        copy.thumbnail((96, 96), Image.Resampling.NEAREST)  # nearest: keeps the film's own colours, mixes no new ones
        small.append(copy)
    # Without the k-means the entries sit so far apart that dithering shows as specks.
    method = Image.Quantize.MAXCOVERAGE
    colours = contact_sheet(small, gap=0).quantize(255, method=method, kmeans=1).getpalette("RGB") or []
    image = Image.new("P", (1, 1))
    image.putpalette([255, 255, 255, *colours])
    return image


def _to_palette(picture: Image.Image, palette: Image.Image) -> Image.Image:
    """Dithered, save where the picture is white: error diffusion would strew specks over a flat background."""
    indexed = picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
    white = np.asarray(picture).min(axis=2) >= _NEAR_WHITE
    indexed.paste(0, mask=Image.fromarray(white))
    return indexed


def _write_webp(pictures: Sequence[Image.Image], file: Path, fps: float, settings: str | None, quality: int) -> None:
    exif = Image.Exif()
    if settings is not None:
        exif[ExifTags.Base.ImageDescription] = settings
    _write_animation(pictures, file, fps, format="WEBP", quality=quality, method=4, exif=exif)


def _write_apng(pictures: Sequence[Image.Image], file: Path, fps: float, settings: str | None) -> None:
    _write_animation(pictures, file, fps, format="PNG", pnginfo=png_info(settings))


def _write_animation(pictures: Sequence[Image.Image], file: Path, fps: float, **options: Any) -> None:
    indices, milliseconds = _timing(len(pictures), fps, _MAX_FPS, 0.001)
    first, *others = (pictures[i] for i in indices)
    first.save(file, save_all=True, append_images=others, duration=milliseconds, loop=0, **options)


def _read_picture_comment(file: Path) -> str | None:
    with Image.open(file, formats=READ_FORMATS) as image:
        info, exif = image.info, image.getexif()
        text = info.get(PNG_KEY) or info.get("comment") or exif.get(ExifTags.Base.ImageDescription)
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else text
