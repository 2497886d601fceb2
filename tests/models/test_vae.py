"""An autoencoder in place of a model's own: every layout of it, on a model as a folder and as one file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models import original_vae
from test_single_file import CPU, PICTURES, original, small
from torch.testing import assert_close

from conftest import (
    tiny_flux2_pipeline,
    tiny_flux_pipeline,
    tiny_qwen_pipeline,
    tiny_sd3_pipeline,
    tiny_z_image_pipeline,
)
from diffmorpher import FitConfig, Morpher, Recipe, SampleConfig
from diffmorpher.cli.app import _load
from diffmorpher.cli.checks import inputs_of
from diffmorpher.errors import ModelError
from diffmorpher.models import loading
from diffmorpher.models.loading import load_pipeline

FIRST = "first_stage_model."


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small model as a folder and as a file, each also without its VAE, and another VAE in every layout."""
    pipe = small("sd1", monkeypatch, tmp_path, width=768)
    monkeypatch.setattr(loading, "CONFIGS", tmp_path / "configs")
    weights = original("sd1", pipe)
    pipe.save_pretrained(tmp_path / "folder")
    save_file(weights, tmp_path / "file.safetensors")
    save_file({k: v for k, v in weights.items() if not k.startswith(FIRST)}, tmp_path / "bare-file.safetensors")
    shutil.copytree(tmp_path / "folder", tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "vae")

    torch.manual_seed(1)
    pipe.vae = type(pipe.vae).from_config(pipe.vae.config).eval()
    other = {k.removeprefix(FIRST): v for k, v in original("sd1", pipe).items() if k.startswith(FIRST)}
    pipe.save_pretrained(tmp_path / "another-model")
    pipe.vae.save_pretrained(tmp_path / "diffusers")
    save_file(pipe.vae.state_dict(), tmp_path / "without-config.safetensors")
    save_file(other, tmp_path / "original.safetensors")
    save_file({f"{FIRST}{k}": v for k, v in other.items()}, tmp_path / "ORIGINAL-2.SAFETENSORS")
    torch.manual_seed(2)
    tiny = diffusers.AutoencoderTiny().eval()
    tiny.save_pretrained(tmp_path / "taesd")
    save_file(tiny.state_dict(), tmp_path / "taesd.safetensors")
    return tmp_path


LAYOUTS = {
    "another-model": "diffusers",
    "diffusers": "diffusers",
    "diffusers/diffusion_pytorch_model.safetensors": "diffusers",
    "without-config.safetensors": "diffusers",
    "original.safetensors": "diffusers",
    "ORIGINAL-2.SAFETENSORS": "diffusers",
    "taesd": "taesd",
    "taesd.safetensors": "taesd",
}


@pytest.mark.parametrize("model", ["folder", "file.safetensors", "bare", "bare-file.safetensors"])
def test_every_layout_takes_the_place_of_the_models_own(model: str, place: Path) -> None:
    for vae, wanted in LAYOUTS.items():
        pipe, _ = load_pipeline(str(place / model), CPU, torch.float32, vae=str(place / vae))
        weights = load_file(place / wanted / "diffusion_pytorch_model.safetensors")
        loaded = pipe.vae.state_dict()
        assert loaded.keys() == weights.keys(), vae
        for name, weight in weights.items():
            assert_close(loaded[name], weight, rtol=0, atol=0)
        assert not pipe.vae.training and pipe.vae_scale_factor == 8
        assert pipe.vae.config.scaling_factor == (1.0 if wanted == "taesd" else 0.18215)


def test_a_film_is_made_with_it_and_says_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    quick: dict[str, Any] = {"num_frames": 2, "fit": FitConfig(rank=2, steps=1), "sample": SampleConfig(steps=1)}
    quick |= {"size": (64, 64)}
    morpher = Morpher.from_pretrained("bare", device="cpu", vae=place / "taesd.safetensors")
    result = morpher(PICTURES, "noise", **quick)
    result.save("film.gif")
    again = Recipe.read("film.gif")
    assert again.vae == "taesd.safetensors" and " --vae taesd.safetensors" in again.command()
    assert isinstance(_load(again).pipe.vae, diffusers.AutoencoderTiny)
    assert again.changed(model="mini").vae is None
    own = Morpher.from_pretrained("folder", device="cpu")
    assert own.backbone.identity() != morpher.backbone.identity()  # of whatever is kept in the cache
    assert "vae" not in own(PICTURES, "noise", **quick).settings


def test_where_a_recipe_finds_it_and_that_it_stays(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = Recipe(("a.png", "b.png"), model=str(place / "folder"), vae=str(place / "taesd.safetensors"))
    recipe.write(place / "film.toml")
    assert 'vae = "taesd.safetensors"' in (place / "film.toml").read_text()
    read = Recipe.read(place / "film.toml")
    assert read.loading()["vae"] == str(place / "taesd.safetensors")
    assert inputs_of(recipe)["the VAE to be used"] == [place / "taesd.safetensors"]
    assert place / "taesd" / "config.json" in inputs_of(Recipe(vae=str(place / "taesd")))["the VAE to be used"]


def test_what_is_no_autoencoder_for_the_model_is_said_so(place: Path) -> None:
    def refused(vae: str, why: str, model: str = "folder") -> None:
        with pytest.raises(ModelError, match=why):
            load_pipeline(str(place / model), CPU, torch.float32, vae=str(place / vae))

    refused("nowhere", "neither a folder nor a .safetensors file")
    refused("folder/unet", "without an autoencoder's config.json")
    (place / "damaged.safetensors").write_bytes(b"x" * 99)
    refused("damaged.safetensors", "no .safetensors file")
    unet = {f"model.diffusion_model.{k}": v for k, v in load_file(next((place / "folder" / "unet").glob("*s"))).items()}
    save_file(unet, place / "unet.safetensors")
    refused("unet.safetensors", "the VAE unet.safetensors holds .*: give an autoencoder")
    weights = load_file(place / "original.safetensors")
    lost = next(iter(sorted(weights)))
    save_file({k: v for k, v in weights.items() if k != lost}, place / "lacking.safetensors")
    refused("lacking.safetensors", "the VAE .*lack")
    shapes = load_file(place / "without-config.safetensors")
    shapes["decoder.conv_in.weight"] = torch.zeros(8, 16, 3, 3)
    save_file(shapes, place / "another-shape.safetensors")
    refused("another-shape.safetensors", "has another shape of decoder.conv_in.weight: take another copy, give one")
    del shapes["decoder.conv_in.weight"]
    save_file(shapes, place / "without-one.safetensors")
    refused("without-one.safetensors", "lacks decoder.conv_in.weight")
    diffusers.AutoencoderTiny(latent_channels=16).save_pretrained(place / "wide")
    refused("wide", "makes 16 channels, but the model reads 4")
    refused("wide", "makes 16 channels, but the model reads 4", "bare-file.safetensors")
    about = json.loads((place / "taesd" / "config.json").read_text()) | {"decoder_block_out_channels": [8, 8, 8, 8]}
    (place / "taesd" / "config.json").write_text(json.dumps(about))
    refused("taesd", "could not be loaded")
    with pytest.raises(ModelError, match="or give one with --vae"):
        load_pipeline(str(place / "bare"), CPU, torch.float32)
    with pytest.raises(ModelError, match="or give one with --vae"):
        load_pipeline(str(place / "bare-file.safetensors"), CPU, torch.float32)


@pytest.mark.parametrize(
    "make", [tiny_flux_pipeline, tiny_flux2_pipeline, tiny_sd3_pipeline, tiny_z_image_pipeline, tiny_qwen_pipeline]
)
def test_flows_take_another_as_well(make: Callable[[], Any], tmp_path: Path) -> None:
    """A folder, diffusers' file alone, and where AutoencoderKL is theirs the original layout (FLUX.1's ae.safetensors)."""
    pipe = make()
    pipe.save_pretrained(tmp_path / "folder")
    shutil.copytree(tmp_path / "folder", tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "vae")
    torch.manual_seed(1)
    kind = type(pipe.vae)
    other = kind.from_config(pipe.vae.config).eval()
    other.save_pretrained(tmp_path / "vae")
    save_file(other.state_dict(), tmp_path / "alone.safetensors")
    save_file(original_vae(other) if kind is diffusers.AutoencoderKL else OLD, tmp_path / "ae.safetensors")

    def loaded(model: str, vae: str) -> Any:
        return load_pipeline(str(tmp_path / model), CPU, torch.float32, vae=str(tmp_path / vae))[0]

    for model, vae in (
        ("folder", "vae"),
        ("folder", "alone.safetensors"),
        ("bare", "vae"),
        ("folder", "ae.safetensors"),
    ):
        if vae == "ae.safetensors" and kind is not diffusers.AutoencoderKL:
            with pytest.raises(ModelError, match="ae.safetensors is in a layout that is not read for this family"):
                loaded(model, vae)
            continue
        found = loaded(model, vae).vae
        assert type(found) is kind and own(found) == own(other)
        for name, weight in other.state_dict().items():
            assert_close(found.state_dict()[name], weight, rtol=0, atol=0)
    for vae in ("alone.safetensors", "ae.safetensors"):
        with pytest.raises(ModelError, match="neither the VAE .* nor the model says how it is built"):
            loaded("bare", vae)
    morpher = Morpher.from_pretrained(tmp_path / "bare", device="cpu", vae=tmp_path / "vae")
    quick: dict[str, Any] = {"num_frames": 2, "fit": FitConfig(rank=2, steps=1), "sample": SampleConfig(steps=1)}
    assert len(morpher(PICTURES, "a house", size=(32, 32), **quick).frames) == 2


OLD = {"decoder.conv_in.weight": torch.zeros(8, 4, 3, 3)}


def own(vae: Any) -> str:
    """Its configuration without where it came from."""
    return json.dumps({key: value for key, value in vae.config.items() if not key.startswith("_")}, sort_keys=True)
