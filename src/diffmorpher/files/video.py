"""Films as video files: H.264 in .mp4, VP9 in .webm, ProRes 422 in .mov, FFV1 in .mkv; written and read through PyAV."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import OutputError
from .places import as_file
from .playback import Quality
from .sound import FILMS, RATE, Array, open_media


@dataclass(frozen=True)
class Codec:
    """How a kind of file is encoded. format: of its pixels. sound: its codec. qualities: the encoder's options for each.
    transparent: format of pixels with opacity; "" where a kind of file has none."""

    container: str
    name: str
    format: str
    options: dict[str, str]
    sound: str
    qualities: dict[Quality, dict[str, str]] = field(default_factory=dict)
    transparent: str = ""

    @property
    def is_rgb(self) -> bool:
        return not self.format.startswith("yuv")


def _steps(option: str, small: int, good: int, best: int) -> dict[Quality, dict[str, str]]:
    return {"small": {option: str(small)}, "good": {option: str(good)}, "best": {option: str(best)}}


#: By suffix. FFV1 keeps the frames bit for bit, as RGB; the others are BT.709 in limited range.
CODECS = {
    # With mbtree the same narrow frames (64 x 96, say) give other bytes from one time to the next.
    ".mp4": Codec("mp4", "libx264", "yuv420p", {"x264-params": "mbtree=0"}, "aac", _steps("crf", 26, 18, 10)),
    ".webm": Codec(
        "webm",
        "libvpx-vp9",
        "yuv420p",
        {"b": "0", "deadline": "good", "cpu-used": "2"},
        "libopus",
        _steps("crf", 40, 28, 12),
        "yuva420p",
    ),
    # Profiles LT, 422 and HQ; with opacity 4444, and XQ.
    ".mov": Codec(
        "mov", "prores_ks", "yuv422p10le", {"vendor": "apl0"}, "pcm_s16le", _steps("profile", 1, 2, 3), "yuva444p10le"
    ),
    ".mkv": Codec("matroska", "ffv1", "bgr0", {"level": "3", "g": "1", "slicecrc": "1"}, "flac", {}, "bgra"),
}

#: In place of one that PyAV may be built without, the first that is there; the rates are such that no block is seen.
_IN_PLACE = {".mp4": ("libopenh264", "mpeg4")}
_RATES: dict[Quality, dict[str, str]] = {"small": {"b": "3M"}, "good": {"b": "12M"}, "best": {"b": "40M"}}


def codec_for(suffix: str) -> Codec | None:
    """How such a film is encoded here; None where it cannot be."""
    codec = CODECS[suffix]
    if _has(codec.name):
        return codec
    other = next(filter(_has, _IN_PLACE.get(suffix, ())), None)
    return replace(codec, name=other, options={}, qualities=_RATES) if other else None


def check_encoder(file: Path) -> None:
    """Raise `OutputError` for a video that FFmpeg, as PyAV was built with it here, cannot make, and say of another encoder
    that is taken; what is no video costs nothing."""
    suffix = file.suffix.lower()
    if suffix not in CODECS:
        return
    import av

    wanted, found = CODECS[suffix].name, codec_for(suffix)
    without = f"the encoder {wanted}, which PyAV {av.__version__} is built without here"
    better = "install PyAV from its own wheels (pip install --force-reinstall av)."
    if found is None:
        others = [other for other in CODECS if codec_for(other)]
        raise OutputError(
            f"Output {str(file)!r} needs {without}: use {', '.join([*others, '.gif', '.webp'])}, or {better}"
        )
    if found.name != wanted:
        plays = ", which browsers do not play" if found.name == "mpeg4" else ""
        warnings.warn(f"{file} is better made with {without}: {found.name} is taken{plays}; {better}", stacklevel=3)


def _has(encoder: str) -> bool:
    import av

    try:
        return bool(av.codec.Codec(encoder, "w"))
    except ValueError:  # av's UnknownCodecError
        return False


def write_video(
    pictures: Iterable[Image.Image],
    file: Path,
    suffix: str,
    rate: Fraction,
    settings: str | None,
    quality: Quality,
    sound: Array | None = None,
) -> None:
    """Write pictures of one size as they come; a side that the pixels' format halves grows by one pixel if odd.

    pictures: RGB, or all RGBA for a kind of file that holds opacity.

    suffix: which of `CODECS`; settings: stored as the file's comment. sound: as `read_sound` returns it.
    Raises `OSError`.
    """
    import av

    codec = codec_for(suffix) or CODECS[suffix]
    # The header counts in milliseconds unless told otherwise, which would round the film's duration.
    timescale = rate.numerator if rate.numerator >= 1000 else rate.numerator * 1000
    options = {"fflags": "+bitexact"}  # Matroska's files have a random number inside otherwise
    if suffix in (".mp4", ".mov"):
        keys = "+use_metadata_tags" if suffix == ".mov" else ""  # its own comment holds 64 kB
        options = {"movflags": "+faststart" + keys, "movie_timescale": str(timescale)}
    try:
        with av.open(as_file(file), "w", format=codec.container, options=options) as container:
            if settings is not None:
                container.metadata["comment"] = settings
            rest = iter(pictures)
            first = [*islice(rest, 1)]
            transparent = bool(first) and first[0].mode == "RGBA"
            encoder = codec.options | codec.qualities.get(quality, {})
            if transparent and suffix == ".mov":
                encoder |= {"profile": "5" if quality == "best" else "4"}
            stream: Any = container.add_stream(codec.name, rate=rate, options=encoder)
            stream.pix_fmt = codec.transparent if transparent else codec.format
            context = stream.codec_context
            context.time_base = 1 / rate
            _tag(context, codec)
            heard = _Sound(container, codec.sound, sound) if sound is not None else None
            for i, picture in enumerate(chain(first, rest)):
                frame = _frame(picture, codec, stream.pix_fmt)
                _tag(frame, codec)
                if i == 0:
                    stream.width, stream.height = frame.width, frame.height
                frame.pts, frame.time_base = i, 1 / rate
                container.mux(stream.encode(frame))
                if heard is not None:
                    heard.write((i + 1) / rate)
            container.mux(stream.encode(None))
            if heard is not None:
                heard.close()
    except av.FFmpegError as error:
        raise OSError(error.errno, error.strerror) from error


def _tag(part: Any, codec: Codec) -> None:
    """As numbered in the standard (H.273): BT.709 throughout, limited range; or full-range RGB with sRGB's curve."""
    part.color_range = 2 if codec.is_rgb else 1
    part.colorspace, part.color_primaries, part.color_trc = (0, 1, 13) if codec.is_rgb else (1, 1, 1)


class _Sound:
    """The sound of a video, written beside the frames as they come, so that players find both together."""

    def __init__(self, container: Any, codec: str, sound: Array) -> None:
        self._container, self._sound, self._written = container, sound, 0
        self._stream = container.add_stream(codec, rate=RATE, layout="stereo")

    def write(self, seconds: Fraction) -> None:
        """As much of it as belongs to the first `seconds`."""
        import av

        end = min(round(seconds * RATE), self._sound.shape[1])
        if end > self._written:
            part = np.ascontiguousarray(self._sound[:, self._written : end])
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts, frame.time_base = RATE, self._written, Fraction(1, RATE)
            self._container.mux(self._stream.encode(frame))
            self._written = end

    def close(self) -> None:
        self._container.mux(self._stream.encode(None))


def _frame(picture: Image.Image, codec: Codec, pixels: str) -> Any:
    import av

    array, own = np.asarray(picture), "rgba" if picture.mode == "RGBA" else "rgb24"
    if codec.is_rgb:
        return av.VideoFrame.from_ndarray(array, format=own).reformat(format=pixels)
    array = np.pad(array, ((0, array.shape[0] % 2), (0, array.shape[1] % 2), (0, 0)), mode="edge")
    frame = av.VideoFrame.from_ndarray(array, format=own)
    # Without a matrix named here swscale takes BT.601, and the colours belie the tags.
    return frame.reformat(format=pixels, dst_colorspace="ITU709", dst_color_range="MPEG")


def read_comment(file: Path) -> str | None:
    """The settings that `write_video` stored. Raises `OSError`."""
    import av

    try:
        with open_media(file, FILMS) as container:
            return next((text for key, text in container.metadata.items() if key.lower() == "comment"), None)
    except av.FFmpegError as error:
        raise OSError(error.errno, error.strerror) from error
