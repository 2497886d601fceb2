"""The community pipeline, loaded as diffusers loads one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from conftest import tiny_flux2_pipeline, tiny_pipeline, tiny_sd3_pipeline, tiny_xl_pipeline
from diffmorpher import Cancelled, FitConfig, Morpher, ScheduleConfig
from diffmorpher.errors import ModelError

HERE = Path(__file__).parents[2] / "integrations" / "diffusers"
#: A film in little time; everything that a call can say is said.
QUICK: dict[str, Any] = {"fit": FitConfig(rank=2, steps=2), "schedule": ScheduleConfig(rounds=1, spare=0)}


def load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    # diffusers copies the file into its cache of modules before it imports it
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(folder / "modules"))
    pipe = DiffusionPipeline.from_pretrained(folder / "model", custom_pipeline=str(HERE), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    return load(tmp_path, monkeypatch)


@pytest.fixture
def pictures(demo: dict[str, Image.Image]) -> list[Image.Image]:
    return [demo["pear"], demo["rose"]]


def same(frames: list[Image.Image], others: list[Image.Image]) -> bool:
    return [frame.tobytes() for frame in frames] == [other.tobytes() for other in others]


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_xl_pipeline, tiny_sd3_pipeline, tiny_flux2_pipeline])
def test_frames_are_those_of_the_library(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: list[Image.Image]
) -> None:
    """Each family is told from its parts, and gets back the pipeline that knows how to encode its prompts."""
    make().save_pretrained(tmp_path / "model")
    pipe = load(tmp_path, monkeypatch)
    assert type(pipe).__name__ == "DiffMorpherPipeline"
    asked = {"width": 32, "height": 32, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(7)}
    made = pipe(pictures, ["a pear", "a rose"], 3, **asked, **QUICK)
    morpher = Morpher(make())
    own = replace(morpher.spec.sample, steps=2)  # a flow's own settings, exact ends, are not the paper's
    wanted = morpher(pictures, ["a pear", "a rose"], 3, size=(32, 32), sample=own, seed=7, **QUICK)
    assert same(made.frames, wanted.frames)
    assert (made.alphas, made.distances) == (wanted.alphas, wanted.distances)
    assert (made.result.settings["seed"], made.result.settings["model"]) == (7, "model")


def test_what_the_model_s_own_pipeline_is_refused_for_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: list[Image.Image]
) -> None:
    tiny_flux2_pipeline(is_distilled=True).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="distilled"):
        load(tmp_path, monkeypatch)(pictures)


def test_the_usual_arguments(loaded: Any, pictures: list[Image.Image]) -> None:
    def made(**changes: Any) -> Any:
        return loaded(pictures, num_frames=2, num_inference_steps=1, **QUICK, **changes)

    as_pil = made().frames
    as_np, as_pt = made(output_type="np").frames, made(output_type="pt", return_dict=False)[0]
    assert as_np.shape == (2, 32, 32, 3) and as_pt.shape == (2, 3, 32, 32)
    np.testing.assert_array_equal(np.rint(as_np[1] * 255), np.asarray(as_pil[1]))
    np.testing.assert_array_equal(as_pt.permute(0, 2, 3, 1).numpy(), as_np)
    assert made(width=64, height=32).frames[0].size == (64, 32)
    assert not same(made(generator=torch.Generator().manual_seed(1)).frames, as_pil)
    with pytest.raises(ValueError, match="output_type is 'latent'"):
        made(output_type="latent")
    with pytest.raises(ValueError, match="give both"):
        made(width=64)


def test_the_callback_sees_every_step_and_may_end_the_run(loaded: Any, pictures: list[Image.Image]) -> None:
    seen: list[tuple[int, int, dict[str, Any]]] = []

    def note(pipe: Any, step: int, timestep: int, info: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, timestep, info))
        return {}

    def end(pipe: Any, step: int, timestep: int, info: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = info["stage"] == "invert"
        return note(pipe, step, timestep, info)

    loaded(pictures, num_frames=2, num_inference_steps=2, callback_on_step_end=note, **QUICK)
    assert [step for step, _, _ in seen] == list(range(len(seen)))
    assert list(dict.fromkeys(info["stage"] for _, _, info in seen)) == ["fit", "invert", "sample"]
    seen.clear()
    with pytest.raises(Cancelled):
        loaded(pictures, num_frames=2, num_inference_steps=2, callback_on_step_end=end, **QUICK)
    assert seen[-1][2]["stage"] == "invert"
    assert loaded(pictures, num_frames=2, num_inference_steps=1, **QUICK).frames, "the end of one run ended the next"
