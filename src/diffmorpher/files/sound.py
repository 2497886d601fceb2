"""Sound under a film: any file that PyAV reads, cut to the film's length; and where its beats are."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SoundError
from .places import as_file

#: Of all sound that is written, which Opus asks for; two channels.
RATE = 48_000
#: FFmpeg's formats that strangers' films and sounds may be: what people keep them in, and none that names other files.
FILMS = ("mov", "mp4", "m4a", "matroska", "webm")
SOUNDS = (*FILMS, "wav", "w64", "mp3", "flac", "ogg", "aac", "ac3", "aiff", "caf", "au", "amr", "asf", "avi")
#: Samples a second that a file may say it has: from telephones' far below to beyond any recorder's.
RATES = (1_000, 1_000_000)
#: Seconds in which a sound fades out that is longer than the film; a quarter of a short film.
FADE = 1.0
#: Seconds in which the motion that a beat sets off dies away; what moves without a beat, of the mean.
_DECAY, _FLOOR = 0.12, 0.1
#: Samples of a spectrum, and from one to the next.
_WINDOW, _HOP = 2048, 512

Array = np.ndarray[Any, np.dtype[np.float32]]


def open_media(file: str | os.PathLike[str], formats: Sequence[str]) -> Any:
    """A film or sound opened for reading, as one of these of FFmpeg's formats: lists of other files are none of them.

    Raises `av.FFmpegError`.
    """
    import av

    return av.open(as_file(file), options={"format_whitelist": ",".join(formats), "protocol_whitelist": "file"})


def read_sound(file: str | os.PathLike[str], seconds: float | None = None) -> Array:
    """The sound in a file, (2, N) float32 at 48 kHz; the first `seconds` of it, fading out where there is more.

    Raises `SoundError`.
    """
    import av

    name = str(file)
    if not Path(file).is_file():
        raise SoundError(f"the sound {name!r} does not exist or is a folder: check the path.")
    wanted = None if seconds is None else round(seconds * RATE)
    parts: list[Array] = []
    read = 0
    try:
        with open_media(file, SOUNDS) as container:
            if not container.streams.audio:
                raise SoundError(f"{name!r} holds no sound: give a wav, mp3, flac, ogg or m4a file.")
            resampler = av.AudioResampler(format="fltp", layout="stereo", rate=RATE)
            for frame in container.decode(audio=0):
                if not RATES[0] <= frame.sample_rate <= RATES[1]:  # the resampler's tables grow with it, to gigabytes
                    raise ValueError(f"it says that it has {frame.sample_rate:,} samples a second")
                parts += [each.to_ndarray().astype(np.float32) for each in resampler.resample(frame)]
                read += sum(part.shape[1] for part in parts[-1:])
                if wanted is not None and read > wanted:
                    break
            else:
                parts += [each.to_ndarray().astype(np.float32) for each in resampler.resample(None)]
    except (av.FFmpegError, ValueError) as error:
        reason = "no kind of file that is read" if getattr(error, "errno", None) == errno.EINVAL else error
        raise SoundError(
            f"the sound {name!r} cannot be read ({reason}): save it as wav, mp3, flac, ogg or m4a."
        ) from error
    sound = np.concatenate(parts, axis=1) if parts else np.zeros((2, 0), np.float32)
    if sound.shape[1] == 0:
        raise SoundError(f"{name!r} holds no sound: give a wav, mp3, flac, ogg or m4a file.")
    if wanted is None or sound.shape[1] <= wanted:
        return sound
    sound = sound[:, :wanted].copy()
    fade = min(round(FADE * RATE), wanted // 4)
    sound[:, wanted - fade :] *= np.linspace(1, 0, fade, dtype=np.float32)
    return sound


def beat(file: str | os.PathLike[str], gaps: int, fps: float) -> list[float]:
    """How much of the way a film that follows the sound covers in each of its gaps: the strength of what sets in then.

    fps: gaps per second. Sums to 1; even where the sound is silent throughout. Raises `SoundError`.
    """
    strength, hop = _onsets(read_sound(file, gaps / fps + 1))
    times = np.arange(len(strength) + 1) * hop
    cumulated = np.concatenate([[0.0], np.cumsum(strength)])
    steps = np.diff(np.interp(np.arange(gaps + 1) / fps, times, cumulated))
    total = float(steps.sum())
    if total <= 1e-9:
        return [1 / gaps] * gaps
    steps = steps + _FLOOR * total / gaps
    return [float(step) for step in steps / steps.sum()]


def _onsets(sound: Array) -> tuple[np.ndarray[Any, Any], float]:
    """Onset strength, and the seconds from one value to the next: how much louder each frequency gets, on a logarithmic scale
    (spectral flux), every onset dying away."""
    mono = np.pad(sound.mean(axis=0), (_WINDOW // 2, _WINDOW))
    starts = np.arange(0, len(mono) - _WINDOW, _HOP)
    window = np.hanning(_WINDOW).astype(np.float32)
    before = np.zeros(_WINDOW // 2 + 1)
    flux = np.zeros(len(starts))
    for i, start in enumerate(starts):  # one by one: a song's spectrum takes a gigabyte
        loud = np.log1p(100 * np.abs(np.fft.rfft(mono[start : start + _WINDOW] * window)))
        flux[i] = np.maximum(loud - before, 0).mean()
        before = loud
    flux = np.maximum(flux - np.median(flux), 0)  # a sound that goes on always flickers a little
    hop = _HOP / RATE
    decay = np.exp(-np.arange(0, 5 * _DECAY, hop) / _DECAY)
    return np.convolve(flux, decay / decay.sum())[: len(flux)], hop
