"""Where in a picture that is what matters: its largest face, else what stands out from its border."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from .pictures import on_white

#: Longer side at which a picture is looked at for what stands out, and for faces.
_SMALL, _FOR_FACES = 96, 480


def what_matters(image: Image.Image) -> tuple[float, float]:
    """The point that a crop of an RGB picture should have in its middle, in shares of width and height."""
    return _face(image) or _what_stands_out(image)


def settled_focus(focus: Sequence[str], images: Sequence[Image.Image]) -> tuple[str, ...]:
    """Focuses with a point in place of each "auto"; one for all, or one for each image, or none."""
    if "auto" not in focus:
        return tuple(focus)
    each = focus if len(focus) == len(images) else [*focus] * len(images)
    return tuple(
        "{:.3f},{:.3f}".format(*what_matters(on_white(image))) if one == "auto" else one
        for one, image in zip(each, images, strict=True)
    )


def _face(image: Image.Image) -> tuple[float, float] | None:
    """The middle of the largest face, by OpenCV's detector of Haar features; None where there is none, or no OpenCV."""
    try:
        import cv2
    except ModuleNotFoundError:  # the extra "faces"
        return None
    copy = image.copy()
    copy.thumbnail((_FOR_FACES, _FOR_FACES))
    detector = cv2.CascadeClassifier(str(Path(cv2.__file__).parent / "data" / "haarcascade_frontalface_default.xml"))
    least = max(24, min(copy.size) // 10)
    faces = detector.detectMultiScale(np.asarray(copy.convert("L")), 1.1, 8, minSize=(least, least))
    if not len(faces):
        return None
    x, y, width, height = max(faces, key=lambda face: (face[2] * face[3], *face))
    return (x + width / 2) / copy.width, (y + height / 2) / copy.height


def _what_stands_out(image: Image.Image) -> tuple[float, float]:
    """The centre of what has colours that the picture's border has not: what is cut off is most often background."""
    small = image.copy()
    small.thumbnail((_SMALL, _SMALL))
    colours = np.asarray(small.filter(ImageFilter.GaussianBlur(1)).convert("YCbCr"), dtype=float) * (1, 2, 2)
    border = np.concatenate([colours[0], colours[-1], colours[1:-1, 0], colours[1:-1, -1]])
    apart = np.linalg.norm(colours[:, :, None] - border[::2], axis=3)  # (h, w, border)
    salience = np.quantile(apart, 0.05, axis=2)
    weight = np.square(np.maximum(salience - np.quantile(salience, 0.5), 0))
    if weight.sum() <= 1e-9:
        return 0.5, 0.5
    y, x = np.mgrid[: small.height, : small.width] + 0.5
    return float((weight * x).sum() / weight.sum() / small.width), float(
        (weight * y).sum() / weight.sum() / small.height
    )
