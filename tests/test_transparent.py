"""Films with transparency: matted frames, their own at the pictures, and every kind of file that holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageSequence

from conftest import tiny_pipeline
from diffmorpher import FitConfig, Morpher, MorphPath, Recipe, SampleConfig, ScheduleConfig, read_settings
from diffmorpher.errors import ImageError
from diffmorpher.files.films import save_film
from diffmorpher.files.pictures import image_hash, load_image, on_white
from diffmorpher.method.matte import matte


def thing(shape: str, size: int = 32) -> Image.Image:
    """A coloured thing on nothing."""
    image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    getattr(ImageDraw.Draw(image), shape)((4, 4, size - 8, size - 6), fill=(200, 40, 90, 255))
    return image


PICTURES = [thing("ellipse"), thing("rectangle")]
OPTIONS: dict[str, Any] = {
    "fit": FitConfig(rank=2, steps=1),
    "sample": SampleConfig(steps=2, exact_ends=True),
    "schedule": ScheduleConfig(enabled=False),
}


def opacity(frame: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(frame.getchannel("A")).astype(int)


# ---- the matte


def test_a_matte_finds_what_is_there() -> None:
    """A red disc on white, blurred at its edge, with white inside and a hole; known opacity."""
    y, x = np.mgrid[:96, :96]
    away = np.hypot(x - 48, y - 48)
    true = np.clip(36 - away, 0, 1) * (1 - np.clip(10 - np.hypot(x - 36, y - 48), 0, 1))  # a disc with a hole
    colour = np.where((np.hypot(x - 62, y - 48) < 6)[..., None], 255, np.array([200, 30, 40]))  # and a white eye
    frame = np.rint(colour * true[..., None] + 255 * (1 - true[..., None])).astype(np.uint8)
    hole = np.where(np.hypot(x - 36, y - 48) < 5, 0, 255).astype(np.uint8)
    end = torch.from_numpy(hole * (away < 40))
    made = matte(torch.from_numpy(frame).permute(2, 0, 1), end, end, 0.5).numpy()
    assert np.abs(made[3] / 255 - true).max() < 0.15
    there = true > 0.5
    assert np.abs(made[:3].transpose(1, 2, 0)[there].astype(int) - colour[there]).max() < 50
    white = np.asarray(on_white(Image.fromarray(made.transpose(1, 2, 0), "RGBA"))).astype(int)
    assert np.abs(white - frame).max() <= 2, "on white it is the frame"
    assert (made[3][:2] == 0).all() and made[3][48, 62] == 255 and made[3][48, 36] == 0
    whole = torch.full((96, 96), 255, dtype=torch.uint8)
    assert matte(torch.from_numpy(frame).permute(2, 0, 1), whole, whole, 0.5)[3, 48, 36] == 255, (
        "white that no end lacks"
    )


# ---- the film


@pytest.fixture(scope="module")
def morpher() -> Morpher:
    return Morpher(tiny_pipeline())


@pytest.mark.parametrize("loop", [False, True])
def test_frames_have_the_pictures_own_opacity_at_the_pictures(morpher: Morpher, loop: bool) -> None:
    frames = morpher(PICTURES, num_frames=4, transparent=True, loop=loop, **OPTIONS)
    plain = morpher([on_white(picture) for picture in PICTURES], num_frames=4, loop=loop, **OPTIONS)
    assert {frame.mode for frame in frames.frames} == {"RGBA"} and frames.distances == plain.distances
    at = [frames.alphas.index(k) for k in (0.0, 1.0)]
    for i, picture in zip(at, PICTURES, strict=True):
        assert (opacity(frames.frames[i]) == opacity(picture)).all()
    for i, (frame, other) in enumerate(zip(frames.frames, plain.frames, strict=True)):
        apart = np.abs(np.asarray(on_white(frame)).astype(int) - np.asarray(other).astype(int))
        assert i in at or np.median(apart) <= 2, "on white it is the frame of the pictures on white"


def test_a_path_keeps_the_opacity(morpher: Morpher, tmp_path: Path) -> None:
    path = morpher.prepare(PICTURES, fit=None, steps=2, transparent=True)
    again = MorphPath.load(path.save(tmp_path / "a.morph"), morpher)
    made = [morpher.film(each, 3, OPTIONS["sample"], OPTIONS["schedule"]) for each in (path, again)]
    assert [frame.tobytes() for frame in made[0].frames] == [frame.tobytes() for frame in made[1].frames]
    assert made[0].frames[1].mode == "RGBA"


def test_pictures_without_any_and_their_hashes(morpher: Morpher, tmp_path: Path) -> None:
    solid = [Image.effect_noise((32, 32), s).convert("RGB") for s in (20, 60)]
    with pytest.raises(ImageError, match="no picture has anything transparent in it"):
        morpher.prepare(solid, fit=None, steps=1, transparent=True)
    mixed = morpher.prepare([solid[0], PICTURES[1]], fit=None, steps=1, transparent=True)
    assert mixed.opacity is not None and int(mixed.opacity[0].min()) == 255
    PICTURES[0].save(tmp_path / "a.png")
    kept = load_image(tmp_path / "a.png", alpha=True)
    assert kept.mode == "RGBA" and image_hash(kept) == image_hash(load_image(tmp_path / "a.png"))
    wide = morpher.prepare(
        [thing("ellipse", 64).crop((0, 16, 64, 48))] * 2, fit=None, steps=1, transparent=True, resize="pad"
    )
    assert wide.opacity is not None and int(wide.opacity[:, :4].max()) == 0, "what is filled up is empty"


# ---- files


def decoded(file: Path) -> list[np.ndarray[Any, Any]]:
    """The opacity of each frame, by PyAV with a decoder that knows it, or by Pillow."""
    if file.suffix in (".webm", ".mov", ".mkv"):
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            decoder = av.CodecContext.create("libvpx-vp9", "r") if file.suffix == ".webm" else stream.codec_context
            frames = [
                frame for packet in container.demux(stream) for frame in decoder.decode(packet if packet.size else None)
            ]
        return [frame.to_ndarray(format="rgba")[..., 3].astype(int) for frame in frames]
    with Image.open(file) as image:
        return [opacity(frame.convert("RGBA")) for frame in ImageSequence.Iterator(image)]


@pytest.mark.parametrize("suffix", [".webm", ".mov", ".mkv", ".webp", ".apng"])
@pytest.mark.parametrize("quality", ["good", "best"])
def test_every_kind_of_file_that_holds_opacity(tmp_path: Path, suffix: str, quality: Any) -> None:
    frames = [thing("ellipse", 64), thing("rectangle", 64), thing("ellipse", 64).rotate(90)]
    file = save_film(frames, tmp_path / f"a{suffix}", fps=5, quality=quality, metadata={"a": 1})
    found = decoded(file)
    assert len(found) == 3 and read_settings(file) == {"a": 1}
    for each, frame in zip(found, frames, strict=True):
        assert np.abs(each - opacity(frame)).mean() < 3, suffix
    if suffix in (".webm", ".mov", ".mkv"):
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            assert stream.average_rate == 5 and container.duration == pytest.approx(3 / 5 * 1e6, rel=0.02)


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_others_are_on_white(tmp_path: Path, suffix: str) -> None:
    file = save_film([thing("ellipse", 64)] * 2, tmp_path / f"a{suffix}")
    if suffix == ".gif":
        with Image.open(file) as image:
            first = np.asarray(image.convert("RGB")).astype(int)
    else:
        with av.open(str(file)) as container:
            first = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(int)
    assert np.abs(first - np.asarray(on_white(thing("ellipse", 64))).astype(int)).mean() < 4


def test_stills_keep_it_and_a_recipe_makes_it_again(morpher: Morpher, tmp_path: Path) -> None:
    for k, picture in enumerate(PICTURES):
        picture.save(tmp_path / f"{k}.png")
    recipe = Recipe(tuple(str(tmp_path / f"{k}.png") for k in range(2)), transparent=True, frames=3, **OPTIONS)
    result = morpher.make(recipe)
    film = result.save(tmp_path / "a.webp")
    settings: Any = read_settings(film)
    assert settings["transparent"] is True and Recipe.read(film).transparent
    assert Recipe(recipe.pictures, transparent=True).command().endswith("--transparent")
    again = morpher.make(Recipe.read(film))
    assert [frame.tobytes() for frame in again.frames] == [frame.tobytes() for frame in result.frames]
    sheet = Image.open(result.save(tmp_path / "sheet.png"))
    assert sheet.mode == "RGBA" and sheet.getpixel((33, 5)) == (255, 255, 255, 0), "between the frames is nothing"
    still = Image.open(result.save(tmp_path / "frames") / "frame_0000.png")
    assert still.mode == "RGBA" and (opacity(still) == opacity(PICTURES[0])).all()
