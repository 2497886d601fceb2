"""Pictures in: what the user hands over becomes 8-bit sRGB at its own size, or an `ImageError` that says why not."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageFilter, ImageOps, UnidentifiedImageError

from ..errors import ConfigError, ImageError
from .places import is_plain

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any]

#: Decoders that strangers' files may reach, by Pillow's names: what people keep pictures in, and none that starts a program.
READ_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "JPEG2000", "PPM", "TGA", "ICO", "QOI")
#: How their names end.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
_POSTSCRIPT = (b"%!PS", b"\xc5\xd0\xd3\xc6")

#: Pixels on a side of the smallest picture that is taken, and pixels in all of the largest.
MIN_SIDE = 8
MAX_PIXELS = 100_000_000

#: (largest value, level of white) for greyscale deeper than 8 bits whose range the file does not state.
_GREY_RANGES = ((2, 1), (255, 255), (65535, 65535))  # up to 2: a float picture may overshoot 1 a little


def load_image(source: ImageSource, alpha: bool = False) -> Image.Image:
    """A picture as 8-bit RGB, its own size, upright, in sRGB, without metadata.

    alpha: as RGBA, with its transparency, instead of on white.

    source: a file in one of `READ_FORMATS` (its first frame if animated), a PIL image of any mode (at the frame it stands at,
        and left as it is), or a uint8 array of H x W (grey), H x W x 3 (RGB) or H x W x 4 (RGBA).

    EXIF orientation is applied, transparency is composed on white, an embedded ICC profile is converted to sRGB (one
    that is broken is ignored). 16-bit grey is scaled from [0, 65535]; 32-bit grey and float from [0, 1], [0, 255],
    [0, 65535] or [0, own maximum], the first of these that holds the values.

    Raises `ImageError`: missing, unreadable or damaged file; under 8 pixels on a side; over 100 megapixels, which is
    read in the header, before anything is decoded.
    """
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source), alpha)
    if isinstance(source, Image.Image):
        return _decode(source, "The picture given", alpha)
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError(
            f"A picture cannot be a {type(source).__name__}: give a path, a PIL image or a uint8 array of H x W x 3."
        )
    path = Path(source)
    what = f"Picture {str(path)!r}"
    try:
        if path.is_dir():
            raise ImageError(f"{what} is a folder: give the picture files in it one by one.")
        if not is_plain(path):
            raise ImageError(f"{what} is no plain file, but a pipe or a device: save it as a file first.")
        with path.open("rb") as file, warnings.catch_warnings():
            # Pillow warns from 89 megapixels on; the limit here is our own, and Pillow's is left as it is.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            start = file.read(4)
            if start.startswith(_POSTSCRIPT):
                raise ImageError(f"{what} is a PostScript drawing: export it as PNG.")
            if not start:
                raise ImageError(f"{what} is empty (0 bytes): copy or export it again.")
            file.seek(0)
            with Image.open(file, formats=READ_FORMATS) as image:
                return _decode(image, what, alpha)
    except FileNotFoundError as error:
        raise ImageError(f"{what} does not exist: check the path.") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{what} has more than 100 megapixels: make it smaller first.") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{what} is not a picture in a format that can be read: save it as PNG or JPEG.") from error
    except ImageError:
        raise
    except Exception as error:  # Pillow's plugins raise anything from SyntaxError to struct.error on a damaged header
        raise ImageError(f"{what} cannot be read ({_reason(error)}): check the file and its permissions.") from error


def fit_image(
    image: Image.Image, size: tuple[int, int], resize: str = "crop", focus: tuple[float, float] = (0.5, 0.5)
) -> Image.Image:
    """The picture at exactly `size` = (width, height) in pixels, aspect ratio kept, resampled with Lanczos.

    image: 8-bit RGB, as `load_image` returns it.
    resize: "crop" scales it to cover the size and cuts off the rest; "pad" scales it to fit inside and fills up with white;
        "blur" fills up with the picture itself, enlarged and blurred.
    focus: the point that a crop has in its middle, or as near to it as the picture allows, in shares of width and height.

    Raises `ConfigError` for another `resize` or a size below 1.
    """
    width, height = size
    if width < 1 or height < 1:
        raise ConfigError(f"The size is {width}x{height}, but must be at least 1x1.")
    if resize == "crop":
        # A fractional box leaves the cut to the resampling filter: no pixel is lost to rounding.
        return image.resize(size, Image.Resampling.LANCZOS, crop_box(image.size, size, focus))
    if resize in ("pad", "blur"):
        scale = min(width / image.width, height / image.height)
        inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        if resize == "blur":
            canvas = fit_image(image, size).filter(ImageFilter.GaussianBlur(min(size) / 16))
        else:
            canvas = Image.new("RGB", size, "white")
        offset = ((width - inner[0]) // 2, (height - inner[1]) // 2)
        canvas.paste(image.resize(inner, Image.Resampling.LANCZOS), offset)
        return canvas
    raise ConfigError(f"resize is {resize!r}, but must be 'crop', 'pad' or 'blur'.")


def crop_box(
    own: tuple[int, int], size: tuple[float, float], focus: tuple[float, float]
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of what a crop to the shape of `size` keeps of a picture of `own` pixels, in these pixels."""
    scale = max(size[0] / own[0], size[1] / own[1])
    width, height = min(size[0] / scale, own[0]), min(size[1] / scale, own[1])
    left = min(max(focus[0] * own[0] - width / 2, 0), own[0] - width)
    top = min(max(focus[1] * own[1] - height / 2, 0), own[1] - height)
    return left, top, left + width, top + height


def fit_opacity(
    image: Image.Image, size: tuple[int, int], resize: str = "crop", focus: tuple[float, float] = (0.5, 0.5)
) -> Image.Image:
    """The opacity of an RGBA picture as `fit_image` frames it, mode L; nothing is where a picture is filled up."""
    empty = ImageOps.invert(image.getchannel("A")).convert("RGB")
    return ImageOps.invert(fit_image(empty, size, resize, focus).getchannel(0))


def said_cut(names: Sequence[str], images: Sequence[Image.Image], size: tuple[int, int]) -> str:
    """A sentence on how much of each picture a crop to that size cuts off; empty where that is nothing.

    names: of the pictures; there are as many.
    """
    shares = []
    for image in images:
        own, wanted = image.width / image.height, size[0] / size[1]
        shares.append(round(100 * (1 - min(own, wanted) / max(own, wanted))))
    if not any(shares):
        return ""
    cut = ", ".join(f"{share} % of {Path(name).name}" for share, name in zip(shares, names, strict=True))
    return f"To fit {size[0]}x{size[1]}, {cut} is cut off."


def image_hash(image: Image.Image) -> str:
    """SHA-256 of size and RGB bytes (on white), 64 hex digits: the same picture from two files has the same hash."""
    digest = hashlib.sha256(f"{image.width}x{image.height}:".encode())
    digest.update(on_white(image).tobytes())
    return digest.hexdigest()


def _from_array(array: np.ndarray[Any, Any]) -> Image.Image:
    grey = array.ndim == 2
    if array.dtype != np.uint8 or not (grey or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError(
            f"A picture cannot be an array of {array.dtype} and shape {array.shape}: "
            "give uint8 of shape H x W, H x W x 3 or H x W x 4."
        )
    _check_size((array.shape[1], array.shape[0]), "The array given")
    return Image.fromarray(array)


def _check_size(size: tuple[int, int], what: str) -> None:
    width, height = size
    if min(size) < MIN_SIDE:
        raise ImageError(f"{what} is {width}x{height} pixels: the smallest allowed is {MIN_SIDE}x{MIN_SIDE}.")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{what} is {width}x{height} pixels, more than 100 megapixels: make it smaller first.")


def _decode(image: Image.Image, what: str, alpha: bool) -> Image.Image:
    """Header checks first, then pixels; `what` opens the error's sentence."""
    _check_size(image.size, what)
    if image.format == "EPS":  # its decoder would run the file as a program in Ghostscript
        raise ImageError(f"{what} is a PostScript drawing: export it as PNG.")
    try:
        image.load()
        return _to_rgb(_upright(image), alpha)
    except Exception as error:  # as above: damaged data surfaces as almost any exception
        raise ImageError(f"{what} is damaged ({_reason(error)}): copy or export it again.") from error


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).rstrip(".")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data raises anything, and is no reason to refuse a sound picture
        return image


def on_white(image: Image.Image) -> Image.Image:
    """A picture with transparency as RGB on white; any other as RGB."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    white = Image.new("RGB", image.size, "white")
    white.paste(image.convert("RGB"), mask=image.getchannel("A"))
    return white


def _to_rgb(image: Image.Image, keep: bool = False) -> Image.Image:
    """Any mode to a new RGB image: colours to sRGB first, then transparency composed on white, or kept, as RGBA."""
    if image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data and _is_8_bit(image) else None
    rgb = _to_srgb(image)
    if keep or alpha is not None:
        rgb = rgb.copy()  # which may be the caller's own
        rgb.putalpha(255 if alpha is None else alpha)
        rgb = rgb if keep else on_white(rgb)
    rgb.info = {}  # a profile or an orientation left in here would be applied a second time later
    return rgb


def _is_8_bit(image: Image.Image) -> bool:
    return not image.mode.startswith(("I", "F"))


def _to_srgb(image: Image.Image) -> Image.Image:
    icc = image.info.get("icc_profile")
    if not _is_8_bit(image):
        colours = _grey_to_8_bit(image)
    elif image.mode in ("1", "L", "LA"):
        colours = image.convert("L")
    else:
        colours = image if image.mode == "CMYK" else image.convert("RGB")
    if icc:
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
            if profile.profile.xcolor_space.strip() == "RGB":
                colours = colours.convert("RGB")  # greyscale JPEGs often carry an RGB profile
            srgb = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(colours, profile, srgb, outputMode="RGB")
            assert converted is not None  # None is for conversion in place
            return converted
        except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
            pass  # a broken profile, or one for other channels than the picture has: do as if there were none
    return colours.convert("RGB")


def _grey_to_8_bit(image: Image.Image) -> Image.Image:
    """Modes "I;16*", "I" and "F" to "L", scaled and rounded where Pillow's `convert` clips at 255."""
    values = np.asarray(image).astype(np.float32)
    values[np.isnan(values)] = 0
    if image.mode.startswith("I;16"):
        white = 65535.0
    else:
        peak = float(values[np.isfinite(values)].max(initial=0))
        white = next((white for largest, white in _GREY_RANGES if peak <= largest), peak)
    return Image.fromarray(np.rint(np.clip(values / white, 0, 1) * 255).astype(np.uint8))
