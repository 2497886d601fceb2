"""What the command line checks before a model is loaded: each mistake raises a `UserError` within a second."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from ..errors import ConfigError, ImageError, LoraError, OutputError
from ..files.films import MAX_FPS, MIN_FPS, check_output
from ..files.pictures import MIN_SIDE, image_hash, load_image
from ..method.schedule import uniform_positions

#: An hour at 24 frames per second; gif and webp hold them all in memory.
MAX_FRAMES = 86_400


def parse_size(text: str | None) -> tuple[int, int] | None:
    """ "512x384" as (width, height); None stays None. What the model asks of a size it says itself."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", text)
    if match is None:
        raise ConfigError(f"the size {text!r} is not of the form WxH: give two whole numbers, such as 512x512.")
    width, height = int(match[1]), int(match[2])
    if min(width, height) < MIN_SIDE:
        raise ConfigError(f"the size {text} is too small: give at least {MIN_SIDE}x{MIN_SIDE}.")
    return width, height


def parse_batch_size(text: str | None) -> int | str | None:
    """A whole number as an int; `SampleConfig` judges the rest."""
    return int(text) if text is not None and re.fullmatch(r"-?[0-9]{1,9}", text) else text


def check_seed(seed: int | None) -> None:
    if seed is not None and not 0 <= seed < 2**63:
        raise ConfigError(f"the seed is {seed}, but must be a whole number from 0 to 2^63 - 1.")


def check_fps(fps: float | None) -> None:
    if fps is not None and not MIN_FPS <= fps <= MAX_FPS:
        raise OutputError(f"fps is {fps:g}, but must be a number from {MIN_FPS} to {MAX_FPS} frames per second.")


def check_port(port: int | None) -> None:
    if port is not None and not 1 <= port <= 65535:
        raise ConfigError(f"the port is {port}, but must be a whole number from 1 to 65535.")


def parse_auth(text: str | None) -> tuple[str, str] | None:
    """ "name:password" as a pair; None stays None. The message does not repeat what may be a password."""
    if text is None:
        return None
    user, _, password = text.partition(":")
    if not user or not password:
        raise ConfigError("--auth needs a name and a password with a colon between them, such as ann:secret.")
    return user, password


def check_alone(*options: tuple[str, object]) -> None:
    """Refuse options, each with its value, that contradict each other if more than one was typed."""
    typed = [name for name, value in options if value is not None and value is not False and value != []]
    if len(typed) > 1:
        raise ConfigError(f"{' and '.join(typed)} contradict each other: leave one out.")


def warn_unused(reason: str, options: Mapping[str, object]) -> None:
    """Say which options that were typed change nothing because of another one."""
    for name, value in options.items():
        if value is not None:
            warnings.warn(f"{name} changes nothing with {reason}.", stacklevel=2)


def check_counts(images: int, prompts: int, loras: int, frames: int | None, loop: bool) -> None:
    """Do the numbers of things go together?"""
    if images < 2:
        raise ConfigError("a morph needs at least two images: give another one.")
    if prompts not in (0, 1, images):
        raise ConfigError(f"{prompts} prompts were given for {images} images: give one for all, one each, or none.")
    if loras not in (0, images):
        raise ConfigError(f"{loras} LoRA files were given for {images} images: give one for each.")
    if frames is not None:
        if not 2 <= frames <= MAX_FRAMES:
            raise ConfigError(f"frames is {frames}, but must be a whole number from 2 to {MAX_FRAMES}.")
        uniform_positions(frames, images, loop)


def check_loras(files: Sequence[Path]) -> None:
    """Read them once, as far as that goes without the model; imports torch if there are any."""
    for file in files:
        if not file.is_file():
            raise LoraError(f"the LoRA {str(file)!r} does not exist or is a folder: check the path.")
    for file in files:
        from ..files.loras import load_lora

        load_lora(file)


def check_outputs(out: Path, frames: Path | None, path: Path | None, inputs: Sequence[Path]) -> None:
    """Can the film, the folder of frames and the path file be written, each in a place of its own?"""
    check_output(out)
    if frames is not None:
        if frames.suffix:
            raise OutputError(f"--save-frames {str(frames)!r} is a folder's name, which must not have a suffix here.")
        check_output(frames)
    if path is not None:
        check_file(path)
    taken = {file.resolve(): "is a picture to be morphed" for file in inputs}
    for place in (out, frames, path):
        if place is not None:
            if place.resolve() in taken:
                raise OutputError(f"output {str(place)!r} {taken[place.resolve()]}: choose another name.")
            taken[place.resolve()] = "is asked for twice"


def check_file(file: Path) -> None:
    """Can a file be written there? Folders on the way may be missing."""
    try:
        if not file.name or file.is_dir():
            raise OutputError(f"output {str(file)!r} is a folder: give a file name.")
        nearest = next(folder for folder in file.parents if os.path.lexists(folder))
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise OutputError(f"output {str(file)!r} cannot be written: {str(nearest)!r} is no writable folder.")
    except OSError as error:
        raise OutputError(f"output {str(file)!r} cannot be written ({error.strerror}): choose another.") from error


def load_pictures(files: Sequence[Path], loop: bool) -> list[Image.Image]:
    """The pictures, of which no two neighbours are the same."""
    pictures = [load_image(file) for file in files]
    hashes = [image_hash(picture) for picture in pictures]
    for i in range(len(files) if loop else len(files) - 1):
        j = (i + 1) % len(files)
        if hashes[i] == hashes[j]:
            raise ImageError(
                f"{str(files[i])!r} and {str(files[j])!r} are the same picture, so there is nothing to morph: "
                "give two that differ."
            )
    return pictures
