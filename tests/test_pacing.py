"""Pacing: where eased and stretched films have their frames, how they are played, and what stands in the written file."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from conftest import tiny_pipeline
from diffmorpher import FitConfig, Morpher, Recipe, SampleConfig, ScheduleConfig, read_settings
from diffmorpher.cli import app
from diffmorpher.config import Ease
from diffmorpher.errors import ConfigError
from diffmorpher.files.playback import Playback, played
from diffmorpher.method.schedule import plan, uniform_positions

#: What an animator expects of each: the share of the way at a share of the time.
CURVES: dict[Ease, Callable[[float], float]] = {
    "linear": lambda t: t,
    "in": lambda t: t**2,
    "out": lambda t: 2 * t - t**2,
    "in-out": lambda t: 2 * t**2 if t < 0.5 else 4 * t - 2 * t**2 - 1,
}


LUMA = np.array([0.2126, 0.7152, 0.0722])  # its chroma is stored at half the size


class Way:
    """A film whose perceptual distance is that of known heights: it runs fast in the middle of every way."""

    def __init__(self, num_frames: int, num_images: int, loop: bool = False) -> None:
        self.num_frames, self.num_images, self.loop = num_frames, num_images, loop
        self.made: list[float] = []

    @staticmethod
    def height(position: float) -> float:
        k, x = divmod(position, 1)
        return float(k + (1 - math.cos(math.pi * x)) / 2)

    def make(self, positions: Sequence[float], spare: int = 0) -> None:
        self.made += positions

    def distances(self, positions: Sequence[float], reach: int = 1) -> list[list[float]]:
        closed = [*positions, float(self.num_images)] if self.loop else list(positions)
        return [
            [self.height(q) - self.height(p) for q in closed[i + 1 : i + 1 + reach]] for i, p in enumerate(closed[:-1])
        ]


@pytest.mark.parametrize("ease", CURVES)
@pytest.mark.parametrize("method", ["insert", "two-pass"])
@pytest.mark.parametrize("loop", [False, True])
def test_easing_bends_the_even_speed_on_every_way(ease: Ease, method: Any, loop: bool) -> None:
    film = Way(64 if loop else 65, 2 if loop else 3, loop)
    positions = plan(film, ScheduleConfig(method=method, rounds=4, most=999, ease=ease, stretch=(1, 1))).positions
    assert len(positions) == film.num_frames and positions == sorted(positions)
    assert positions[0] == 0 and positions[32] == 1
    heights = [film.height(p) for p in positions[:33]]
    within = 0.02 if method == "two-pass" else 0.055  # frames that are there already are not moved
    assert heights == pytest.approx([CURVES[ease](i / 32) for i in range(33)], abs=within)
    if ease != "linear":
        assert np.abs(np.array(heights) - np.linspace(0, 1, 33)).max() > 0.1


@pytest.mark.parametrize("ease", ["linear", "in-out"])
@pytest.mark.parametrize(("method", "enabled"), [("insert", True), ("two-pass", True), ("insert", False)])
@pytest.mark.parametrize("most", [10, 60])
def test_stretches_have_exactly_their_share_of_the_gaps(ease: Ease, method: Any, enabled: bool, most: int) -> None:
    film = Way(29, 4)
    config = ScheduleConfig(enabled, method, most=most, ease=ease, stretch=(2, 1, 4))
    positions = plan(film, config).positions
    assert [positions[i] for i in (0, 8, 12, 28)] == [0, 1, 2, 3]
    assert len(set(positions)) == 29
    assert set(film.made) <= set(positions), "no frame is made that does not stay"


def test_easing_without_stretches_leaves_lengths_to_the_pictures() -> None:
    film = Way(41, 3)
    film.height = lambda p: min(p, 1) + 3 * max(0, p - 1)  # type: ignore[method-assign]
    positions = plan(film, ScheduleConfig(ease="in-out", rounds=4)).positions
    assert positions.index(1.0) == 10


def test_without_even_speed_easing_bends_the_positions() -> None:
    assert uniform_positions(5, 2, config=ScheduleConfig(ease="in")) == [0, 1 / 16, 1 / 4, 9 / 16, 1]
    assert uniform_positions(7, 3, config=ScheduleConfig(stretch=(1, 2))) == [0, 0.5, 1, 1.25, 1.5, 1.75, 2]


# ---- how frames are played


def test_the_order_of_frames() -> None:
    positions = [0, 0.5, 1, 1.5, 2]
    held = Playback(2, hold=(0.5, 0, 1))
    assert held.order(positions) == [0, 0, 1, 2, 3, 4, 4, 4]
    assert replace(held, reverse=True).order(positions) == [4, 4, 4, 3, 2, 1, 0, 0]
    assert replace(held, ping_pong=True).order(positions) == [0, 0, 1, 2, 3, 4, 4, 4, 3, 2, 1]
    assert Playback(2, hold=0.5).order(positions) == [0, 0, 1, 2, 2, 3, 4, 4]  # type: ignore[arg-type]
    assert Playback(2, reverse=True).order([0, 0.5, 1, 1.5], loop=True) == [0, 3, 2, 1]
    assert held.times(positions) == [0, 1, 1.5, 2, 2.5]
    assert replace(held, reverse=True).times(positions) == [3, 2.5, 2, 1.5, 0]


def test_frames_that_are_only_repeated_are_played_as_they_come() -> None:
    taken: list[int] = []

    def coming() -> Any:
        for i in range(3):
            taken.append(i)
            yield Image.new("L", (1, 1), i)

    film = played(coming(), [0, 0, 1, 2, 2])
    assert [next(film).getpixel((0, 0)) for _ in range(3)] == [0, 0, 1] and taken == [0, 1]
    assert [picture.getpixel((0, 0)) for picture in film] == [2, 2]
    assert [picture.getpixel((0, 0)) for picture in played(coming(), [2, 1, 1, 0])] == [2, 1, 1, 0]


@given(
    seconds=st.floats(3, 30),
    fps=st.sampled_from([8.0, 24.0, 29.97]),
    images=st.integers(2, 4),
    hold=st.sampled_from([(), (0.3,), "each"]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_a_length_in_seconds_is_that_of_the_whole_film(
    seconds: float, fps: float, images: int, hold: Any, flags: tuple[bool, bool, bool]
) -> None:
    loop, ping_pong, reverse = flags
    play = Playback(fps, tuple(0.1 * k for k in range(images)) if hold == "each" else hold, reverse, ping_pong)
    count = play.frames_in(seconds, images, loop)
    order = play.order(uniform_positions(count, images, loop), loop)
    assert abs(len(order) - seconds * fps) <= (1.5 if ping_pong else 0.5)
    assert set(order) == set(range(count))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seconds": 0.2}, "0.2 s at 8 frames per second leave 2 frames beside what is held, but 3 pictures need 3"),
        ({"seconds": 2, "hold": (1.0,)}, "leave 0 frames beside what is held"),
        ({"hold": (1.0, 2.0)}, "2 holds were given for 3 pictures: give one for all, one each, or none."),
        ({"schedule": ScheduleConfig(stretch=(1, 2, 3))}, "3 stretches were given for 3 pictures: give 2."),
        (
            {"schedule": ScheduleConfig(stretch=(1, 2)), "loop": True},
            "2 stretches were given for 3 pictures in a loop: give 3.",
        ),
        ({"seconds": 8e4}, "frames is 640000, but must be a whole number from 2 to 86400"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        Recipe(("a", "b", "c"), **changes).check()
    assert said in str(error.value)


def test_stretches_are_seconds_unless_the_length_is_given() -> None:
    three = Recipe(("a", "b", "c", "d"))
    alone = three.changed(stretch=(2, 1, 4), fps=10.0)
    assert alone.frames == 71 and alone.typed() == {"stretch": (2, 1, 4), "fps": 10}
    assert three.changed(stretch=(2, 1, 4), loop=True).frames == 56
    shares = three.changed(stretch=(2, 1, 4), frames=15)
    assert shares.frames == 15 and "--stretch 2,1,4 --frames 15" in shares.command()
    assert three.changed(stretch=(2, 1, 4), frames=16).typed() == {"stretch": (2, 1, 4), "frames": 16}
    timed = three.changed(stretch=(2, 1, 4), seconds=3.0)
    assert timed.frame_count(4) == 24 and timed.changed(stretch=(1, 1, 1)).seconds == 3
    assert timed.changed(frames=9).seconds is None


# ---- the written file


@pytest.fixture(scope="module")
def morpher() -> Morpher:
    return Morpher(tiny_pipeline())


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    monkeypatch.chdir(tmp_path)
    for name, sigma in (("a", 20), ("b", 60), ("c", 90)):
        Image.effect_noise((64, 64), sigma).convert("RGB").save(f"{name}.png")
    return ("a.png", "b.png", "c.png")


def small(pictures: tuple[str, ...], **changes: Any) -> Recipe:
    fit, sample = FitConfig(rank=2, steps=1), SampleConfig(steps=2)
    return Recipe(pictures, size=(64, 64), fit=fit, sample=sample, **changes)


def shown(file: str) -> tuple[list[np.ndarray[Any, Any]], float]:
    """Frames of a film, and how long it is in seconds; its rate must be constant."""
    with av.open(file) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(video=0))
        gaps = {round((b.time - a.time) * 1e4) for a, b in pairwise(frames)}
        assert len(gaps) == 1, "the rate is not constant"
        return [f.to_ndarray(format="rgb24").astype(int) for f in frames], float(stream.duration * stream.time_base)


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("ping_pong", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_file_is_as_long_as_asked_and_holds_the_pictures(
    morpher: Morpher, pictures: tuple[str, ...], loop: bool, ping_pong: bool, reverse: bool
) -> None:
    stretch = (1, 2, 1) if loop else (1, 2)
    recipe = small(pictures, seconds=3, hold=(0.5, 0, 0.25), loop=loop, ping_pong=ping_pong, reverse=reverse)
    recipe = replace(recipe, schedule=ScheduleConfig(ease="in-out", stretch=stretch))
    result = morpher.make(recipe)
    result.save("film.mp4")
    frames, length = shown("film.mp4")
    assert abs(length - 3) <= 1.01 / 8 and len(frames) == round(length * 8)
    order = recipe.playback.order(result.alphas, loop)
    for frame, i in zip(frames, order, strict=True):
        assert np.abs((frame - np.asarray(result.frames[i])) @ LUMA).mean() < 4
    again = Recipe.read("film.mp4")
    assert (again.seconds, again.hold, again.reverse, again.schedule) == (3, (0.5, 0, 0.25), reverse, recipe.schedule)
    morpher.make(again).save("again.mp4")
    assert Path("again.mp4").read_bytes() == Path("film.mp4").read_bytes()


def test_a_hold_repeats_a_frame_and_does_not_make_it_again(morpher: Morpher, pictures: tuple[str, ...]) -> None:
    plain, held = (morpher.make(small(pictures, frames=6, hold=hold)) for hold in ((), (2.0,)))
    assert plain.unet_rows == held.unet_rows and plain.alphas == held.alphas and len(held.frames) == 6
    held.save("held.mp4")
    frames, length = shown("held.mp4")
    assert len(frames) == 6 + 3 * 16 and length == pytest.approx(54 / 8)
    still = max(np.abs(frame - frames[0]).mean() for frame in frames[:17])
    assert 3 * still < np.abs(frames[-1] - frames[0]).mean()
    for name in ("held.gif", "held.webp"):
        held.save(name)
        with Image.open(name) as film:
            lengths = []
            for i in range(film.n_frames):  # type: ignore[attr-defined]
                film.seek(i)
                film.load()
                lengths.append(film.info["duration"])
        assert sum(lengths) == pytest.approx(54_000 / 8, abs=10)
    held.save("frames")
    assert len(list(Path("frames").iterdir())) == 6, "a folder holds each frame once"


def test_another_playback_of_the_same_frames(morpher: Morpher, pictures: tuple[str, ...]) -> None:
    result = morpher.make(small(pictures, seconds=2))
    result.save("b.mp4", fps=16, hold=0.5, reverse=True)
    assert shown("b.mp4")[1] == pytest.approx((16 + 3 * 8) / 16)
    settings: Any = read_settings("b.mp4")
    assert (settings["frames"], settings["hold"], "seconds" in settings) == (16, 0.5, False)
    assert Recipe.read("b.mp4").hold == (0.5,)
    with pytest.raises(TypeError, match="speed"):
        result.save("c.mp4", speed=3)


def test_on_the_command_line(
    morpher: Morpher, pictures: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(app, "_load", lambda recipe, typed=(), no_cache=False: morpher)

    def run(*words: str) -> tuple[int, str, str]:
        small = ("--size", "64x64", "--steps", "2", "--lora-steps", "1", "--fps", "10")
        monkeypatch.setattr(sys, "argv", ["diffmorpher", "morph", *words, *small, "--json"])
        with pytest.raises(SystemExit) as end:
            app.main()
        return int(end.value.code or 0), *capfd.readouterr()

    status, out, err = run(*pictures, "-o", "a.mp4", "--stretch", "0.5,1", "--hold", "0.2,0,0.3", "--ease", "out")
    assert status == 0, err
    figures = json.loads(out)
    assert figures["frames"] == 16 and len(figures["times"]) == 16
    stops = [figures["times"][figures["alphas"].index(k)] for k in (0, 1, 2)]
    assert stops == pytest.approx([0, 0.2 + 0.5, 0.2 + 0.5 + 1])
    assert shown("a.mp4")[1] == pytest.approx(2.1)
    status, out, err = run("--from", "a.mp4", "-o", "b.mp4", "--seconds", "3", "--reverse", "--hold", "0.1")
    assert status == 0, err
    assert shown("b.mp4")[1] == pytest.approx(3)
    times = json.loads(out)["times"]
    assert times == sorted(times, reverse=True) and json.loads(out)["settings"]["schedule"]["stretch"] == [0.5, 1]
    status, _, err = run(*pictures, "-o", "c.mp4", "--seconds", "3", "--frames", "9")
    assert status == 2 and "--frames and --seconds contradict each other" in err
    status, _, err = run(*pictures, "-o", "c.mp4", "--hold", "soon")
    assert status == 2 and "hold is 'soon', but must be a number, or numbers with commas between." in err
