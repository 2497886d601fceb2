"""Paths: sampling through every door, files, and what is said of bad ones."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from conftest import tiny_pipeline
from diffmorpher import Cancelled, FitConfig, Morpher, MorphPath, SampleConfig, ScheduleConfig, load_lora, save_lora
from diffmorpher.errors import ConfigError, DiffMorpherError, LoraError, ModelError, OutputError, PathFileError
from diffmorpher.models.conditioning import Conditioning

PICTURES = [Image.effect_noise((32, 32), s).convert("RGB") for s in (20, 60, 90)]
FIT, SAMPLE = FitConfig(rank=2, steps=2), SampleConfig(steps=3)


@pytest.fixture(scope="module")
def morpher() -> Morpher:
    return Morpher(tiny_pipeline(), name="tiny")


@pytest.fixture(scope="module")
def path(morpher: Morpher) -> MorphPath:
    return morpher.prepare(PICTURES, ["a", "b", "c"], fit=FIT, steps=3, seed=4)


def test_every_output_is_the_same_picture(path: MorphPath) -> None:
    positions = [0.5, 1.0, 1.75]
    pil, array, tensor, latent = (path.sample(positions, SAMPLE, output=o) for o in ("pil", "np", "pt", "latent"))
    assert latent.shape == (3, 4, 8, 8) and path.noises.shape == (3, 4, 8, 8)
    assert tensor.shape == (3, 3, 32, 32) and 0 <= tensor.min() and tensor.max() <= 1
    assert array.shape == (3, 32, 32, 3) and array.dtype == np.float32
    assert_close(torch.from_numpy(array).permute(0, 3, 1, 2), tensor)
    with torch.no_grad():
        assert_close(path.backbone.decode(latent) / 2 + 0.5, tensor)
    for image, pixels in zip(pil, array, strict=True):  # rounded, not cut
        assert np.abs(np.asarray(image) / 255 - pixels).max() <= 0.5 / 255 + 1e-6
    with pytest.raises(ConfigError, match="'jpeg'"):
        path.sample(positions, SAMPLE, output="jpeg")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="from 0 to 2"):
        path.sample([2.5], SAMPLE)
    with pytest.raises(ConfigError, match="from 0 to 2, the last"):
        path.sample([0.5], SampleConfig(steps=3, fix_lora=2.5))
    assert path.sample([], SAMPLE) == [] and path.sample([], SAMPLE, output="latent").shape == (0, 4, 8, 8)
    assert path.sample([], SAMPLE, output="np").shape == (0, 32, 32, 3)


@pytest.mark.parametrize(
    ("factor", "cells", "frames"), [(8, 64, 16), (8, 128, 4), (16, 32, 16), (16, 64, 4), (8, 256, 4)]
)
def test_a_batch_on_a_gpu_goes_by_pixels(morpher: Morpher, factor: int, cells: int, frames: int) -> None:
    """FLUX.2 has one latent for 16 x 16 pixels, where others have one for 8 x 8; the device here holds shapes alone."""
    backbone = copy.copy(morpher.backbone)
    backbone.vae_factor = factor
    latents = torch.empty(2, 4, cells, cells, device="meta")
    assert MorphPath(backbone, latents, Conditioning({}), None, ["", ""]).batch_size(SampleConfig()) == frames


def test_other_steps_invert_anew_and_are_kept(path: MorphPath) -> None:
    noises, before = path.noises_at(3), path.backbone.unet_rows
    five = path.noises_at(5)
    assert path.backbone.unet_rows - before == 3 * 5
    assert torch.equal(path.noises_at(5), five) and torch.equal(path.noises_at(3), noises)
    assert torch.equal(path.noises, noises) and path.backbone.unet_rows - before == 3 * 5
    assert (five - noises).abs().max() > 1e-3


def test_a_saved_path_samples_the_same_frames(path: MorphPath, morpher: Morpher, tmp_path: Path) -> None:
    file = path.save(tmp_path / "deep" / "abc.morph")
    loaded = MorphPath.load(file, morpher)
    for config in (SAMPLE, SampleConfig(steps=4, lora_blend="product")):
        assert torch.equal(
            loaded.sample([0.3, 1.5], config, output="latent"), path.sample([0.3, 1.5], config, output="latent")
        )
    assert loaded.prompts == ["a", "b", "c"] and loaded.settings == path.settings
    assert loaded.bank is not None and path.bank is not None and loaded.bank.start == path.bank.start is not None
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["abc.morph"]
    frames = morpher.film(loaded, 5, SAMPLE).frames
    assert len(frames) == 5


def test_a_path_of_format_2_samples_the_same_frames(path: MorphPath, morpher: Morpher, tmp_path: Path) -> None:
    """Format 2 had the text alone, as one tensor called "conditioning"."""
    file = path.save(tmp_path / "new.morph")
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["diffmorpher.path"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    tensors["conditioning"] = tensors.pop("conditioning.text")
    assert header["version"] == "3" and not any(name.startswith("conditioning.") for name in tensors)
    old = tmp_path / "old.morph"
    save_file(tensors, old, {"format": "pt", "diffmorpher.path": json.dumps(header | {"version": "2"})})
    positions = [0.3, 1.5]
    got = MorphPath.load(old, morpher).sample(positions, SAMPLE, output="latent")
    assert torch.equal(got, MorphPath.load(file, morpher).sample(positions, SAMPLE, output="latent"))


def test_a_path_without_loras_and_a_loop_round_trip(morpher: Morpher, tmp_path: Path) -> None:
    path = morpher.prepare(PICTURES[:2], fit=None, steps=2, loop=True)
    loaded = MorphPath.load(path.save(tmp_path / "p.morph"), morpher)
    assert loaded.bank is None and loaded.loop
    config = SampleConfig(steps=2)
    assert torch.equal(loaded.sample([1.5], config, output="latent"), path.sample([1.5], config, output="latent"))


def test_a_path_of_another_model_or_a_damaged_file_is_refused(
    path: MorphPath, morpher: Morpher, tmp_path: Path
) -> None:
    file = path.save(tmp_path / "good.morph")
    with pytest.raises(PathFileError, match="made with another model, called 'tiny' then"):
        MorphPath.load(file, Morpher(tiny_pipeline(seed=1), name="other"))
    data = file.read_bytes()
    bad = tmp_path / "bad.morph"
    for content in (b"", b"no", data[:1000], data[: len(data) // 2], b"\xff" * 100):
        bad.write_bytes(content)
        with pytest.raises(PathFileError, match=r"bad\.morph is not a morph path, or is damaged"):
            MorphPath.load(bad, morpher)
    with pytest.raises(PathFileError, match="does not exist"):
        MorphPath.load(tmp_path / "none.morph", morpher)
    with pytest.raises(PathFileError):
        MorphPath.load(tmp_path, morpher)
    save_file({"x": torch.zeros(1)}, bad)
    with pytest.raises(PathFileError, match="not a morph path"):
        MorphPath.load(bad, morpher)
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["diffmorpher.path"])
    save_file({"x": torch.zeros(1)}, bad, {"diffmorpher.path": json.dumps(header | {"version": "99"})})
    with pytest.raises(PathFileError, match="format 99"):
        MorphPath.load(bad, morpher)
    for damaged in (header, {}, [1], header | {"loras": 3}, {k: v for k, v in header.items() if k != "signature"}):
        save_file({"x": torch.zeros(1)}, bad, {"diffmorpher.path": json.dumps(damaged)})
        with pytest.raises(PathFileError, match="damaged"):
            MorphPath.load(bad, morpher)


#: In place of a value of the header: what it can be read as, and must not be.
_VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    3,
    1.5,
    10**400,
    "",
    "a",
    [],
    ["a"],
    [None, None],
    [[]],
    {},
    {"a": 1},
    [{}, {"a": 1}],
]
_TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "scalar": lambda x: torch.tensor(1.0),
    "integers": lambda x: x.long(),
    "half": lambda x: x.half(),
    "double": lambda x: x.double(),
    "truth": lambda x: x > 0,
    "flat": lambda x: x.flatten(),
    "another rank": lambda x: x[None],
    "one image less": lambda x: x[1:],
    "one of the next less": lambda x: x[:, 1:],
    "wider": lambda x: torch.cat([x, x], -1),
    "narrower": lambda x: x[..., :-1],
    "empty": lambda x: x[:0],
    "NaN": lambda x: x * float("nan"),
    "infinite": lambda x: x / 0,
}


def _changed(value: Any) -> Iterator[Any]:
    """The same with one thing changed, at any depth."""
    yield from (other for other in _VALUES if json.dumps(other) != json.dumps(value))
    for key in value if isinstance(value, dict) else range(min(3, len(value))) if isinstance(value, list) else ():
        changed = copy.copy(value)
        del changed[key]
        yield changed
        for inner in _changed(value[key]):
            changed = copy.copy(value)
            changed[key] = inner
            yield changed


def test_a_path_with_one_thing_changed_is_refused_on_loading_or_works(
    path: MorphPath, morpher: Morpher, tmp_path: Path
) -> None:
    file, bad = path.save(tmp_path / "good.morph"), tmp_path / "bad.morph"
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["diffmorpher.path"])
    tensors = load_file(file)
    counts = {"refused": 0, "loaded": 0}

    def tried(changed: Any, contents: dict[str, torch.Tensor]) -> None:
        save_file(contents, bad, {"diffmorpher.path": json.dumps(changed)})
        try:
            loaded = MorphPath.load(bad, morpher)
        except PathFileError as error:
            assert "bad.morph" in str(error)
            counts["refused"] += 1
            return
        loaded.sample([0.3, 1.5], replace(loaded.sample_config, steps=3), output="latent")
        morpher.film(loaded, 5, replace(loaded.sample_config, steps=1), ScheduleConfig(enabled=False))
        counts["loaded"] += 1

    for key in ("version", "model", "signature", "prompts", "loop", "loras", "sample", "settings"):
        changes = list(_changed(header[key])) if key != "settings" else _VALUES
        for value in changes[:: max(1, len(changes) // 40)]:
            tried(header | {key: value}, tensors)
        tried({k: v for k, v in header.items() if k != key}, tensors)
    layer = next(name for name in tensors if name.startswith("lora.down."))
    for name in ("latents", "conditioning.text", "trajectory.3", layer, layer.replace("lora.down.", "lora.up.")):
        for change in _TENSORS.values():
            tried(header, tensors | {name: change(tensors[name]).contiguous()})
        rest = {other: x for other, x in tensors.items() if other != name}
        tried(header, rest)
        for other in (
            "trajectory.0",
            "trajectory.2",
            "trajectory.1001",
            "trajectory.x",
            "lora.down.x",
            "conditioning.x",
            "x",
        ):
            tried(header, rest | {other: tensors[name]})
    assert counts["refused"] > 250 and 0 < counts["loaded"] < 80, counts


def test_a_path_with_nan_or_of_other_steps_gives_no_picture(morpher: Morpher) -> None:
    def fresh() -> MorphPath:
        return morpher.prepare(PICTURES[:2], fit=None, steps=3)

    path = fresh()
    path._trajectories[3][-1, 0, 0, 0, 0] = float("nan")
    for output in ("pil", "latent"):
        with pytest.raises(DiffMorpherError, match="NaN"):
            path.sample([0.5], SAMPLE, output=output)  # type: ignore[arg-type]
    path = fresh()
    path.conditioning["text"][0] = float("inf")
    with pytest.raises(DiffMorpherError, match="NaN"):
        path.sample([0.5], SAMPLE)
    path = fresh()
    path._trajectories[3] = path._trajectories[3][:-1]  # a level short: another noise, and a wrong picture
    with pytest.raises(DiffMorpherError, match="does not fit 3 steps"):
        path.sample([0.5], SAMPLE)


class _Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.marker,)


def test_a_pickle_in_place_of_a_path_does_not_run(morpher: Morpher, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "evil.morph").write_bytes(pickle.dumps(_Runs(marker)))
    with pytest.raises(PathFileError):
        MorphPath.load(tmp_path / "evil.morph", morpher)
    assert not marker.exists()
    pickle.loads((tmp_path / "evil.morph").read_bytes())
    assert marker.exists()  # it would have


def test_an_unwritable_place_is_said_and_leaves_nothing(path: MorphPath, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        path.save(tmp_path / "file" / "p.morph")
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_fitted_loras_saved_and_given_again_are_the_same_path(
    path: MorphPath, morpher: Morpher, tmp_path: Path
) -> None:
    assert path.bank is not None
    files = [save_lora(path.bank.lora(k), tmp_path / f"{k}.safetensors") for k in range(3)]
    again = morpher.prepare(PICTURES, ["a", "b", "c"], loras=files, steps=3, seed=99)
    assert again.bank is not None and again.bank.start == path.bank.start  # so "auto" takes factors again
    assert torch.equal(again.noises, path.noises)
    assert torch.equal(again.sample([0.4], SAMPLE, output="latent"), path.sample([0.4], SAMPLE, output="latent"))
    metadata = load_lora(files[1]).metadata
    assert metadata["prompt"] == "b" and metadata["model"] == "tiny" and metadata["rank"] == "2"
    assert len(metadata["image_hash"]) == 64

    alone = morpher.fit(PICTURES[1], "b", FIT, seed=4)
    want = path.bank.lora(1)
    assert alone.metadata == want.metadata
    name = next(iter(want.up))
    assert (alone.up[name] - want.up[name]).norm() < 5e-3 * want.up[name].norm()

    with pytest.raises(ConfigError, match="2 LoRA files were given for 3 images"):
        morpher.prepare(PICTURES, loras=files[:2])
    with pytest.warns(UserWarning, match="1.safetensors was fitted to another picture"):
        morpher.prepare(PICTURES, ["a", "b", "c"], loras=[files[1], files[0], files[2]], steps=1)
    for steps in (0, -5, 2.5):
        with pytest.raises(ConfigError, match="steps is"):
            morpher.prepare(PICTURES, fit=None, steps=steps)  # type: ignore[arg-type]
    with pytest.raises(LoraError, match="1.safetensors: the LoRA is for another model"):
        Morpher(tiny_pipeline(block_out_channels=(16, 32))).prepare(PICTURES, loras=[files[1]] * 3)


def test_same_seed_same_film_other_seed_another(morpher: Morpher) -> None:
    def film(seed: int) -> list[bytes]:
        result = morpher(
            PICTURES[:2],
            "x",
            num_frames=4,
            fit=FitConfig(rank=2, steps=3, learning_rate=1e-2),
            sample=SAMPLE,
            seed=seed,
        )
        return [f.tobytes() for f in result.frames]

    assert film(1) == film(1) != film(2)


def test_bad_counts_are_said_before_the_slow_part(morpher: Morpher) -> None:
    before = morpher.backbone.unet_rows
    for arguments, message in (
        ({"images": PICTURES[:1]}, "at least two images"),
        ({"images": "a/path/longer/than/the/frames/cat.png"}, "at least two images"),
        ({"images": Path("cat.png")}, "at least two images"),
        ({"images": PICTURES[0]}, "at least two images"),
        ({"images": iter(PICTURES)}, "at least two images"),
        ({"images": PICTURES, "num_frames": 16.0}, "16.0"),
        ({"images": PICTURES, "size": 32}, "size is 32"),
        ({"images": PICTURES, "size": (32, 32, 3)}, "two whole numbers"),
        ({"images": PICTURES, "fit": "none"}, "'none'"),
        ({"images": PICTURES, "loras": ["a.safetensors"] * 2}, "2 LoRA files"),
        ({"images": PICTURES, "num_frames": 2}, "at least 3"),
        ({"images": PICTURES[:2], "num_frames": 1}, "frames is 1, .* from 2"),
        ({"images": PICTURES[:2], "num_frames": 0}, "frames is 0, .* from 2"),
        ({"images": PICTURES, "prompts": ["a", "b"]}, "2 prompts were given for 3 images"),
    ):
        with pytest.raises(ConfigError, match=message):
            morpher(**arguments)  # type: ignore[arg-type]
    assert morpher.backbone.unet_rows == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": "x"}, "seed is 'x'"),
        ({"seed": None}, "seed is None"),
        ({"seed": 2**70}, "seed is 1180591620717411303424"),
        ({"seed": True}, "seed is True"),
        ({"seed": 1.0}, "seed is 1.0"),
        ({"prompts": 5}, "the prompts are 5"),
        ({"prompts": [1, 2]}, r"the prompts are \[1, 2\]"),
        ({"prompts": b"ab"}, "the prompts are b'ab'"),
        ({"prompts": ["a", "\udcff"]}, "is not UTF-8"),
        ({"loras": [None, None]}, "a LoRA is None"),
        ({"loras": 5}, "a LoRA is 5"),
        ({"loras": [5, "a"]}, "a LoRA is 5"),
        ({"sample": {"steps": 3}}, "must be a SampleConfig"),
        ({"sample": FIT}, "must be a SampleConfig"),
        ({"schedule": {}}, "must be a ScheduleConfig"),
        ({"fit": {"steps": 3}}, "must be a FitConfig"),
        ({"progress": 1}, "progress is 1, but must be a function"),
        ({"write": "a.mp4"}, "write is 'a.mp4', but must be a function"),
        ({"loop": "yes"}, "loop is 'yes'"),
        ({"images": 5}, "at least two images"),
        ({"images": None}, "at least two images"),
        ({"num_frames": "4"}, "frames is '4'"),
        ({"num_frames": 10**400}, "frames is 1000"),
        ({"num_frames": 10**5000}, "frames is a number of thousands of digits"),
        ({"size": (10**400, 64)}, "too large: a side can have 4096"),
        ({"size": (10**5000, 64)}, "too large: a side can have 4096"),
        ({"size": (-(10**5000), 64)}, "too small"),
        ({"size": (64.5, 64)}, "must be two whole numbers"),
    ],
)
def test_other_types_are_named_before_the_slow_part(arguments: dict[str, Any], message: str, morpher: Morpher) -> None:
    before = morpher.backbone.unet_rows
    with pytest.raises(ConfigError, match=message):
        morpher(**{"images": PICTURES[:2], "fit": None, "sample": SAMPLE} | arguments)
    assert morpher.backbone.unet_rows == before


def test_other_types_in_other_calls(morpher: Morpher, path: MorphPath, tmp_path: Path) -> None:
    calls: list[tuple[Callable[[], Any], str]] = [
        *(
            (lambda bad=bad: path.sample(bad), "positions are")
            for bad in (["a"], [None], None, [[0.1], [0.1, 0.2]], [1j])
        ),
        (lambda: path.sample([0.5], {"steps": 3}), "must be a SampleConfig"),
        (lambda: path.noises_at("3"), "steps is '3'"),
        (lambda: morpher.film("a.morph", 3), "must be a MorphPath"),
        (lambda: morpher.film(path, 4, {"steps": 3}), "must be a SampleConfig"),
        (lambda: morpher.film(path, 4, pace=[1, 2]), "2 shares for 3 gaps"),
        (lambda: morpher.film(path, 4, pace=[1, -1, 2]), "must be a list of numbers of at least 0"),
        (lambda: morpher.fit(PICTURES[0], 5), "the prompts are 5"),
        (lambda: morpher.fit(PICTURES[0], focus=(0.5, 0.2)), "the focus is"),
        (lambda: morpher.prepare(PICTURES, focus=["0.5,0.2"] * 7), "7 focuses were given"),
        (lambda: morpher.fit(PICTURES[0], seed="x"), "seed is 'x'"),
        (lambda: morpher.fit_all("cat.png"), "a list of images"),
        (lambda: morpher.prepare(PICTURES, seed=-1), "seed is -1"),
        (lambda: MorphPath.load(tmp_path / "a.morph", "mini"), "must be a Morpher"),
        (lambda: Morpher.from_pretrained("mini", device="cpu", vae=3), "vae is 3"),
        (lambda: Morpher.from_pretrained("mini", device="cpu", vae=""), "vae is ''"),
        (lambda: Morpher.from_pretrained("mini", device="cpu", cache="x"), "cache is 'x'"),
        (lambda: SampleConfig(guidance_scale=1e308), "guidance is 1e"),
        (lambda: ScheduleConfig(stretch=(1e308,)), "stretch is 1e.*above 0 and at most 86400"),
        (lambda: FitConfig(steps=10**14), "LoRA steps is 1"),
    ]
    for call, message in calls:
        with pytest.raises(ConfigError, match=message):
            call()
    with pytest.raises(ModelError, match="'meta' is not usable here"):
        Morpher.from_pretrained("mini", device="meta")
    for out in (None, 5, b"a.mp4"):
        with pytest.raises(OutputError, match="must be a path"):
            morpher.film(path, 3, SAMPLE).save(out)  # type: ignore[arg-type]
    with pytest.raises(LoraError, match="must be a path"):
        load_lora(5)  # type: ignore[arg-type]
    (tmp_path / "cat.png").write_bytes(b"a picture")
    for bad, said in ((None, "must be a path"), ("\0", "must be a path"), (tmp_path / "cat.png", "call it .morph")):
        with pytest.raises(OutputError, match=said):
            path.save(bad)  # type: ignore[arg-type]
    assert (tmp_path / "cat.png").read_bytes() == b"a picture"
    lora = morpher.fit(PICTURES[0], "a", FitConfig(rank=2, steps=1))
    for bad in (None, "\0"):
        with pytest.raises(OutputError, match="must be a path"):
            save_lora(lora, bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="must be a Lora"):
        save_lora(None, tmp_path / "o.safetensors")  # type: ignore[arg-type]


def test_files_have_the_rights_that_the_umask_leaves(path: MorphPath, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path.save(tmp_path / "a.morph")
    finally:
        os.umask(before)
    assert (tmp_path / "a.morph").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("prompts", [None, [], (), "", [None, None], [""]])
def test_prompts_may_be_left_out_in_any_form(prompts: Any, morpher: Morpher) -> None:
    path = morpher.prepare(PICTURES[:2], prompts, fit=None, steps=1)
    assert path.prompts == ["", ""]


def test_a_write_that_iterates_twice_or_stops_has_right_figures_or_a_sentence(morpher: Morpher) -> None:
    path = morpher.prepare(PICTURES[:2], fit=None, steps=3)
    once = morpher.film(path, 5, SAMPLE)
    for _ in range(2):
        twice = morpher.film(path, 5, SAMPLE, write=lambda frames, settings: [*frames, *frames])
        assert twice.distances == once.distances and twice.ppl == once.ppl and twice.pdv == once.pdv
    for write in (lambda frames, settings: None, lambda frames, settings: next(iter(frames))):
        result = morpher.film(path, 5, SAMPLE, write=write)
        for figure in ("ppl", "pdv"):
            with pytest.raises(ConfigError, match="of 4 distances, as write did not take all frames"):
                getattr(result, figure)


def test_whole_numbers_of_numpy_are_seeds(morpher: Morpher) -> None:
    one, other = (morpher.fit(PICTURES[0], fit=FIT, seed=seed) for seed in (3, np.int64(3)))
    assert one.metadata == other.metadata and all(torch.equal(one.up[n], other.up[n]) for n in one.up)


def test_result_says_all_about_itself(morpher: Morpher) -> None:
    reported: list[tuple[str, int, int]] = []
    result = morpher(
        PICTURES[:2], ["a", "b"], num_frames=5, fit=FIT, sample=SAMPLE, progress=lambda *event: reported.append(event)
    )
    # Fit, inversion, and each frame once; the two ends again in the second round of insertion.
    assert result.unet_rows == 2 * 2 * 3 + 2 * 3 + (5 + 2) * 3
    assert len(result.frames) == len(result.alphas) == 5 and len(result.distances) == 4
    assert result.alphas[0] == 0 and result.alphas[-1] == 1
    assert result.ppl == pytest.approx(sum(result.distances)) and result.pdv == pytest.approx(np.var(result.distances))
    assert set(result.seconds) == {"load", "fit", "invert", "schedule", "sample"}
    assert all(result.seconds[s] > 0 for s in ("fit", "invert", "schedule", "sample"))
    stages = list(dict.fromkeys(stage for stage, _, _ in reported))
    assert stages == ["fit", "invert", "sample"]
    for stage in stages:
        counts = [(done, total) for s, done, total in reported if s == stage]
        assert len({total for _, total in counts}) == 1 and counts[-1][0] == counts[-1][1], stage
        assert all(a < b for (a, _), (b, _) in pairwise(counts)), stage
    assert result.settings["fit"]["rank"] == 2 and result.settings["sample"]["steps"] == 3


def test_a_loop_has_as_many_gaps_as_frames(morpher: Morpher) -> None:
    result = morpher(PICTURES, num_frames=6, fit=None, sample=SAMPLE, loop=True)
    assert len(result.frames) == len(result.distances) == 6
    assert result.alphas[0] == 0 and {1.0, 2.0} <= set(result.alphas) and max(result.alphas) < 3


def test_equal_images_make_a_still_film(morpher: Morpher) -> None:
    result = morpher([PICTURES[0], PICTURES[0]], num_frames=4, fit=FIT, sample=SAMPLE)
    assert result.ppl == pytest.approx(0, abs=1e-3)
    assert all(np.isfinite(result.alphas))


def test_stopping_stops_at_once(morpher: Morpher) -> None:
    seen: list[str] = []

    def stop(stage: str, done: int, total: int) -> None:
        seen.append(stage)
        if len(seen) == 3:
            raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        morpher(PICTURES, num_frames=4, fit=FitConfig(rank=2, steps=50), sample=SAMPLE, progress=stop)
    assert len(seen) == 3
