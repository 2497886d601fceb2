"""Stills for video models: numbered pictures, and a JSON that says where each belongs, as LTX and Wan take them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import OutputError
from .atomic import replacing
from .films import save_film

#: The file beside the stills.
NAME = "keyframes.json"
#: More is a film.
MAX_STILLS = 64
#: Frames a second that a model was made for, and frames to each of its latent ones, of which a film has a multiple and one.
LTX, WAN = (24, 8), (16, 4)
#: Of stills between the pictures: what a video model may change to move through them. The pictures themselves have 1.
BETWEEN = 0.7


@dataclass(frozen=True)
class Still:
    """A still: its position on the path, its time in seconds, and how closely a video is to keep to it, 0 to 1."""

    position: float
    time: float
    strength: float


def check_keyframes(folder: str | os.PathLike[str]) -> None:
    """Raise `OutputError` where a file of another's would be replaced."""
    file = Path(folder, NAME)
    if not os.path.lexists(file):
        return
    try:
        ours = file.stat().st_size < 2**20 and {"stills", "ltx", "wan"} <= json.loads(file.read_text("utf-8")).keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        ours = False
    if not ours:
        raise OutputError(f"{str(file)!r} is there, and not from this program: choose another folder.")


def write_keyframes(
    pictures: Sequence[Image.Image], stills: Sequence[Still], folder: str | os.PathLike[str], metadata: dict[str, Any]
) -> Path:
    """Write the stills as frame_0000.png ... and `keyframes.json`. Raises `OutputError`."""
    document = json.dumps(described(stills), indent=1)
    out = save_film(pictures, folder, metadata=metadata)
    with replacing(out / NAME) as part:
        part.write_text(document + "\n", "utf-8")
    return out


def described(stills: Sequence[Still]) -> dict[str, Any]:
    """What the JSON says. Times begin with 0 and end with the film."""
    names = [f"frame_{i:04}.png" for i in range(len(stills))]
    ltx, wan = (indices([still.time for still in stills], *model) for model in (LTX, WAN))
    return {
        "seconds": stills[-1].time,
        "stills": [
            {
                "image": name,
                "position": round(still.position, 6),
                "time": round(still.time, 6),
                "strength": still.strength,
            }
            for name, still in zip(names, stills, strict=True)
        ],
        "ltx": {
            "fps": LTX[0],
            "length": ltx[-1] + 1,
            "guides": [
                {"image": name, "frame_idx": index, "strength": still.strength}
                for name, index, still in zip(names, ltx, stills, strict=True)
            ],
        },
        "wan": {
            "fps": WAN[0],
            "length": wan[-1] + 1,
            "control": [{"image": name, "index": index} for name, index in zip(names, wan, strict=True)],
            "clips": [
                {"start_image": names[i], "end_image": names[i + 1], "length": wan[i + 1] - wan[i] + 1}
                for i in range(len(wan) - 1)
            ],
        },
    }


def indices(times: Sequence[float], fps: int, step: int) -> list[int]:
    """The frame at each time, a multiple of `step`; each after the one before, if later than its time."""
    found = [0]
    for time in times[1:]:
        found.append(max(round(time * fps / step) * step, found[-1] + step))
    return found
