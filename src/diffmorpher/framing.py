"""How pictures are framed: the size that a model can work at, as asked for or the nearest of a shape, and their crops."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .arguments import focus_points
from .config import shown
from .errors import ConfigError, ImageError
from .files.focus import settled_focus
from .files.pictures import ImageSource, fit_image, fit_opacity, load_image, on_white
from .models.backbone import Backbone
from .settings import MAX_SIDE, SHAPES, check_size


@dataclass(frozen=True)
class Framed:
    """Images at a working size: pictures. whole: as they were, on white. focus: where cut. opacity: (K, H, W) uint8."""

    pictures: list[Image.Image]
    whole: list[Image.Image]
    focus: tuple[str, ...]
    opacity: Tensor | None = None


def framed(
    images: Sequence[ImageSource], size: tuple[int, int], resize: str, focus: str | Sequence[str], alpha: bool = False
) -> Framed:
    """The images at that size, with their opacity if asked for. Raises `ConfigError`, `ImageError`."""
    focus_points(focus, len(images))  # refuses what cannot be
    loaded = [load_image(image, alpha) for image in images]
    settled = settled_focus([focus] if isinstance(focus, str) else focus, loaded)
    points = focus_points(settled, len(images))
    shown = [on_white(image) for image in loaded]
    pictures = [fit_image(image, size, resize, point) for image, point in zip(shown, points, strict=True)]
    if not alpha:
        return Framed(pictures, shown, settled)
    opacity = [fit_opacity(image, size, resize, point) for image, point in zip(loaded, points, strict=True)]
    if all(each.getextrema()[0] == 255 for each in opacity):
        raise ImageError(
            "no picture has anything transparent in it: leave out the transparency, or give another picture."
        )
    return Framed(pictures, shown, settled, torch.from_numpy(np.stack([np.asarray(each) for each in opacity])))


def working_size(backbone: Backbone, own: tuple[int, int], size: Sequence[int] | str | None = None) -> tuple[int, int]:
    """(width, height) in pixels that the model can work at; None takes `own`, the model's, a shape the nearest that suits it.

    Raises `ConfigError`.
    """
    factor, smallest = backbone.size_multiple, backbone.smallest_side
    if isinstance(size, str):
        return _of_shape(size, own, factor, smallest)
    try:
        width, height = map(index, size or own)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the size is {shown(size)}, but must be two whole numbers, (width, height).") from error
    if max(abs(width), abs(height)) >= 10**9:
        check_size((width, height))  # says so, with however many digits
    for side in (width, height):
        if not smallest <= side <= MAX_SIDE or side % factor:
            near = min(MAX_SIDE, max(smallest, (side + factor // 2) // factor * factor))
            raise ConfigError(
                f"the size {width}x{height} cannot be used: each side must be a multiple of {factor} "
                f"from {smallest} to {MAX_SIDE}; for {side} take {near}."
            )
    return width, height


def _of_shape(shape: str, own: tuple[int, int], factor: int, smallest: int) -> tuple[int, int]:
    """Of the sizes that are that shape, to a hundredth, the one whose area is nearest to the model's own."""
    if shape not in SHAPES:
        raise ConfigError(f"the size is {shape!r}, but must be (width, height), or one of {', '.join(SHAPES)}.")
    ratio, area = SHAPES[shape][0] / SHAPES[shape][1], math.prod(own)
    smallest = max(smallest, 24)  # below which frames cannot be compared
    longest = int(2 * math.sqrt(area * max(ratio, 1 / ratio)))
    sides = range(-(-smallest // factor) * factor, max(longest, smallest) + factor, factor)
    sizes = [(w, h) for w in sides for h in sides if area / 2 <= w * h <= area * 2]

    def miss(size: tuple[int, int]) -> tuple[float, float]:
        return round(abs(math.log(size[0] / size[1] / ratio)), 2), abs(math.log(math.prod(size) / area))

    return min(sizes, key=miss)


def far_from(size: tuple[int, int], own: tuple[int, int]) -> str:
    """A sentence where a size is far from what the model was made for, else ""."""
    share = math.prod(size) / math.prod(own)
    if 0.5 <= share <= 2 and max(size) <= 2.5 * min(size):
        return ""
    return (
        f"{size[0]}x{size[1]} is far from the {own[0]}x{own[1]} that the model was made for: things may be repeated, or fall "
        "apart."
    )


def warn_of_photographs(
    pictures: Sequence[Image.Image], names: Sequence[str], photographs: bool, stacklevel: int
) -> None:
    """Warn where a model that knows only things on white is given something else."""
    unlike = [name for name, picture in zip(names, pictures, strict=True) if not photographs and not _on_white(picture)]
    if unlike:
        warnings.warn(
            f"{', '.join(unlike)}: not on white, as a photograph is, but the bundled model knows 3D emoji and such things on "
            "white alone: for photographs choose another, such as sd15 ('diffmorpher info' says what each takes).",
            stacklevel=stacklevel + 1,
        )


def _on_white(picture: Image.Image) -> bool:
    """Whether most of a picture's border is near white."""
    pixels = np.asarray(picture.convert("RGB")).min(axis=2)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return float((border > 225).mean()) > 0.5


def warn_of(size: tuple[int, int], own: tuple[int, int], stacklevel: int) -> None:
    """Warn where it is far."""
    if said := far_from(size, own):
        warnings.warn(said, stacklevel=stacklevel + 1)
