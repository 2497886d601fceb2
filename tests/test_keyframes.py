"""Stills for video models: even to the eye, and where the models take them; diffusers' own classes are the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import tiny_pipeline
from diffmorpher import FitConfig, Morpher, MorphResult, SampleConfig, read_settings
from diffmorpher.errors import ConfigError
from diffmorpher.files.keyframes import Still, described, indices

PICTURES = [Image.effect_noise((32, 32), s).convert("RGB") for s in (20, 60, 90)]


@pytest.fixture(scope="module")
def result() -> MorphResult:
    return film()


def film(**options: Any) -> MorphResult:
    fit, sample = FitConfig(rank=2, steps=1), SampleConfig(steps=2)
    return Morpher(tiny_pipeline())(PICTURES, num_frames=13, fit=fit, sample=sample, **options)


def test_stills_are_even_to_the_eye(result: MorphResult) -> None:
    stills = result.keyframes(5)
    way = np.cumsum([0, *result.distances])
    at = np.interp([still.position for still in stills], result.alphas, way)
    assert np.diff(at) == pytest.approx(way[-1] / 4, rel=0.02)
    assert (stills[0].position, stills[-1].position) == (0, 2)
    assert [still.time for still in stills] == pytest.approx(np.interp(at, way, result.times))
    assert [still.strength for still in stills] == [1 if s.position in (0, 1, 2) else 0.7 for s in stills]
    for count in (1, 65, 2.5, True):
        with pytest.raises(ConfigError, match="stills is .*, but must be a whole number from 2 to 64"):
            result.keyframes(count)  # type: ignore[arg-type]


def test_a_loop_ends_where_it_began_and_holds_count() -> None:
    result = film(loop=True)
    result.settings["hold"] = (1.0,)
    stills = result.keyframes(4)
    assert stills[-1].position == 3 and stills[-1].strength == 1
    assert stills[-1].time == pytest.approx(13 / 8 + 3)


@pytest.mark.parametrize(("seconds", "count"), [(4.0, 5), (1.0, 9), (10.0, 2)])
def test_what_the_models_ask_for(seconds: float, count: int) -> None:
    stills = [Still(k / (count - 1), seconds * k / (count - 1), 1.0) for k in range(count)]
    found = described(stills)
    for name, (fps, step) in {"ltx": (24, 8), "wan": (16, 4)}.items():
        own = found[name]
        places = [each.get("frame_idx", each.get("index")) for each in own["guides" if name == "ltx" else "control"]]
        assert own["fps"] == fps and (own["length"] - 1) % step == 0 and places[-1] == own["length"] - 1
        assert all(place % step == 0 for place in places) and sorted(set(places)) == places
        if seconds >= 4:
            assert places == pytest.approx([still.time * fps for still in stills], abs=step / 2)
    assert (
        all((clip["length"] - 1) % 4 == 0 for clip in found["wan"]["clips"]) and len(found["wan"]["clips"]) == count - 1
    )
    assert sum(clip["length"] - 1 for clip in found["wan"]["clips"]) == found["wan"]["length"] - 1
    assert indices([0, 0.1, 0.2], 24, 8) == [0, 8, 16], "stills that are too close take more time"


def test_a_folder_is_what_diffusers_takes(result: MorphResult, tmp_path: Path) -> None:
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    folder = result.save_keyframes(tmp_path / "stills", 4)
    found = json.loads((folder / "keyframes.json").read_text())
    assert sorted(file.name for file in folder.iterdir()) == [
        *(f"frame_000{i}.png" for i in range(4)),
        "keyframes.json",
    ]
    assert [each["image"] for each in found["stills"]] == [f"frame_000{i}.png" for i in range(4)]
    conditions = [
        LTXVideoCondition(Image.open(folder / each["image"]), frame_index=each["frame_idx"], strength=each["strength"])
        for each in found["ltx"]["guides"]
    ]
    assert conditions[-1].frame_index < found["ltx"]["length"] and conditions[0].image.size == (32, 32)
    first = np.asarray(Image.open(folder / "frame_0000.png")).astype(int)
    assert np.abs(first - np.asarray(result.frames[0]).astype(int)).max() <= 1
    assert read_settings(folder) is not None
    again = result.save_keyframes(folder, 3)
    assert sorted(file.name for file in again.iterdir())[:-1] == [f"frame_000{i}.png" for i in range(3)]
