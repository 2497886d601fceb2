"""Films out: every format is written for real, then read again with PyAV or Pillow."""

from __future__ import annotations

import json
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from diffmorpher.errors import ConfigError, ImageError, OutputError
from diffmorpher.files import films as film
from diffmorpher.files.films import FORMATS, check_output, contact_sheet, read_settings, save_film, unused_in
from diffmorpher.files.pictures import load_image

VIDEOS = ["a.mp4", "a.webm", "a.mov", "a.mkv"]
EVERY_FORMAT = [*VIDEOS, "a.gif", "a.webp", "a.apng", "a.png", "a"]
SETTINGS = {"prompts": ["a cat", "ein Käse 🧀"], "fps": 8, "alphas": [0.0, 0.5, 1.0], "nested": {"lora": None}}


def frames(count: int = 6, width: int = 64, height: int = 48) -> list[Image.Image]:
    """A smooth patch of many colours that moves to the right over white, and grows bluer."""
    y, x = np.mgrid[0:24, 0:24]
    pictures = []
    for i in range(count):
        picture = Image.new("RGB", (width, height), "white")
        blue = np.full_like(x, 250 * i // max(1, count - 1))
        picture.paste(Image.fromarray(np.stack([x * 10, y * 10, blue], -1).astype(np.uint8)), (2 + i, 12))
        pictures.append(picture)
    return pictures


def noise(count: int = 20) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(count)]


def decode(file: Path) -> list[np.ndarray]:
    with av.open(str(file)) as container:
        return [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]


def read_animation(file: Path) -> tuple[list[np.ndarray], list[int]]:
    """Frames and their durations in milliseconds."""
    pictures, durations = [], []
    with Image.open(file) as image:
        for i in range(image.n_frames):
            image.seek(i)
            image.load()
            pictures.append(np.asarray(image.convert("RGB")).astype(int))
            durations.append(image.info["duration"])
    return pictures, durations


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


# --- mp4 ---


@pytest.mark.parametrize("fps", [8, 7, 29.97, 24000 / 1001, 240, 0.01])
def test_mp4_stream(tmp_path: Path, fps: float) -> None:
    assert save_film(frames(11), tmp_path / "a.mp4", fps=fps) == tmp_path / "a.mp4"
    exact = 11 / Fraction(fps).limit_denominator(100_000)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, stream.pix_fmt, stream.width, stream.height) == ("h264", "yuv420p", 64, 48)
        assert (context.color_range, context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1, 1)
        assert stream.duration * stream.time_base == exact
        assert container.duration == pytest.approx(exact * 1_000_000, abs=1)
        times = [frame.pts * frame.time_base for frame in container.decode(video=0)]
    assert times == [exact * i / 11 for i in range(11)]


def test_mp4_can_start_before_it_is_loaded(tmp_path: Path) -> None:
    data = save_film(frames(), tmp_path / "a.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


PATCHES = ["red", "lime", "blue", "yellow", "cyan", "magenta", "white", "black", "gray"]


def test_mp4_colours_come_back(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (64, 64), colour) for colour in PATCHES]
    save_film(pictures, tmp_path / "a.mp4")
    # An independent decoder: the planes as stored, and the formulas of BT.709 for limited range.
    with av.open(str(tmp_path / "a.mp4")) as container:
        decoded = [frame.to_ndarray() for frame in container.decode(video=0)]
    for picture, planes in zip(pictures, decoded, strict=True):
        luma = (planes[32, 32] - 16.0) / 219
        blue, red = ((planes[64 + 8, 16] - 128.0) / 224, (planes[80 + 8, 16] - 128.0) / 224)
        r, b = luma + 1.5748 * red, luma + 1.8556 * blue
        g = (luma - 0.2126 * r - 0.0722 * b) / 0.7152
        rgb = [255 * channel for channel in (r, g, b)]
        assert rgb == pytest.approx(picture.getpixel((32, 32)), abs=4)


def test_mp4_content_and_order(tmp_path: Path) -> None:
    save_film(frames(), tmp_path / "a.mp4")
    for picture, decoded in zip(frames(), decode(tmp_path / "a.mp4"), strict=True):
        luma = np.array([0.2126, 0.7152, 0.0722])
        assert np.abs((np.asarray(picture) - decoded) @ luma).mean() < 3


def test_mp4_odd_sizes_repeat_the_edge(tmp_path: Path) -> None:
    save_film(frames(3, 65, 47), tmp_path / "a.mp4")
    for decoded, picture in zip(decode(tmp_path / "a.mp4"), frames(3, 65, 47), strict=True):
        assert decoded.shape == (48, 66, 3)
        assert decoded[:, 60:].min() > 240 and decoded[42:].min() > 240, "white to the last row and column"
        assert np.abs(decoded[:47, :65] - np.asarray(picture)).mean() < 4, "nothing scaled or moved"


# --- the other videos ---

#: Codec, format of the pixels; range, matrix, primaries and curve as numbered in H.273, as far as the container can say it.
KINDS = {
    "webm": ("vp9", "yuv420p", (1, 1, 1, 1)),
    "mov": ("prores", "yuv422p10le", (1, 1, 1, 1)),
    "mkv": ("ffv1", "bgr0", (2, 0, 1, 13)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fps", [8, 24000 / 1001, 60])
def test_a_video_is_tagged_as_converted_and_runs_at_a_constant_rate(tmp_path: Path, kind: str, fps: float) -> None:
    save_film(frames(11), tmp_path / f"a.{kind}", fps=fps)
    name, pixels, tags = KINDS[kind]
    exact = Fraction(fps).limit_denominator(100_000)
    tick = 0 if kind == "mov" else Fraction(1, 1000)  # in which Matroska counts
    with av.open(str(tmp_path / f"a.{kind}")) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.codec.canonical_name, stream.width, stream.height) == (name, 64, 48)
        assert stream.average_rate == pytest.approx(exact, rel=1e-3)
        shown = list(container.decode(video=0))
        assert (context.pix_fmt, context.color_range) == (pixels, tags[0])
        assert (context.colorspace, context.color_primaries, context.color_trc) == tags[1:]
        assert container.duration / 1e6 == pytest.approx(11 / exact, abs=float(tick) + 2e-6)
    assert shown[0].key_frame, "players show it as the poster"
    for i, frame in enumerate(shown):
        assert abs(frame.pts * frame.time_base - i / exact) <= tick
    assert len(shown) == 11


@pytest.mark.parametrize("kind", ["webm", "mov"])
def test_colours_of_a_video_come_back(tmp_path: Path, kind: str) -> None:
    pictures = [Image.new("RGB", (64, 64), colour) for colour in PATCHES]
    save_film(pictures, tmp_path / f"a.{kind}", quality="best")
    with av.open(str(tmp_path / f"a.{kind}")) as container:
        decoded = [frame.reformat(format="yuv444p16le").to_ndarray()[32, 32] for frame in container.decode(video=0)]
    for picture, planes in zip(pictures, decoded, strict=True):
        y, cb, cr = planes / 256.0
        luma, blue, red = (y - 16) / 219, (cb - 128) / 224, (cr - 128) / 224
        r, b = luma + 1.5748 * red, luma + 1.8556 * blue
        rgb = [255 * channel for channel in (r, (luma - 0.2126 * r - 0.0722 * b) / 0.7152, b)]
        assert rgb == pytest.approx(picture.getpixel((32, 32)), abs=4)


def test_an_mkv_and_an_apng_lose_nothing(tmp_path: Path) -> None:
    pictures = [picture.resize((65, 47)) for picture in noise(5)]
    for picture, decoded in zip(pictures, decode(save_film(pictures, tmp_path / "a.mkv")), strict=True):
        np.testing.assert_array_equal(decoded, np.asarray(picture))
    shown, durations = read_animation(save_film(pictures, tmp_path / "a.apng", fps=7))
    np.testing.assert_array_equal(shown, [np.asarray(picture) for picture in pictures])
    assert sum(durations) == pytest.approx(5000 / 7, abs=1)
    with av.open(str(tmp_path / "a.apng")) as container:
        assert len(list(container.decode(video=0))) == 5


@pytest.mark.parametrize("kind", ["mp4", "webm", "mov", "webp"])
def test_more_quality_is_more_bytes_and_nearer_to_the_frames(tmp_path: Path, kind: str) -> None:
    pictures = [Image.effect_noise((96, 96), 40).convert("RGB").resize((128, 128)) for _ in range(4)]
    sizes, errors = [], []
    for quality in ("small", "good", "best"):
        file = save_film(pictures, tmp_path / f"a.{kind}", quality=quality)  # type: ignore[arg-type]
        shown = read_animation(file)[0] if kind == "webp" else decode(file)
        sizes.append(file.stat().st_size)
        errors.append(np.mean([np.abs(a - np.asarray(b)).mean() for a, b in zip(shown, pictures, strict=True)]))
    assert sizes == sorted(sizes) and len(set(sizes)) == 3
    assert errors == sorted(errors, reverse=True) and errors[2] < 4
    with pytest.raises(ConfigError, match='must be "small", "good" or "best"'):
        save_film(pictures, tmp_path / "b.mp4", quality="high")  # type: ignore[arg-type]


# --- gif and webp ---


@pytest.mark.parametrize("suffix", ["gif", "webp"])
@pytest.mark.parametrize("fps", [7, 24, 30])
def test_animations_loop_and_last_as_long_as_they_should(tmp_path: Path, suffix: str, fps: float) -> None:
    file = save_film(frames(25), tmp_path / f"a.{suffix}", fps=fps)
    pictures, durations = read_animation(file)
    assert len(pictures) == 25
    assert sum(durations) == pytest.approx(25_000 / fps, abs=5)
    assert max(durations) - min(durations) <= (10 if suffix == "gif" else 1)
    with Image.open(file) as image:
        assert image.info["loop"] == 0


@pytest.mark.parametrize(("suffix", "fps", "shortest"), [("gif", 60, 20), ("gif", 240, 20), ("webp", 240, 11)])
def test_films_too_fast_for_browsers_skip_frames(tmp_path: Path, suffix: str, fps: float, shortest: int) -> None:
    all_frames = frames(30)
    pictures, durations = read_animation(save_film(all_frames, tmp_path / f"a.{suffix}", fps=fps))
    assert sum(durations) == pytest.approx(30_000 / fps, abs=5)
    assert min(durations) >= shortest
    for picture, shown in ((all_frames[0], pictures[0]), (all_frames[-1], pictures[-1])):
        assert np.abs(np.asarray(picture) - shown).mean() < 4, "the two ends are the user's own pictures"


def test_webp_at_60_keeps_all_frames(tmp_path: Path) -> None:
    assert len(read_animation(save_film(frames(12), tmp_path / "a.webp", fps=60))[0]) == 12


@pytest.mark.parametrize(("suffix", "mean_error"), [("gif", 4), ("webp", 2)])
def test_animations_show_the_frames(tmp_path: Path, suffix: str, mean_error: float) -> None:
    pictures, _ = read_animation(save_film(frames(), tmp_path / f"a.{suffix}"))
    for picture, shown in zip(frames(), pictures, strict=True):
        assert np.abs(np.asarray(picture) - shown).mean() < mean_error


def test_gif_has_one_palette_and_a_clean_background(tmp_path: Path) -> None:
    pictures = frames(8, 96, 64)
    rng = np.random.default_rng(0)
    for i, picture in enumerate(pictures):  # as a decoder leaves it: white but for a little noise
        array = np.asarray(picture).astype(int)
        array[array.min(2) == 255] -= rng.integers(0, 5, (int((array.min(2) == 255).sum()), 3))
        pictures[i] = Image.fromarray(array.astype(np.uint8))
    shown, _ = read_animation(save_film(pictures, tmp_path / "a.gif"))
    for picture, frame in zip(pictures, shown, strict=True):
        assert (frame[np.asarray(picture).min(2) >= 250] == 255).all()
    data = (tmp_path / "a.gif").read_bytes()
    headers = [i + 8 for i in range(len(data)) if data[i : i + 3] == b"\x21\xf9\x04" and data[i + 7 : i + 9] == b"\0,"]
    assert len(headers) == 8
    assert data[10] >> 7 == 1 and not any(data[i + 9] >> 7 for i in headers), "a global palette and no local ones"


def test_gif_palette_suits_real_pictures(tmp_path: Path) -> None:
    """On two demo pictures faded into one another: without k-means the error is 6.4 of 255."""
    demo = Path(film.__file__).parents[1] / "assets" / "demo"
    ends = [load_image(demo / name).resize((128, 128)) for name in ("automobile.png", "bus.png")]
    pictures = [Image.blend(ends[0], ends[1], i / 5) for i in range(6)]
    shown, _ = read_animation(save_film(pictures, tmp_path / "a.gif"))
    errors = np.stack([np.asarray(picture) - frame for picture, frame in zip(pictures, shown, strict=True)])
    assert np.sqrt(np.square(errors).mean()) < 5.2


def test_gif_dithers_gradients(tmp_path: Path) -> None:
    """Averaged over blocks a dithered picture is much closer to the original than its palette is fine."""
    y, x = np.mgrid[0:128, 0:128]
    picture = Image.fromarray(np.stack([x * 1.9, y * 1.9, 120 + 60 * np.sin(x * y / 2000)], -1).astype(np.uint8))
    (shown,), _ = read_animation(save_film([picture], tmp_path / "a.gif"))
    error = (np.asarray(picture) - shown)[8:120, 8:120].reshape(14, 8, 14, 8, 3)
    assert np.abs(error.mean((1, 3))).mean() < 0.35 * np.abs(error).mean()


def test_a_film_that_stands_still_and_a_single_frame(tmp_path: Path) -> None:
    """Pillow and libwebp join equal frames; a webp of one frame is a still picture, without a duration."""
    assert sum(read_animation(save_film(frames(1) * 5, tmp_path / "a.gif", fps=5))[1]) == 1000
    two = [*frames(1) * 4, frames(2)[1]]
    assert sum(read_animation(save_film(two, tmp_path / "a.webp", fps=5))[1]) == 1000
    for name in EVERY_FORMAT:
        save_film(frames(1), tmp_path / name)
        if name not in ("a", *VIDEOS):
            with Image.open(tmp_path / name) as image:
                assert image.size == (64, 48)


# --- contact sheet and folder ---


def test_contact_sheet_layout() -> None:
    pictures = [Image.new("RGB", (10, 6), (i, 0, 0)) for i in range(5)]
    sheet = contact_sheet(pictures)
    assert (sheet.mode, sheet.size) == ("RGB", (3 * 10 + 2 * 4, 2 * 6 + 4))
    assert [sheet.getpixel((14 * (i % 3), 10 * (i // 3))) for i in range(5)] == [(i, 0, 0) for i in range(5)]
    assert sheet.getpixel((13, 0)) == sheet.getpixel((37, 15)) == (255, 255, 255), "gap and free place are white"


@pytest.mark.parametrize(("count", "grid"), [(1, (1, 1)), (2, (2, 1)), (16, (4, 4)), (17, (5, 4)), (100, (8, 13))])
def test_contact_sheet_is_near_square_and_at_most_8_wide(count: int, grid: tuple[int, int]) -> None:
    assert contact_sheet([Image.new("RGB", (5, 5))] * count, gap=0).size == (5 * grid[0], 5 * grid[1])


def test_contact_sheet_columns_and_gap() -> None:
    pictures = [Image.new("RGB", (5, 5))] * 3
    assert contact_sheet(pictures, columns=1, gap=2).size == (5, 19)
    assert contact_sheet(pictures, columns=9, gap=2).size == (19, 5)
    for bad in ({"columns": 0}, {"gap": -1}):
        with pytest.raises(ConfigError, match="must be"):
            contact_sheet(pictures, **bad)


def test_png_is_the_contact_sheet(tmp_path: Path) -> None:
    with Image.open(save_film(iter(frames()), tmp_path / "a.PNG")) as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(contact_sheet(frames())))


def test_folder_of_frames_replaces_an_older_longer_one_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    assert save_film(frames(12), folder) == folder
    (folder / "notes.txt").write_text("mine")
    (folder / "frame_of_mind.png").write_text("mine")
    save_film(frames(4)[::-1], folder)
    names = [f"frame_{i:04d}.png" for i in range(4)]
    assert sorted(p.name for p in folder.iterdir()) == sorted([*names, "frame_of_mind.png", "notes.txt"])
    assert [p.name for p in folder.parent.iterdir()] == ["run"]
    for name, picture in zip(names, frames(4)[::-1], strict=True):
        with Image.open(folder / name) as image:
            np.testing.assert_array_equal(np.asarray(image), np.asarray(picture))


# --- settings ---


@pytest.mark.parametrize("name", EVERY_FORMAT)
@pytest.mark.parametrize("settings", [SETTINGS, {}, {"long": "x" * 100_000}])
def test_settings_come_back(tmp_path: Path, name: str, settings: dict[str, object]) -> None:
    save_film(frames(3), tmp_path / name, metadata=settings)
    assert read_settings(tmp_path / name) == settings
    save_film(frames(3), tmp_path / name)
    assert read_settings(tmp_path / name) is None


def test_settings_lie_where_other_tools_find_them(tmp_path: Path) -> None:
    for name in EVERY_FORMAT:
        save_film(frames(3), tmp_path / name, metadata=SETTINGS)
    text = json.dumps(dict(sorted(SETTINGS.items())))
    for name in VIDEOS:
        with av.open(str(tmp_path / name)) as container:
            assert {key.lower(): value for key, value in container.metadata.items()}["comment"] == text
    for frame in sorted((tmp_path / "a").iterdir()):
        assert Image.open(frame).text == {"diffmorpher": text}
    for name in ("a.png", "a.apng"):
        assert Image.open(tmp_path / name).text == {"diffmorpher": text}
    assert Image.open(tmp_path / "a.gif").info["comment"] == text.encode()
    assert Image.open(tmp_path / "a.webp").getexif()[270] == text


def test_settings_that_json_does_not_know_become_text(tmp_path: Path) -> None:
    save_film(frames(1), tmp_path / "a.png", metadata={"model": Path("/models/mini")})
    assert read_settings(tmp_path / "a.png") == {"model": "/models/mini"}


def test_somebody_elses_files_have_no_settings(tmp_path: Path) -> None:
    picture = frames(1)[0]
    picture.save(tmp_path / "a.gif", comment=b"made with \xff love")
    picture.save(tmp_path / "b.gif", comment=b"[1, 2]")
    picture.save(tmp_path / "a.jpg")
    (tmp_path / "folder").mkdir()
    for name in ("a.gif", "b.gif", "a.jpg", "folder"):
        assert read_settings(tmp_path / name) is None


def test_settings_of_missing_or_damaged_files(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.gif"):
        with pytest.raises(ImageError, match=name):
            read_settings(tmp_path / name)
        (tmp_path / name).write_bytes(b"rubbish" * 100)
        with pytest.raises(ImageError, match=name):
            read_settings(tmp_path / name)


# --- refused before any work ---


def test_the_formats() -> None:
    assert FORMATS == (".mp4", ".webm", ".mov", ".mkv", ".gif", ".webp", ".apng", ".png")


@pytest.mark.parametrize(
    "name", ["a.mp4", "b.GIF", "c.webp", "d.png", "frames", "new/deep/er/e.mp4", "new/frames", "v1.2.gif"]
)
def test_good_outputs_are_let_through_and_nothing_is_created(tmp_path: Path, name: str) -> None:
    assert check_output(str(tmp_path / name)) == tmp_path / name
    assert list(tmp_path.iterdir()) == []


def test_existing_outputs_of_the_right_kind_are_let_through(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "frames").mkdir()
    check_output(tmp_path / "a.mp4")
    check_output(tmp_path / "frames")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.avi", r"ends in '\.avi': use \.mp4, \.webm, \.mov, \.mkv, \.gif, \.webp, \.apng, \.png, or no suffix"),
        ("a.mp4.part", "ends in"),
        ("folder.mp4", "is a folder"),
        ("file", "is a file"),
        ("file/a.mp4", "file' is not a folder"),
        ("file/deep/frames", "file' is not a folder"),
        ("dangling/a.mp4", "dangling' is not a folder"),
        (".mp4", "no name"),
        ("..", "no name"),
        ("a\0.mp4", "no name"),
        ("a" * 300 + ".mp4", "too long"),
    ],
)
def test_bad_outputs_are_refused(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = contents(tmp_path)
    for action in (check_output, lambda out: save_film(frames(1), out)):
        with pytest.raises(OutputError, match=words):
            action(tmp_path / name)
    assert contents(tmp_path) == before


def test_empty_output_is_refused() -> None:
    for out in ("", ".", "/"):
        with pytest.raises(OutputError, match="no name"):
            check_output(out)


def as_a_mere_user(action: Callable[[], object]) -> bool:
    """Whether `action` passes in a child process without root's right to write anywhere."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


def test_a_read_only_place_is_refused() -> None:
    with tempfile.TemporaryDirectory() as outer:  # pytest's own folders are closed to other users
        Path(outer).chmod(0o755)
        locked = Path(outer) / "locked"
        locked.mkdir(mode=0o555)

        def check() -> None:
            for out in (locked / "a.mp4", locked / "frames", locked / "deep/a.mp4", locked):
                with pytest.raises(OutputError, match="locked' is read-only"):
                    check_output(out)

        assert as_a_mere_user(check)


def test_an_existing_folder_need_not_have_a_writable_parent() -> None:
    """It may be a mount of its own: the temporary frames must lie inside it."""
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer) / "mount"
        folder.mkdir()
        folder.chmod(0o777)
        Path(outer).chmod(0o555)
        assert as_a_mere_user(lambda: save_film(frames(2), folder))
        assert sorted(p.name for p in folder.iterdir()) == ["frame_0000.png", "frame_0001.png"]
        Path(outer).chmod(0o755)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 241, True, "8", None])
def test_bad_fps_is_refused(tmp_path: Path, fps: object) -> None:
    with pytest.raises(ConfigError, match=r"0\.01 to 240") as caught:
        save_film(frames(1), tmp_path / "a.mp4", fps=fps)  # type: ignore[arg-type]
    assert repr(fps) in str(caught.value)


def test_no_frames_and_unequal_frames_are_refused(tmp_path: Path) -> None:
    for name in EVERY_FORMAT:
        with pytest.raises(OutputError, match="no frames"):
            save_film([], tmp_path / name)
        with pytest.raises(OutputError, match="several sizes"):
            save_film([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))], tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_frames_of_other_modes(tmp_path: Path) -> None:
    for name in EVERY_FORMAT:
        save_film([picture.convert("L") for picture in frames(2)], tmp_path / name)


# --- failures at work ---


def broken_off() -> Iterator[Image.Image]:
    yield from frames(2)
    raise KeyboardInterrupt


def old_film(folder: Path, name: str) -> dict[str, bytes | None]:
    save_film(frames(3), folder / name, metadata=SETTINGS)
    return contents(folder)


@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_an_error_among_the_frames_leaves_the_old_film(tmp_path: Path, name: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        save_film(broken_off(), tmp_path / name)
    assert contents(tmp_path) == {}
    before = old_film(tmp_path, name)
    with pytest.raises(KeyboardInterrupt):
        save_film(broken_off(), tmp_path / name)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_a_disk_that_fills_up_leaves_the_old_film(tmp_path: Path, name: str) -> None:
    before = old_film(tmp_path, name)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))  # the kernel refuses to let a file grow beyond
    try:
        with pytest.raises(OutputError, match=r"cannot be written.*free some space") as caught:
            save_film(noise(), tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path / name) in str(caught.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_ctrl_c_while_writing_leaves_the_old_film(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        assert contents(tmp_path) != before, "the temporary lies beside the film, on the same disk"
        raise KeyboardInterrupt

    before = old_film(tmp_path, name)
    monkeypatch.setattr(film.os, "replace", interrupted)  # the last moment at which it can happen
    with pytest.raises(KeyboardInterrupt):
        save_film(noise(3), tmp_path / name)
    assert contents(tmp_path) == before


def test_sizes_a_format_cannot_hold(tmp_path: Path) -> None:
    wide = [Image.new("RGB", (20_000, 8))] * 2
    for name in ("a.mp4", "a.webp"):
        with pytest.raises(OutputError, match="cannot be written"):
            save_film(wide, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name in EVERY_FORMAT if name != "a"])
def test_the_same_film_has_the_same_bytes_and_ordinary_permissions(tmp_path: Path, name: str) -> None:
    first = save_film(frames(), tmp_path / name, metadata=SETTINGS).read_bytes()
    assert save_film(frames(), tmp_path / name, metadata=SETTINGS).read_bytes() == first
    (tmp_path / "plain").touch()
    assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_same_narrow_frames_give_the_same_bytes_every_time(tmp_path: Path) -> None:
    """Memory about is dirty, as while frames are made: x264's mbtree then took another decision in one film of three."""
    draw = np.random.default_rng(0)
    first, last = (draw.integers(0, 255, (12, 8, 3), dtype=np.uint8).astype(float) for _ in range(2))

    def frames() -> Iterator[Image.Image]:
        for i in range(8):
            mixed = Image.fromarray(((1 - i / 7) * first + i / 7 * last).astype(np.uint8))
            dirty = [draw.bytes(int(draw.integers(1, 200_000))) for _ in range(20)]
            assert dirty
            yield mixed.resize((64, 96), Image.Resampling.BICUBIC)

    films = {save_film(frames(), tmp_path / f"{i}.mp4").read_bytes() for i in range(16)}
    assert len(films) == 1


def without(monkeypatch: pytest.MonkeyPatch, *encoders: str) -> None:
    """PyAV as some systems build it."""
    real = av.codec.Codec

    def codec(name: str, mode: str) -> Any:
        if name in encoders:
            raise av.codec.codec.UnknownCodecError(name)
        return real(name, mode)

    monkeypatch.setattr(av.codec, "Codec", codec)


def test_a_missing_encoder_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix in FORMATS:
        check_output(tmp_path / f"a{suffix}")
    without(monkeypatch, "libx264", "libopenh264", "mpeg4")
    with pytest.raises(
        OutputError, match=r"needs the encoder libx264, .* without here: use \.webm, \.mov, \.mkv, \.gif"
    ):
        check_output(tmp_path / "a.mp4")
    for suffix in FORMATS[1:]:
        check_output(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("quality", ["small", "good", "best"])
def test_another_encoder_is_taken_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quality: Any) -> None:
    without(monkeypatch, "libx264", "libopenh264")
    with pytest.warns(UserWarning, match=r"a\.mp4 is better made with .*: mpeg4 is taken, which browsers do not play"):
        check_output(tmp_path / "a.mp4")
    frames = [Image.new("RGB", (64, 48), (40 * k, 200 - 40 * k, 90)) for k in range(5)]
    save_film(frames, tmp_path / "a.mp4", quality=quality, metadata={"seed": 7})
    with av.open(str(tmp_path / "a.mp4")) as film:
        assert film.streams.video[0].codec_context.name == "mpeg4"
        found = [np.asarray(frame.to_image(), int) for frame in film.decode(video=0)]
    assert len(found) == len(frames) and read_settings(tmp_path / "a.mp4") == {"seed": 7}
    assert max(np.abs(one - np.asarray(other, int)).max() for one, other in zip(found, frames, strict=True)) <= 4


@pytest.mark.parametrize(
    ("out", "given", "said"),
    [
        ("a.png", {"hold", "ping_pong", "reverse", "fps"}, ["--hold", "--reverse", "--ping-pong", "--fps"]),
        ("frames", {"hold", "fps", "seconds", "transparent"}, ["--hold"]),
        ("a.mp4", {"hold", "quality", "fps", "transparent"}, ["--transparent"]),
        ("a.mkv", {"quality", "transparent"}, ["--quality"]),
        ("a.gif", {"quality", "transparent"}, ["--quality", "--transparent"]),
        ("a.webp", {"quality", "hold", "transparent"}, []),
    ],
)
def test_what_changes_nothing_in_a_kind_of_file_is_said(out: str, given: set[str], said: list[str]) -> None:
    found = unused_in(out, given)
    assert [sentence.split()[0] for sentence in found] == said
    assert all(f" changes nothing in {out}, which " in sentence and sentence.endswith(".") for sentence in found)
