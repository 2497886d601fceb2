"""Films out: frames to .mp4, .gif, .webp, a contact sheet (.png) or a folder of PNG files, with the settings inside.

A film is written under a temporary name beside its place and moved there when complete, so that a failure or Ctrl-C
leaves neither half a film nor a damaged older one.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from ..config import FPS
from ..errors import ConfigError, ImageError, OutputError
from .atomic import replacing, temporary

#: Suffixes that `save_film` knows; a path without one means a folder of `frame_0000.png`, `frame_0001.png`, ...
FORMATS = (".mp4", ".gif", ".webp", ".png")

#: Key of the settings in PNG files. Elsewhere: mp4 `comment`, gif comment, webp EXIF ImageDescription.
PNG_KEY = "diffmorpher"

#: Browsers slow a frame of 10 ms or less down to 100 ms (gif counts in steps of 10 ms), so faster films skip frames.
_MAX_GIF_FPS, _MAX_WEBP_FPS = 50, 90
#: The longest frame is 100 s: gif's counter holds 655 s, and nobody wants a slower film.
MIN_FPS, MAX_FPS = 0.01, 240
#: Pixels at least this bright in all channels count as white background in a gif.
_NEAR_WHITE = 250
_FRAME_NAME = re.compile(r"frame_\d{4,}\.png")

PathLike = str | os.PathLike[str]


def check_output(out: PathLike) -> Path:
    """The path `out`, after a look at whether a film can be written there. Creates nothing; call it before long work.

    Raises `OutputError`: unknown suffix, no name, a folder where a file is wanted or the reverse, or a place that
    cannot be written. Folders on the way that do not exist yet are fine.
    """
    path = Path(out)
    if path.name in ("", "..") or path.name.lower() in FORMATS or "\0" in path.name:
        raise OutputError(f"Output {str(out)!r} has no name: give one such as 'morph.mp4'.")
    if path.suffix and path.suffix.lower() not in FORMATS:
        raise OutputError(
            f"Output {str(out)!r} ends in {path.suffix!r}: "
            f"use {', '.join(FORMATS)}, or no suffix for a folder of frames."
        )
    try:
        if path.suffix and path.is_dir():
            raise OutputError(f"Output {str(out)!r} is a folder: give a file name in it, or another name.")
        if not path.suffix and path.is_file():
            raise OutputError(
                f"Output {str(out)!r} is a file, but a name without suffix means a folder of frames: "
                f"add one of {', '.join(FORMATS)}, or give another name."
            )
        places = [*path.parents] if path.suffix else [path, *path.parents]
        nearest = next(place for place in places if os.path.lexists(place))
        if not nearest.is_dir():
            raise OutputError(
                f"Output {str(out)!r} cannot be created: {str(nearest)!r} is not a folder; choose another."
            )
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise OutputError(f"Output {str(out)!r} cannot be written: {str(nearest)!r} is read-only; choose another.")
    except OSError as error:
        raise _cannot_write(path, error) from error
    return path


def writes_over(out: PathLike, file: PathLike) -> bool:
    """Whether writing to `out` replaces that file, which may be a frame in a folder of frames."""
    place, there = Path(out).resolve(), Path(file).resolve()
    in_folder = not place.suffix and there.parent == place and _FRAME_NAME.fullmatch(there.name) is not None
    return place == there or in_folder


def save_film(
    frames: Iterable[Image.Image],
    out: PathLike,
    *,
    fps: float = FPS,
    metadata: Mapping[str, object] | None = None,
    ping_pong: bool = False,
) -> Path:
    """Write the frames to `out` in the format of its suffix and return its path.

    frames: pictures of one size, one or more; an .mp4 or a folder is written as they come, and holds none of them in memory.
    out: .mp4 (H.264, yuv420p; an odd side grows by one pixel), .gif and .webp (both looped), .png (a contact sheet), or
        no suffix: a folder of numbered PNG files, from which frames of an earlier film are removed.
    fps: frames per second, 0.01 to 240. A gif above 50 or a webp above 90, which browsers would play slowly, keeps its
        duration and skips frames.
    metadata: settings to store as JSON in the file (in each frame's file for a folder); see `read_settings`.
    ping_pong: a film plays forwards, then backwards to just before its first frame; no matter for sheets and folders.

    Raises `OutputError`; an older film at `out` is then still whole.
    """
    path = check_output(out)
    if isinstance(fps, bool) or not isinstance(fps, Real) or not MIN_FPS <= fps <= MAX_FPS:
        raise OutputError(f"fps is {fps!r}, but must be a number from {MIN_FPS} to {MAX_FPS} frames per second.")
    # In one order, whoever put them together: the same film has the same bytes.
    settings = json.dumps(dict(sorted(metadata.items())), default=str) if metadata is not None else None
    suffix = path.suffix.lower()
    as_they_come = not suffix or (suffix == ".mp4" and not ping_pong)
    coming = _Coming(frames)
    pictures = [] if as_they_come else _pictures(frames)
    try:
        if not suffix:
            _save_folder(coming, path, settings)
            return path
        with replacing(path) as part:
            if ping_pong and suffix != ".png":
                pictures = pictures + pictures[-2:0:-1]
            if suffix == ".mp4":
                rate = Fraction(float(fps)).limit_denominator(100_000)
                _write_mp4(coming if as_they_come else pictures, part, rate, settings)
            elif suffix == ".gif":
                _write_gif(pictures, part, fps, settings)
            elif suffix == ".webp":
                _write_webp(pictures, part, fps, settings)
            else:
                _write_png(contact_sheet(pictures), part, settings)
    except (OSError, ValueError, RuntimeError) as error:  # the latter two: Pillow on a size that a format cannot hold
        if coming.failure is error:
            raise
        raise _cannot_write(path, error) from error
    return path


def save_made(
    frames: Iterable[Image.Image],
    out: PathLike,
    settings: Mapping[str, Any],
    fps: float | None = None,
    ping_pong: bool | None = None,
) -> Path:
    """`save_film` with the settings that the frames were made with; None takes the speed that these name, or the usual one."""
    speed = settings.get("fps", FPS) if fps is None else fps
    both_ways = settings.get("ping_pong", False) if ping_pong is None else ping_pong
    whole = isinstance(speed, float) and speed.is_integer()  # 8 and 8.0 are one speed, and one metadata
    metadata = {**settings, "fps": int(speed) if whole else speed, "ping_pong": both_ways}
    metadata = dict(
        sorted(metadata.items())
    )  # in one order, whoever put them together: the same film has the same bytes
    return save_film(frames, out, fps=speed, metadata=metadata, ping_pong=both_ways)


class _Coming:
    """Frames as they are made, checked one by one. failure: the error that the making of one ended in."""

    def __init__(self, frames: Iterable[Image.Image]) -> None:
        self._frames = frames
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[Image.Image]:
        size: tuple[int, int] | None = None
        try:
            for frame in self._frames:
                if size not in (None, frame.size):
                    raise _several_sizes(size, frame.size)
                size = frame.size
                yield frame.convert("RGB")
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
    file = Path(path)
    try:
        if file.is_dir():
            frames = _frame_files(file)
            if not frames:
                return None
            file = frames[0]
        text = _read_mp4_comment(file) if file.suffix.lower() == ".mp4" else _read_picture_comment(file)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"No settings can be read from {str(path)!r} ({error}): check the path.") from error
    try:
        settings = json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None  # somebody else's comment
    return settings if isinstance(settings, dict) else None


def contact_sheet(frames: Iterable[Image.Image], columns: int | None = None, gap: int = 4) -> Image.Image:
    """All frames in one RGB picture, row by row on white.

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
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def _pictures(frames: Iterable[Image.Image]) -> list[Image.Image]:
    """All of them, before anything is touched on disk: an error in the making of a frame passes through as it is."""
    pictures = [frame.convert("RGB") for frame in frames]
    if not pictures:
        raise _no_frames()
    sizes = sorted({picture.size for picture in pictures})
    if len(sizes) > 1:
        raise _several_sizes(*sizes[:2])
    return pictures


def _cannot_write(path: Path, error: Exception) -> OutputError:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return OutputError(f"Output {str(path)!r} cannot be written ({reason}): free some space or choose another place.")


def _save_folder(pictures: Iterable[Image.Image], path: Path, settings: str | None) -> None:
    exists = path.is_dir()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Inside a folder that exists, as that may be a mount of its own, across which nothing can be moved.
    with temporary(path if exists else path.parent) as part:
        part.mkdir()
        for i, picture in enumerate(pictures):
            _write_png(picture, part / f"frame_{i:04d}.png", settings)
        if not exists:
            os.replace(part, path)
            return
        written = _frame_files(part)
        for file in written:
            os.replace(file, path / file.name)
        for name in {file.name for file in _frame_files(path)} - {file.name for file in written}:
            (path / name).unlink()


def _frame_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if _FRAME_NAME.fullmatch(file.name))


def _write_png(picture: Image.Image, file: Path, settings: str | None) -> None:
    info = PngInfo()
    if settings is not None:
        info.add_text(PNG_KEY, settings)
    picture.save(file, format="PNG", pnginfo=info)


def _write_mp4(pictures: Iterable[Image.Image], file: Path, rate: Fraction, settings: str | None) -> None:
    import av

    # The header counts in milliseconds unless told otherwise, which would round the film's duration.
    timescale = rate.numerator if rate.numerator >= 1000 else rate.numerator * 1000
    options = {"movflags": "+faststart", "movie_timescale": str(timescale)}
    try:
        with av.open(str(file), "w", format="mp4", options=options) as container:
            if settings is not None:
                container.metadata["comment"] = settings
            # With mbtree the same narrow frames (64 x 96, say) give other bytes from one time to the next.
            encoder = {"crf": "18", "x264-params": "mbtree=0"}
            stream = container.add_stream("libx264", rate=rate, options=encoder)
            stream.pix_fmt = "yuv420p"
            context = stream.codec_context
            context.time_base = 1 / rate
            context.color_range = 1  # these four as numbered in the standard (H.273): limited range,
            context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709 throughout
            for i, picture in enumerate(pictures):
                if i == 0:
                    stream.width, stream.height = (side + side % 2 for side in picture.size)  # yuv420p halves the sides
                array = np.asarray(picture)
                array = np.pad(array, ((0, array.shape[0] % 2), (0, array.shape[1] % 2), (0, 0)), mode="edge")
                frame = av.VideoFrame.from_ndarray(array, format="rgb24")
                # Without a matrix named here swscale takes BT.601, and the colours belie the tags.
                frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
                frame.pts, frame.time_base = i, 1 / rate
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    except av.FFmpegError as error:
        raise OSError(error.errno, error.strerror) from error


def _read_mp4_comment(file: Path) -> str | None:
    import av

    try:
        with av.open(str(file)) as container:
            return container.metadata.get("comment")
    except av.FFmpegError as error:
        raise OSError(error.errno, error.strerror) from error


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


def _write_webp(pictures: Sequence[Image.Image], file: Path, fps: float, settings: str | None) -> None:
    indices, milliseconds = _timing(len(pictures), fps, _MAX_WEBP_FPS, 0.001)
    first, *others = (pictures[i] for i in indices)
    exif = Image.Exif()
    if settings is not None:
        exif[ExifTags.Base.ImageDescription] = settings
    first.save(
        file,
        format="WEBP",
        save_all=True,
        append_images=others,
        duration=milliseconds,
        loop=0,
        quality=90,
        method=4,
        exif=exif,
    )


def _read_picture_comment(file: Path) -> str | None:
    with Image.open(file) as image:
        info, exif = image.info, image.getexif()
        text = info.get(PNG_KEY) or info.get("comment") or exif.get(ExifTags.Base.ImageDescription)
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else text
