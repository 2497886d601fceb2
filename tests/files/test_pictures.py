"""Pictures in: each kind of file is written by Pillow (or by hand, byte by byte) and compared with known pixels."""

from __future__ import annotations

import io
import os
import struct
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageChops, ImageCms, ImageDraw

from diffmorpher.errors import ConfigError, ImageError
from diffmorpher.files.films import read_settings
from diffmorpher.files.pictures import fit_image, image_hash, load_image, said_cut
from diffmorpher.web.checks import check_picture


def four_corners(width: int = 48, height: int = 32) -> Image.Image:
    """Red, green / blue, yellow: no two of the eight orientations look the same."""
    picture = Image.new("RGB", (width, height), "red")
    picture.paste((0, 255, 0), (width // 2, 0, width, height // 2))
    picture.paste((0, 0, 255), (0, height // 2, width // 2, height))
    picture.paste((255, 255, 0), (width // 2, height // 2, width, height))
    return picture


def noise(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def largest_difference(one: Image.Image, other: Image.Image) -> int:
    assert one.size == other.size
    return max(high for _, high in ImageChops.difference(one.convert("RGB"), other.convert("RGB")).getextrema())


def swapped_profile() -> bytes:
    """sRGB with the primaries of red and green exchanged: a picture converted through it changes unmistakably."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(data[i : i + 4]): i for i in range(132, 132 + 12 * struct.unpack(">I", data[128:132])[0], 12)}
    red, green = tags[b"rXYZ"] + 4, tags[b"gXYZ"] + 4
    data[red : red + 8], data[green : green + 8] = data[green : green + 8], data[red : red + 8]
    return bytes(data)


def bent_profile() -> bytes:
    """sRGB with its exponent of 2.4 replaced by 1: linear light is (v + 0.055) / 1.055."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    exponent = struct.pack(">i", round(2.4 * 65536))
    assert exponent in data
    return bytes(data.replace(exponent, struct.pack(">i", 65536)))


def cmyk_profile(lab: tuple[int, int, int]) -> bytes:
    """An ICC profile by which all inks but black leave this one colour, in the 8-bit coding of CIELAB."""
    ramps = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    table += ramps * 4 + bytes([*lab, 0, 128, 128]) * 2**3 + ramps * 3
    header = bytearray(128)
    header[0:4] = struct.pack(">I", 128 + 4 + 12 + len(table))
    header[8:12] = bytes([2, 0x40, 0, 0])
    header[12:24] = b"prtrCMYKLab "
    header[36:40] = b"acsp"
    header[68:80] = struct.pack(">3i", 63190, 65536, 54061)  # D50
    return bytes(header) + struct.pack(">I4sII", 1, b"A2B0", 144, len(table)) + table


def png(width: int, height: int) -> bytes:
    """A PNG of that size in its header, with correct checksums, and hardly a pixel in it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


# --- what is read ---


@pytest.mark.parametrize("as_type", [str, Path])
def test_a_file_gives_its_pixels_as_rgb_without_metadata(tmp_path: Path, as_type: Callable[[Path], Any]) -> None:
    file = tmp_path / "a picture.png"
    noise().save(file, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    loaded = load_image(as_type(file))
    assert (loaded.mode, loaded.size, loaded.info) == ("RGB", (64, 48), {})
    assert largest_difference(loaded, noise()) <= 1


@pytest.mark.parametrize("suffix", ["bmp", "tiff", "gif", "webp", "jpg", "ppm", "avif"])
def test_common_formats(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.{suffix}"
    four_corners().save(file, **({"quality": 95} if suffix in ("jpg", "webp", "avif") else {}))
    loaded = load_image(file)
    for place in ((8, 8), (40, 8), (8, 24), (40, 24)):
        assert loaded.getpixel(place) == pytest.approx(four_corners().getpixel(place), abs=8)


# What a viewer does to the stored pixels for each value of the tag, from the EXIF standard (0th row, 0th column).
ORIENTATIONS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff"])
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = tmp_path / f"a.{suffix}"
    four_corners().save(file, exif=exif, **({"quality": 100, "subsampling": 0} if suffix == "jpg" else {}))
    upright = Image.fromarray(np.ascontiguousarray(ORIENTATIONS[orientation](np.asarray(four_corners()))))
    loaded = load_image(file)
    assert largest_difference(loaded, upright) <= 3
    assert largest_difference(load_image(loaded), upright) <= 3, "turned a second time"
    with Image.open(file) as opened:
        assert largest_difference(load_image(opened), upright) <= 3


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on the damage
def test_damaged_exif_is_no_reason_to_refuse(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.png", exif=b"Exif\0\0 this is no TIFF header")
    assert largest_difference(load_image(tmp_path / "a.png"), noise()) == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_composed_on_white(tmp_path: Path, mode: str) -> None:
    picture = Image.new("RGBA", (24, 8), (100, 100, 100, 255))
    picture.paste((100, 100, 100, 0), (8, 0, 16, 8))
    picture.paste((100, 100, 100, 51), (16, 0, 24, 8))
    loaded = load_image(picture.convert(mode))
    assert [loaded.getpixel((x, 4))[0] for x in (4, 12, 20)] == pytest.approx([100, 255, 224], abs=1)  # 255 - 155 / 5
    if mode != "PA":
        picture.convert(mode).save(tmp_path / "a.png")
        assert largest_difference(load_image(tmp_path / "a.png"), loaded) == 0


def test_premultiplied_alpha() -> None:
    picture = Image.new("RGBA", (8, 8), (200, 100, 0, 51))
    assert load_image(picture.convert("RGBa")).getpixel((4, 4)) == pytest.approx((244, 224, 204), abs=2)
    assert load_image(picture.convert("LA").convert("La")).getpixel((4, 4))[0] == pytest.approx(227, abs=3)


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_a_transparent_colour_becomes_white(tmp_path: Path, mode: str) -> None:
    picture = Image.new("RGB", (16, 8), (40, 40, 40))
    picture.paste((90, 90, 90), (8, 0, 16, 8))
    if mode == "P":
        picture = picture.quantize(2)
        transparent: Any = picture.getpixel((12, 4))
    else:
        picture = picture.convert(mode)
        transparent = 90 if mode == "L" else (90, 90, 90)
    picture.save(tmp_path / "a.png", transparency=transparent)
    loaded = load_image(tmp_path / "a.png")
    assert loaded.getpixel((4, 4)) == (40, 40, 40)
    assert loaded.getpixel((12, 4)) == (255, 255, 255)


def test_palette_grey_and_one_bit(tmp_path: Path) -> None:
    four_corners().quantize(4).save(tmp_path / "p.png")
    assert largest_difference(load_image(tmp_path / "p.png"), four_corners()) <= 2
    grey = noise().convert("L")
    grey.save(tmp_path / "l.png")
    assert largest_difference(load_image(tmp_path / "l.png"), grey) == 0
    bits = grey.point(lambda v: 255 * (v > 127), "1")
    bits.save(tmp_path / "1.png")
    assert largest_difference(load_image(tmp_path / "1.png"), bits.convert("L")) == 0


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.linspace(0, 65535, 16 * 16).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    loaded = np.asarray(load_image(tmp_path / f"a.{suffix}"))
    np.testing.assert_array_equal(loaded[..., 0], np.round(values / 257.0))
    np.testing.assert_array_equal(loaded[..., 0], loaded[..., 2])


def test_a_dark_16_bit_picture_stays_dark_and_big_endian_is_read() -> None:
    values = np.full((8, 8), 2570, dtype=np.uint16)
    assert load_image(Image.fromarray(values)).getpixel((0, 0)) == (10, 10, 10)
    swapped = Image.frombytes("I;16B", (8, 8), values.astype(">u2").tobytes())
    assert load_image(swapped).getpixel((0, 0)) == (10, 10, 10)


@pytest.mark.filterwarnings("error")  # NumPy's, when something that is no number becomes an integer
@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([0, 0.5, 1], np.float32, [0, 128, 255]),
        ([-0.2, 0.5, 1.1], np.float32, [0, 128, 255]),
        ([float("nan"), 0.5, float("inf")], np.float32, [0, 128, 255]),
        ([0, 100, 255], np.float32, [0, 100, 255]),
        ([0, 100, 255], np.int32, [0, 100, 255]),
        ([-5, 257 * 9, 65535], np.int32, [0, 9, 255]),
        ([0, 1_000_000, 2_000_000], np.int32, [0, 128, 255]),
    ],
)
def test_32_bit_grey_and_float(tmp_path: Path, values: list[float], dtype: type, expected: list[int]) -> None:
    Image.fromarray(np.repeat(np.array([values], dtype), 8, 0).repeat(4, 1)).save(tmp_path / "a.tiff")
    loaded = load_image(tmp_path / "a.tiff")
    assert [loaded.getpixel((x, 4))[1] for x in (0, 4, 8)] == expected


def test_cmyk_and_ycbcr(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    assert load_image(tmp_path / "cmyk.jpg").getpixel((8, 8)) == pytest.approx((255, 0, 0), abs=3)
    assert largest_difference(load_image(noise().convert("YCbCr")), noise()) <= 3
    assert largest_difference(load_image(noise().convert("HSV")), noise()) <= 6  # hue has 8 bits only


def test_lab(tmp_path: Path) -> None:
    picture = Image.new("LAB", (16, 16), (138, 128 + 81, 128 + 70))  # CIE: pure red is L* 54, a* 81, b* 70 (D50)
    picture.save(tmp_path / "a.tiff")
    assert load_image(tmp_path / "a.tiff").getpixel((8, 8)) == pytest.approx((255, 0, 0), abs=12)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_an_embedded_profile_is_converted_to_srgb(tmp_path: Path, mode: str) -> None:
    picture = Image.new("RGB", (16, 16), (200, 0, 0))
    picture = picture.quantize(2) if mode == "P" else picture.convert(mode)
    picture.save(tmp_path / "a.png", icc_profile=swapped_profile())
    assert load_image(tmp_path / "a.png").getpixel((8, 8)) == pytest.approx((0, 200, 0), abs=3)


def test_a_grey_picture_with_an_rgb_profile(tmp_path: Path) -> None:
    Image.new("L", (16, 16), 77).save(tmp_path / "a.png", icc_profile=bent_profile())
    linear = (77 / 255 + 0.055) / 1.055
    expected = 255 * (1.055 * linear ** (1 / 2.4) - 0.055)
    assert load_image(tmp_path / "a.png").getpixel((8, 8)) == pytest.approx((expected,) * 3, abs=2)


def test_cmyk_with_a_profile(tmp_path: Path) -> None:
    picture = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    picture.save(tmp_path / "a.tiff", icc_profile=cmyk_profile((128, 128, 128)))  # L* 50, neutral
    assert load_image(tmp_path / "a.tiff").getpixel((8, 8)) == pytest.approx((119, 119, 119), abs=3)


def test_a_profile_that_is_broken_or_for_other_channels_is_ignored(tmp_path: Path) -> None:
    noise().save(tmp_path / "broken.png", icc_profile=b"this is no profile")
    assert largest_difference(load_image(tmp_path / "broken.png"), noise()) == 0
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "rgb.jpg", quality=100, icc_profile=swapped_profile())
    load_image(tmp_path / "rgb.jpg")


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_of_an_animation_the_first_frame(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / f"a.{suffix}").getpixel((8, 8)) == pytest.approx((255, 0, 0), abs=4)


def test_arrays() -> None:
    array = np.asarray(noise())
    assert largest_difference(load_image(array), noise()) == 0
    assert largest_difference(load_image(array[:, ::-1]), noise().transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == 0
    grey = load_image(array[..., 0])
    np.testing.assert_array_equal(np.asarray(grey), array[..., :1].repeat(3, 2))
    transparent = np.concatenate([array, np.zeros_like(array[..., :1])], 2)
    assert load_image(transparent).getextrema() == ((255, 255),) * 3


def test_the_source_is_left_as_it_was() -> None:
    picture = noise()
    picture.info["icc_profile"] = swapped_profile()
    loaded = load_image(picture)
    loaded.paste("black", (0, 0, 64, 48))
    assert largest_difference(picture, noise()) == 0
    assert picture.info["icc_profile"] == swapped_profile()
    plain = noise()
    load_image(plain).paste("black", (0, 0, 64, 48))
    assert largest_difference(plain, noise()) == 0


# --- what is refused ---


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"I am a text, not a picture.\n", "not a picture"),
        (png(20000, 20000), "100 megapixels"),
        (png(10001, 10000), "100 megapixels"),
        (png(7, 64), "7x64 pixels: the smallest allowed is 8x8"),
        (png(64, 7), "64x7 pixels: the smallest allowed is 8x8"),
        (png(64, 64), "damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n", "PostScript"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "portrait.png"
    file.write_bytes(content)
    with pytest.raises(ImageError, match=words) as caught:
        load_image(file)
    assert str(file) in str(caught.value)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_missing_file_and_folder_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"nowhere\.png' does not exist"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match="is a folder"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match="cannot be read"):
        load_image("a" * 5000)
    with pytest.raises(ImageError, match="cannot be read"):
        load_image("a\0b.png")


def test_a_file_without_read_permission(tmp_path: Path) -> None:
    file = tmp_path / "secret.png"
    noise().save(file)
    file.chmod(0)
    uid = os.geteuid()
    try:
        os.seteuid(uid or 65534)  # root may read anything
        with pytest.raises(ImageError, match="Permission denied"):
            load_image(file)
    finally:
        os.seteuid(uid)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tiff", "bmp"])
def test_truncated_files_are_refused_wherever_they_end(tmp_path: Path, suffix: str) -> None:
    noise().save(tmp_path / f"whole.{suffix}")
    data = (tmp_path / f"whole.{suffix}").read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    for share in (0.01, 0.05, 0.2, 0.5, 0.8, 0.95):
        cut.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ImageError, match="cut"):
            load_image(cut)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on the damage
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tiff"])
def test_damaged_bytes_never_raise_anything_else(tmp_path: Path, suffix: str) -> None:
    noise(24, 24).save(tmp_path / f"whole.{suffix}")
    data = np.frombuffer((tmp_path / f"whole.{suffix}").read_bytes(), np.uint8)
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(60):
        damaged = data.copy()
        damaged[rng.integers(0, min(len(data), 400), 6)] = rng.integers(0, 256, 6)
        (tmp_path / "damaged").write_bytes(damaged.tobytes())
        try:
            assert load_image(tmp_path / "damaged").mode == "RGB"
        except ImageError:
            refused += 1
    assert refused


@pytest.mark.parametrize("side", [20000, 13000, 10001])  # Pillow raises from 179 megapixels on, warns from 89
def test_a_decompression_bomb_is_refused_by_its_header_alone(tmp_path: Path, side: int) -> None:
    (tmp_path / "bomb.png").write_bytes(png(side, side))
    limit = Image.MAX_IMAGE_PIXELS
    tracemalloc.start()
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="100 megapixels"):
            load_image(tmp_path / "bomb.png")
    assert time.perf_counter() - start < 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000
    assert limit == Image.MAX_IMAGE_PIXELS


def test_up_to_100_megapixels_no_warning_leaks_out(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(png(10000, 9999))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="damaged"):  # its size is allowed; that it has no pixels comes out after
            load_image(tmp_path / "large.png")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((16, 16, 3), np.float32),
        np.zeros((16, 16), np.uint16),
        np.zeros((16, 16, 2), np.uint8),
        np.zeros((3, 16, 16), np.uint8),
        np.zeros((1, 16, 16, 3), np.uint8),
        np.zeros(16, np.uint8),
    ],
)
def test_other_arrays_are_refused(array: np.ndarray) -> None:
    with pytest.raises(ImageError, match="H x W x 3") as caught:
        load_image(array)
    assert str(array.dtype) in str(caught.value) and str(array.shape) in str(caught.value)


def test_other_sources_and_sizes_are_refused() -> None:
    with pytest.raises(ImageError, match="cannot be a list"):
        load_image([1, 2])  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="8x7 pixels: the smallest allowed is 8x8"):
        load_image(np.zeros((7, 8, 3), np.uint8))
    with pytest.raises(ImageError, match="0x0"):
        load_image(np.zeros((0, 0, 3), np.uint8))
    with pytest.raises(ImageError, match="7x8 pixels"):
        load_image(Image.new("RGB", (7, 8)))
    with pytest.raises(ImageError, match="100 megapixels"):
        load_image(np.broadcast_to(np.uint8(0), (10001, 10000, 3)))
    load_image(np.zeros((8, 8, 3), np.uint8))


# --- fitting ---


def disc(width: int, height: int) -> Image.Image:
    """A black disc in the middle of white, 3/4 as wide as the shorter side."""
    picture = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(picture).circle((width / 2, height / 2), 0.375 * min(width, height), fill="black")
    return picture


@pytest.mark.parametrize("size", [(128, 128), (200, 120), (96, 160), (512, 512)])
@pytest.mark.parametrize("source", [(300, 200), (200, 333), (64, 64)])
@pytest.mark.parametrize("resize", ["crop", "pad"])
def test_a_disc_stays_a_disc_in_the_middle(size: tuple[int, int], source: tuple[int, int], resize: str) -> None:
    fitted = fit_image(disc(*source), size, resize)
    assert (fitted.mode, fitted.size) == ("RGB", size)
    scales = [s / o for s, o in zip(size, source, strict=True)]
    diameter = 0.75 * min(source) * (max(scales) if resize == "crop" else min(scales))
    dark = np.asarray(fitted)[..., 0] < 128
    for axis, side in ((0, size[0]), (1, size[1])):
        extent = np.flatnonzero(dark.any(axis))
        if diameter < side - 4:
            tolerance = 2.5 * max(1, max(scales))
            assert extent[-1] - extent[0] + 1 == pytest.approx(diameter, abs=tolerance)
            assert (extent[-1] + extent[0] + 1) / 2 == pytest.approx(side / 2, abs=tolerance)


def test_crop_cuts_both_sides_alike_and_pad_is_white() -> None:
    wide = Image.new("RGB", (120, 40), "blue")
    wide.paste("red", (0, 0, 40, 40))
    wide.paste("lime", (80, 0, 120, 40))
    assert fit_image(wide, (40, 40), "crop").getextrema() == ((0, 0), (0, 0), (255, 255)), "the middle third alone"
    assert largest_difference(fit_image(wide, (40, 40)), fit_image(wide, (40, 40), "crop")) == 0, "crop is the default"
    padded = np.asarray(fit_image(wide, (120, 120), "pad"))
    np.testing.assert_array_equal(padded[40:80], np.asarray(wide))
    assert padded[:40].min() == padded[80:].min() == 255


@pytest.mark.parametrize(("x", "left"), [(0.5, 40), (0, 0), (0.1, 0), (0.5 - 1 / 8, 25), (0.75, 70), (1, 80)])
def test_a_crop_has_its_focus_in_the_middle_as_far_as_the_picture_goes(x: float, left: int) -> None:
    ramp = np.broadcast_to(np.arange(120, dtype=np.uint8)[None, :, None], (40, 120, 3))
    for picture, focus in ((ramp, (x, 0.9)), (ramp.transpose(1, 0, 2), (0.9, x))):
        fitted = np.asarray(fit_image(Image.fromarray(np.ascontiguousarray(picture)), (40, 40), "crop", focus))
        assert abs(int(fitted.min()) - left) <= 1 and abs(int(fitted.max()) - left - 39) <= 1


def test_padding_with_blur_keeps_all_of_the_picture_and_nothing_of_it_sharp_beside() -> None:
    rng = np.random.default_rng(0)
    wide = Image.fromarray(rng.integers(0, 256, (40, 120, 3), dtype=np.uint8))
    blurred, padded = (np.asarray(fit_image(wide, (120, 120), how)).astype(int) for how in ("blur", "pad"))
    np.testing.assert_array_equal(blurred[40:80], padded[40:80])
    for band in (blurred[:40], blurred[80:]):
        assert band.std() < 0.2 * blurred[40:80].std() and abs(band.mean() - 127) < 12


def test_what_a_crop_cuts_off_is_said() -> None:
    square, wide, tall = (Image.new("RGB", size) for size in ((50, 50), (200, 100), (90, 160)))
    assert said_cut(["a.png", "x/b.png", "c.png"], [square, wide, tall], (64, 64)) == (
        "To fit 64x64, 0 % of a.png, 50 % of b.png, 44 % of c.png is cut off."
    )
    assert said_cut(["a.png"], [square], (64, 64)) == "" and said_cut(["c.png"], [tall], (144, 256)) == ""


def test_the_same_size_changes_nothing_and_gives_a_copy() -> None:
    picture = noise()
    for resize in ("crop", "pad", "blur"):
        fitted = fit_image(picture, picture.size, resize)
        assert largest_difference(fitted, picture) == 0
        assert fitted is not picture


def test_reducing_averages_rather_than_picks() -> None:
    checks = Image.fromarray(((np.indices((512, 512)).sum(0) % 2) * 255).astype(np.uint8)).convert("RGB")
    low, high = fit_image(checks, (32, 32)).getextrema()[0]
    assert 120 <= low <= high <= 135


@pytest.mark.parametrize("resize", ["crop", "pad", "blur"])
def test_extreme_shapes(resize: str) -> None:
    assert fit_image(Image.new("RGB", (8, 4000)), (32, 32), resize).size == (32, 32)
    assert fit_image(Image.new("RGB", (4000, 8)), (8, 64), resize).size == (8, 64)


def test_bad_fits_are_refused() -> None:
    with pytest.raises(ConfigError, match="'stretch', but must be 'crop', 'pad' or 'blur'"):
        fit_image(noise(), (32, 32), "stretch")
    with pytest.raises(ConfigError, match="0x32"):
        fit_image(noise(), (0, 32))


def test_hash_follows_pixels_and_size_not_the_file(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.png")
    noise().save(tmp_path / "b.bmp")
    one = image_hash(load_image(tmp_path / "a.png"))
    assert one == image_hash(load_image(tmp_path / "b.bmp"))
    assert len(one) == 64 and int(one, 16)
    changed = noise()
    changed.putpixel((63, 47), (1, 2, 3))
    assert image_hash(changed) != one
    assert image_hash(Image.new("RGB", (8, 32))) != image_hash(Image.new("RGB", (32, 8)))


@pytest.mark.parametrize("suffix", ["pcx", "sgi", "im", "msp", "spi", "blp", "eps", "pdf", "icns", "dds"])
def test_formats_that_nobody_photographs_in_are_not_read(tmp_path: Path, suffix: str) -> None:
    """Only decoders that people need are open to strangers' files; a format's name in the suffix does not matter."""
    mode = {"msp": "1", "spi": "F", "blp": "P"}.get(suffix, "RGB")
    buffer = io.BytesIO()
    kind = {"im": "IM", "spi": "SPIDER"}.get(suffix, suffix.upper())
    Image.new(mode, (16, 16)).save(buffer, format=kind)
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    with pytest.raises(ImageError, match="not a picture in a format that can be read|is a PostScript drawing"):
        load_image(tmp_path / "a.png")
    assert read_formats_alone(tmp_path / "a.png")


def read_formats_alone(file: Path) -> bool:
    """The other doors to Pillow know no more."""
    with pytest.raises(ImageError, match="No settings can be read"):
        read_settings(file)
    with pytest.raises(ImageError):
        check_picture(file)
    return True
