"""Sound under a film, and frames that follow it: read again from the written file."""

from __future__ import annotations

import os
import time
import wave
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from conftest import tiny_pipeline
from diffmorpher import FitConfig, Morpher, Recipe, SampleConfig
from diffmorpher.config import ScheduleConfig
from diffmorpher.errors import ConfigError, ImageError, RecipeError, SoundError
from diffmorpher.files.films import read_settings, save_film, save_made
from diffmorpher.files.sound import RATE, beat, read_sound
from diffmorpher.gather import gather
from diffmorpher.method.schedule import plan
from test_pacing import Way

BEATS = (0.5, 1.0, 2.0, 2.5)


def clicks(file: Path, seconds: float = 4, rate: int = 22_050, drone: float = 0.05) -> Path:
    """A drone that goes on, and a short tone that sets in at each of `BEATS`."""
    t = np.arange(round(seconds * rate)) / rate
    sound = drone * np.sin(2 * np.pi * 220 * t)
    for at in BEATS:
        sound += 0.5 * np.sin(2 * np.pi * 880 * t) * np.where(t >= at, np.exp(-(t - at) / 0.05), 0)
    with wave.open(str(file), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((sound * 32767).astype("<i2").tobytes())
    return file


def pictures(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (64, 48), (i * 5, 80, 200 - i * 3)) for i in range(count)]


def heard(file: Path) -> tuple[str, np.ndarray[Any, Any]]:
    with av.open(str(file)) as container:
        name = container.streams.audio[0].codec_context.codec.canonical_name
    return name, read_sound(file)


@pytest.mark.parametrize(("kind", "codec"), [("mp4", "aac"), ("webm", "opus"), ("mov", "pcm_s16le"), ("mkv", "flac")])
def test_the_sound_is_in_time_cut_and_faded(tmp_path: Path, kind: str, codec: str) -> None:
    song = clicks(tmp_path / "song.wav", drone=0.2)
    film = save_film(pictures(24), tmp_path / f"a.{kind}", fps=8, audio=song)
    name, sound = heard(film)
    assert name == codec
    assert sound.shape[1] / RATE == pytest.approx(3, abs=0.03)
    with av.open(str(film)) as container:
        assert container.duration / 1e6 == pytest.approx(3, abs=0.03)
        assert len(list(container.decode(video=0))) == 24
    loudness = np.abs(sound[0])
    for at in BEATS[:2]:
        around = loudness[round((at - 0.1) * RATE) : round((at + 0.1) * RATE)]
        assert int(np.argmax(around > 0.4)) / RATE - 0.1 == pytest.approx(0, abs=0.01), "the beat is where it was"
    tail = [loudness[round(s * RATE) : round((s + 0.1) * RATE)].max() for s in (2.2, 2.85)]
    assert tail[1] < 0.3 * tail[0], "it fades out"


def test_a_shorter_sound_ends_before_the_film(tmp_path: Path) -> None:
    song = clicks(tmp_path / "song.wav", seconds=1)
    film = save_film(pictures(24), tmp_path / "a.mp4", fps=8, audio=song)
    assert heard(film)[1].shape[1] / RATE == pytest.approx(1, abs=0.05)
    with av.open(str(film)) as container:
        assert container.duration / 1e6 == pytest.approx(3, abs=0.01)
    unfaded, whole = read_sound(song), read_sound(song, 1)
    np.testing.assert_array_equal(unfaded, whole)


@pytest.mark.parametrize("kind", ["mp3", "flac", "ogg", "m4a"])
def test_other_kinds_of_files(tmp_path: Path, kind: str) -> None:
    codec = {"mp3": "libmp3lame", "flac": "flac", "ogg": "libopus", "m4a": "aac"}[kind]
    wav = read_sound(clicks(tmp_path / "song.wav"))
    with av.open(str(tmp_path / f"song.{kind}"), "w") as container:
        stream = container.add_stream(codec, rate=RATE, layout="stereo")
        frame = av.AudioFrame.from_ndarray(wav, format="fltp", layout="stereo")
        frame.sample_rate = RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    sound = read_sound(tmp_path / f"song.{kind}", 3)
    assert sound.shape == (2, 3 * RATE)
    assert int(np.argmax(np.abs(sound[0]) > 0.3)) / RATE == pytest.approx(0.5, abs=0.03)


def test_a_colon_in_its_path_is_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    clicks(tmp_path / "pipe:1.wav", seconds=1)
    assert read_sound("pipe:1.wav").shape == (2, RATE)


def test_what_is_no_sound_is_one_sentence(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.mp3").write_bytes(b"rubbish" * 99)
    save_film(pictures(2), tmp_path / "c.mp4")
    said = {
        "a.png": "no kind of file that is read",
        "b.mp3": "cannot be read",
        "c.mp4": "holds no sound",
        "d.wav": "does not exist",
    }
    for name, words in said.items():
        with pytest.raises(SoundError, match=words):
            read_sound(tmp_path / name)
    with pytest.raises(SoundError, match="does not exist"):
        save_film(pictures(2), tmp_path / "e.mp4", audio=tmp_path / "d.wav")
    with pytest.raises(SoundError, match="does not exist"):
        save_made(pictures(2), tmp_path / "e.mp4", {}, audio=tmp_path / "d.wav")
    assert not (tmp_path / "e.mp4").exists()


def test_a_list_of_other_files_is_no_sound(tmp_path: Path) -> None:
    """FFmpeg reads such as the files that they name, which may be anybody's, or never end."""
    clicks(tmp_path / "secret.wav", seconds=1)
    os.mkfifo(tmp_path / "fifo.wav")
    (tmp_path / "hls.m3u8").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\n{tmp_path / 'secret.wav'}\n#EXT-X-ENDLIST\n"
    )
    for name in ("secret", "fifo", "itself"):
        (tmp_path / f"of-{name}.wav").write_text(f"ffconcat version 1.0\nfile {name}.wav\n")
    (tmp_path / "itself.wav").write_text("ffconcat version 1.0\nfile itself.wav\n")
    began = time.monotonic()
    for name in ("hls.m3u8", "of-secret.wav", "of-fifo.wav", "of-itself.wav", "itself.wav"):
        with pytest.raises(SoundError, match="no kind of file that is read"):
            read_sound(tmp_path / name, 1)
        film = (tmp_path / name).rename(tmp_path / f"{name}.mp4")
        with pytest.raises(ImageError, match="No settings can be read"):
            read_settings(film)
    assert time.monotonic() - began < 5


# ---- the beat


@pytest.mark.parametrize("rate", [1, 999, 755_585_589])
def test_a_rate_that_no_sound_has_is_refused_before_anything_is_made_for_it(tmp_path: Path, rate: int) -> None:
    """Of 755 MHz the resampler worked for 6 seconds at tables of gigabytes (fuzz input 60741)."""
    with wave.open(str(tmp_path / "song.wav"), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(bytes(1200))
    begun = time.process_time()
    with pytest.raises(SoundError, match=f"{rate:,} samples a second"):
        read_sound(tmp_path / "song.wav")
    assert time.process_time() - begun < 1


def test_the_way_is_covered_where_the_beats_set_in(tmp_path: Path) -> None:
    song = clicks(tmp_path / "song.wav", seconds=3)
    steps = np.array(beat(song, 72, 24))
    assert steps.sum() == pytest.approx(1) and steps.min() > 0
    for at in BEATS:
        assert 0.15 < steps[round(at * 24) - 1 : round(at * 24) + 6].sum() < 0.3
    near = sum(steps[round(at * 24) - 1 : round(at * 24) + 6].sum() for at in BEATS)
    assert near > 0.75, "in a third of the time"
    silent = clicks(tmp_path / "drone.wav", seconds=0.4)
    assert beat(silent, 8, 24)[2:] == pytest.approx([1 / 8] * 6, abs=0.1)
    with wave.open(str(tmp_path / "nothing.wav"), "wb") as out:
        out.setparams((1, 2, 8000, 0, "NONE", ""))
        out.writeframes(bytes(8000))
    assert beat(tmp_path / "nothing.wav", 4, 8) == [0.25] * 4


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("stretch", [(), (1, 1)])
def test_frames_follow_the_pace_and_pass_through_every_picture(loop: bool, stretch: tuple[float, ...]) -> None:
    film = Way(24 if loop else 25, 2 if loop else 3, loop)
    pace = [4.0 if i % 6 == 0 else 0.5 for i in range(24)]
    positions = plan(film, ScheduleConfig(stretch=stretch), pace).positions
    assert len(positions) == film.num_frames and positions[0] == 0 and 1 in positions
    if stretch:
        assert positions[12] == 1
    heights = [film.height(p) for p in positions]
    wanted = np.concatenate([[0], np.cumsum(pace)[: film.num_frames - 1]]) / sum(pace) * 2
    assert np.abs(np.array(heights) - wanted).max() < 0.12
    jumps = np.diff(heights)
    assert min(jumps[i] for i in (0, 6, 12, 18)) > 1.7 * max(j for i, j in enumerate(jumps) if i % 6)


def test_a_film_that_follows_a_sound_and_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, sigma in (("a", 20), ("b", 60)):
        Image.effect_noise((64, 64), sigma).convert("RGB").save(f"{name}.png")
    clicks(Path("song.wav"))
    few: Any = {"size": (64, 64), "fit": FitConfig(rank=2, steps=1), "sample": SampleConfig(steps=2)}
    recipe, _ = gather(Recipe(("a.png", "b.png"), seconds=3, audio="song.wav", beat=True, **few))
    morpher = Morpher(tiny_pipeline())
    result = morpher.make(recipe)
    even = morpher.make(Recipe(("a.png", "b.png"), seconds=3, **few))
    assert len(result.alphas) == len(even.alphas) == 24 and result.alphas != even.alphas
    result.save("film.mp4")
    again = Recipe.read("film.mp4")
    assert (again.audio, again.beat) == ("song.wav", True)
    assert str(tmp_path).encode() not in Path("film.mp4").read_bytes()
    morpher.make(gather(again)[0]).save("again.mp4")
    assert Path("again.mp4").read_bytes() == Path("film.mp4").read_bytes()
    backwards = morpher.make(Recipe(recipe.pictures, seconds=3, audio="song.wav", beat=True, reverse=True, **few))
    assert backwards.alphas != result.alphas
    clicks(Path("song.wav"), seconds=3.5)
    with pytest.raises(RecipeError, match=r"audio: '.*song.wav' is another file than"):
        gather(again)
    for bad, words in (({"hold": (1,)}, "no easing and no holds"), ({"audio": None}, "needs a sound: give one")):
        with pytest.raises(ConfigError, match=words):
            gather(again.changed(**{name: value for name, value in bad.items() if value})) if "hold" in bad else Recipe(
                ("a.png", "b.png"), beat=True
            ).check()
