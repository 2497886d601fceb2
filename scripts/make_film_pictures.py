"""The pictures of docs/films.md: `python scripts/make_film_pictures.py` writes them there; or only those that are named.

The sizes of docs/films.md's files are printed by `python scripts/make_film_pictures.py sizes`.
"""

from __future__ import annotations

import sys
import tempfile
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from diffmorpher import Morpher, SampleConfig, ScheduleConfig
from diffmorpher.evaluation.warp import dissolve, warp
from diffmorpher.files.films import contact_sheet
from diffmorpher.files.focus import what_matters
from diffmorpher.files.pictures import fit_image
from diffmorpher.files.playback import Playback
from diffmorpher.files.sound import RATE, beat, read_sound
from diffmorpher.method.ghost import ghost
from diffmorpher.method.schedule import uniform_positions
from diffmorpher.models.catalog import ASSETS
from diffmorpher.path import to_pil

DOCS = Path(__file__).parents[1] / "docs"
DEMO = ASSETS / "demo"


def rows(name: str, strips: list[tuple[str, list[Image.Image]]]) -> None:
    """Strips below each other, each with a line that says what it is."""
    sheets = [(label, contact_sheet(pictures, columns=len(pictures))) for label, pictures in strips]
    width, height = max(sheet.width for _, sheet in sheets), sum(sheet.height + 20 for _, sheet in sheets)
    canvas, y = Image.new("RGB", (width, height), "white"), 0
    for label, sheet in sheets:
        ImageDraw.Draw(canvas).text((2, y + 4), label, fill=(60, 60, 60))
        canvas.paste(sheet, (0, y + 20))
        y += sheet.height + 20
    canvas.save(DOCS / name, optimize=True)


def style() -> None:
    """The same film without and with a style: the LoRA of a tangerine."""
    morpher = Morpher.from_pretrained("mini", device="cpu")
    pictures, prompts = [DEMO / "cat-face.png", DEMO / "fox-face.png"], ["a cat face", "a fox face"]
    tangerine = morpher.fit(DEMO / "tangerine.png", "a tangerine")
    strips = []
    for label, styles in (("without", ()), ("--style tangerine.safetensors:1.5", tangerine.scaled(1.5))):
        path = morpher.prepare(pictures, prompts, fit=None, steps=12, styles=styles)
        made = path.sample([0.2, 0.35, 0.5, 0.65, 0.8], SampleConfig(steps=12, exact_ends=True))
        strips.append((label, [frame.resize((128, 128), Image.Resampling.LANCZOS) for frame in made]))
    rows("style.png", strips)


def framing() -> None:
    """One wide picture, cut to a square and to 9:16 in each way."""
    wide = Image.new("RGB", (640, 320), (236, 240, 245))
    ImageDraw.Draw(wide).rectangle((0, 230, 640, 320), fill=(190, 205, 180))
    thing = Image.open(DEMO / "fox-face.png").convert("RGB").resize((200, 200))
    wide.paste(thing, (420, 70), thing.convert("L").point(lambda level: 255 * (level < 248)))
    ways = [("crop", (0.5, 0.5)), ("crop", what_matters(wide)), ("pad", (0.5, 0.5)), ("blur", (0.5, 0.5))]
    label = "as it is; --focus center; --focus auto; --resize pad; --resize blur"
    rows("framing.png", [(label, [wide.resize((256, 128)).crop((0, 0, 256, 128))])] + [
        ("", [fit_image(wide, size, how, focus) for how, focus in ways]) for size in ((128, 128), (128, 228))
    ])  # fmt: skip


def pace() -> None:
    """How far the way through three pictures is covered over time, of films that are even to the eye; and a film on a beat."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey=True).flat
    films: list[tuple[str, dict[str, Any], ScheduleConfig]] = [
        ("even", {}, ScheduleConfig()),
        ("--hold 0.5,0.5,0.5", {"hold": (0.5, 0.5, 0.5)}, ScheduleConfig()),
        ("--stretch 1,3", {}, ScheduleConfig(stretch=(1, 3))),
        ("--ease in-out", {}, ScheduleConfig(ease="in-out")),
        ("--ping-pong", {"ping_pong": True}, ScheduleConfig()),
    ]
    for ax, (title, played, schedule) in zip(axes, films, strict=False):
        play = Playback(24, **played)
        positions = uniform_positions(play.frames_in(4, 3), 3, False, schedule)
        ax.plot([i / 24 for i in range(len(play.order(positions)))], [positions[i] for i in play.order(positions)])
        ax.set_title(title, fontsize=10)
    with tempfile.TemporaryDirectory() as folder:
        last = list(figure.axes)[5]
        last.plot(np.arange(96) / 24, 2 * np.cumsum([0, *beat(clicks(Path(folder), 4), 95, 24)]))
        last.set_title("--beat, sounds at 0.5, 1, 2, 2.5 and 3 s", fontsize=10)
    for ax in figure.axes:
        ax.set_yticks([0, 1, 2], ["first", "second", "third"])
    figure.supxlabel("seconds", fontsize=9)
    figure.savefig(DOCS / "pace.png", dpi=90, metadata={"Software": None})


def clicks(folder: Path, seconds: int) -> Path:
    """A sound file with beats at 0.5, 1, 2, 2.5 and 3 s, each dying away."""
    sound = np.zeros(seconds * 8000)
    for start in (0.5, 1, 2, 2.5, 3, 4, 4.5, 5):
        beats = sound[int(start * 8000) :][:2400]
        beats += np.sin(np.arange(len(beats))) * np.exp(-np.arange(len(beats)) / 600) * 2e4
    with wave.open(str(folder / "clicks.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(sound.astype("<i2").tobytes())
    return folder / "clicks.wav"


def sound() -> None:
    """A sound of 6 s as it lies under a film of 4 s, and what the film covers of its way with it, evenly and on the beat."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    with tempfile.TemporaryDirectory() as folder:
        song = clicks(Path(folder), 6)
        heard = read_sound(song, 4)[0]
        moved = np.cumsum([0, *beat(song, 95, 24)])
    above.plot(np.arange(len(heard)) / RATE, heard, linewidth=0.6)
    above.axvspan(3, 4, alpha=0.15)
    above.set_title("--audio song.wav: cut to the film, its last second faded", fontsize=10)
    below.plot(np.arange(96) / 24, np.linspace(0, 1, 96), linestyle="--", label="even")
    below.plot(np.arange(96) / 24, moved, label="--beat")
    below.set_yticks([0, 1], ["first", "second"])
    below.set_xlabel("seconds", fontsize=9)
    below.legend(fontsize=8)
    above.set_yticks([])
    figure.savefig(DOCS / "sound.png", dpi=90, metadata={"Software": None})


def ghosts() -> None:
    """The same two pictures as a cross-fade, as a warp and as a morph, each with its ghost."""
    result = Morpher.from_pretrained("mini", device="cpu")(
        [DEMO / "lion-face.png", DEMO / "fox-face.png"], ["a lion face", "a fox face"], num_frames=13
    )
    morph = torch.stack([torch.from_numpy(np.array(frame)).permute(2, 0, 1) / 127.5 - 1 for frame in result.frames])
    ends, at = morph[[0, -1]], [i / 12 for i in range(13)]
    strips = []
    for name, frames in (("dissolve", dissolve(ends, at)), ("warp", warp(ends, at)), ("diffmorpher", morph)):
        value = float(ghost(frames[4:9], ends[0], ends[1]).mean())
        shown = [picture.resize((112, 112), Image.Resampling.LANCZOS) for picture in to_pil(frames[::2])]
        strips.append((f"{name}: ghost {value:.2f}", shown))
    rows("ghost.png", strips)


def sizes() -> None:
    """Kilobytes of the demo's film, by kind of file and quality, as rows of a table."""
    result = Morpher.from_pretrained("mini", device="cpu")([DEMO / "tiger-face.png", DEMO / "wolf-face.png"])
    with tempfile.TemporaryDirectory() as folder:
        for kind in (".mp4", ".webm", ".mov", ".mkv", ".gif", ".webp", ".apng"):
            written = []
            for quality in ("small", "good", "best"):
                written.append(result.save(Path(folder) / f"{quality}{kind}", quality=quality).stat().st_size / 1000)
            print(f"| `{kind}` | " + " | ".join(f"{size:.0f}" for size in written) + " |")


if __name__ == "__main__":
    made = {each.__name__: each for each in (pace, sound, framing, style, ghosts, sizes)}
    for name in sys.argv[1:] or made:
        made[name]()
