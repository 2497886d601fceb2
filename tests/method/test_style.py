"""Styles: LoRAs of others that act on every frame; diffusers with the same file loaded is the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import tiny_flux_pipeline, tiny_pipeline, tiny_xl_pipeline
from diffmorpher import FitConfig, Morpher, MorphPath, Recipe, SampleConfig, ScheduleConfig, read_settings
from diffmorpher.errors import ConfigError, LoraError, PathFileError, RecipeError
from diffmorpher.files.loras import load_lora
from diffmorpher.web.keys import fit_key

PICTURES = [Image.effect_noise((32, 32), s).convert("RGB") for s in (20, 60)]
PROMPTS = ["a cat", "a dog"]
QUICK: dict[str, Any] = {
    "fit": FitConfig(rank=2, steps=2, learning_rate=0.01),
    "sample": SampleConfig(steps=2, guidance_scale=2.0),
    "schedule": ScheduleConfig(enabled=False),
    "num_frames": 3,
}
MAKERS = [tiny_pipeline, tiny_xl_pipeline, tiny_flux_pipeline]


def style_file(make: Callable[..., Any], file: Path, seed: int = 5, encoders: bool = True) -> Path:
    """As diffusers writes one: random, rank 2, with an alpha of its own in the network, and in the text encoders."""
    pipe, layers = make(), {}
    torch.manual_seed(seed)
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    names = [part, "text_encoder", *(["text_encoder_2"] if part == "unet" and hasattr(pipe, "text_encoder_2") else [])]
    for name in names if encoders else names[:1]:
        targets = ["q_proj", "out_proj"] if name.startswith("text") else ["to_q", "to_v"]
        module = getattr(pipe, name)
        module.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
        state = get_peft_model_state_dict(module)
        layers[f"{name}_lora_layers"] = {key: value * 4 for key, value in state.items()}
    type(pipe).save_lora_weights(file.parent, weight_name=file.name, **layers)
    return file


def frames(make: Callable[..., Any], styles: Any = (), **options: Any) -> np.ndarray[Any, Any]:
    result = Morpher(make())(PICTURES, PROMPTS, styles=styles, **QUICK | options)
    return np.stack([np.asarray(frame, dtype=np.float32) for frame in result.frames])


@pytest.mark.parametrize("make", MAKERS)
def test_a_style_is_what_diffusers_makes_of_the_file_and_a_pipeline_with_adapters_works(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    """The whole film, fit and guidance too: the same file as a style, and loaded into the pipeline beforehand."""
    file = style_file(make, tmp_path / "ink.safetensors")
    pipe = make()
    pipe.load_lora_weights(str(file), adapter_name="ink")
    pipe.set_adapters(["ink"], [0.5])
    loaded = frames(lambda: pipe)
    ours = frames(make, f"{file}:0.5")
    assert np.abs(ours - loaded).max() <= 1
    assert np.abs(ours - frames(make)).mean() > 2, "it does something"
    for weight in (0.25, 1):
        assert np.abs(ours - frames(make, f"{file}:{weight}")).mean() > 0.5, "so does its weight"
    without = frames(make, f"{style_file(make, tmp_path / 'bare.safetensors', encoders=False)}:0.5")
    assert np.abs(ours - without).max() > 1, "so do the text encoders"


@pytest.mark.parametrize("make", MAKERS[:2])
def test_a_style_of_kohyas(make: Callable[..., Any], tmp_path: Path) -> None:
    file = style_file(make, tmp_path / "ink.safetensors")
    kohyas = {}
    for key, value in load_file(file).items():
        layer, side = key.replace(".lora.", ".lora_").replace(".lora_linear_layer.", ".lora_").split(".lora_")
        part, _, path = layer.partition(".")
        if part != "unet" and not path.startswith("text_model."):
            path = f"text_model.{path}"
        prefix = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[part]
        prefix = "lora_te" if make is tiny_pipeline and prefix == "lora_te1" else prefix
        side = {"A": "down", "B": "up", "down": "down", "up": "up"}[side.removesuffix(".weight")]
        kohyas[f"{prefix}_{path.replace('.', '_')}.lora_{side}.weight"] = value
        kohyas[f"{prefix}_{path.replace('.', '_')}.alpha"] = torch.tensor(1.0)  # half of the rank
    save_file(kohyas, tmp_path / "kohya.safetensors")
    assert np.array_equal(frames(make, tmp_path / "kohya.safetensors"), frames(make, f"{file}:0.5"))


def test_several_styles_add_up_and_leave_the_pipeline_as_it_was(tmp_path: Path) -> None:
    one, other = (style_file(tiny_pipeline, tmp_path / f"{k}.safetensors", seed=k) for k in (5, 6))
    pipe = tiny_pipeline()
    pipe.load_lora_weights(str(one), adapter_name="one")
    pipe.load_lora_weights(str(other), adapter_name="other")
    pipe.set_adapters(["one", "other"], [1.0, -0.5])
    assert np.abs(frames(tiny_pipeline, [one, f"{other}:-0.5"]) - frames(lambda: pipe)).max() <= 1
    pipe = tiny_pipeline()
    plain = frames(lambda: pipe)
    frames(lambda: pipe, [one])
    assert np.array_equal(frames(lambda: pipe), plain)
    assert np.array_equal(frames(tiny_pipeline, f"{one}:0"), plain)
    assert np.array_equal(frames(tiny_pipeline, load_lora(one, text=True)), frames(tiny_pipeline, one))


def test_a_fit_by_itself_is_that_of_the_film(tmp_path: Path) -> None:
    file = style_file(tiny_pipeline, tmp_path / "ink.safetensors")
    morpher = Morpher(tiny_pipeline())
    path = morpher.prepare(PICTURES, PROMPTS, fit=QUICK["fit"], steps=1, styles=file)
    assert path.bank is not None
    alone = morpher.fit(PICTURES[0], PROMPTS[0], fit=QUICK["fit"], styles=file)
    other = morpher.fit(PICTURES[0], PROMPTS[0], fit=QUICK["fit"])
    for name, up in path.bank.lora(0).up.items():
        torch.testing.assert_close(alone.up[name], up, rtol=0, atol=1e-3)
    assert any(not torch.allclose(other.up[name], alone.up[name], rtol=0, atol=1e-3) for name in alone.up)


def test_a_path_keeps_its_styles_and_one_with_adapters_knows_its_model(tmp_path: Path) -> None:
    file = style_file(tiny_pipeline, tmp_path / "ink.safetensors")
    morpher = Morpher(tiny_pipeline())
    path = morpher.prepare(PICTURES, PROMPTS, fit=QUICK["fit"], steps=2, styles=f"{file}:0.5")
    again = MorphPath.load(path.save(tmp_path / "a.morph"), Morpher(tiny_pipeline()))
    assert torch.equal(again.sample([0.3], QUICK["sample"], "latent"), path.sample([0.3], QUICK["sample"], "latent"))
    pipe = tiny_pipeline()
    pipe.load_lora_weights(str(file))
    made_with = Morpher(pipe).prepare(PICTURES, PROMPTS, fit=None, steps=1).save(tmp_path / "b.morph")
    MorphPath.load(made_with, Morpher(pipe))
    with pytest.raises(PathFileError, match="made with another model"):
        MorphPath.load(made_with, morpher)


def test_one_lora_serves_all_pictures_at_its_weight(tmp_path: Path) -> None:
    file = style_file(tiny_pipeline, tmp_path / "ink.safetensors", encoders=False)
    one = frames(tiny_pipeline, loras=[f"{file}:0.5"])
    assert np.array_equal(one, frames(tiny_pipeline, loras=[f"{file}:0.5"] * 2))
    assert np.abs(one - frames(tiny_pipeline, file, fit=None)).mean() > 0.5
    assert np.abs(one - frames(tiny_pipeline, f"{file}:0.5", fit=None)).max() <= 1, "a style without a fit is the same"
    with pytest.raises(ConfigError, match="2 LoRA files were given for 3 images; give one for all, or one for each"):
        Morpher(tiny_pipeline()).prepare([*PICTURES, PICTURES[0]], loras=[file, file])


def test_in_a_recipe_a_film_and_its_command(tmp_path: Path) -> None:
    file = style_file(tiny_pipeline, tmp_path / "ink.safetensors")
    for k, picture in enumerate(PICTURES):
        picture.save(tmp_path / f"{k}.png")
    pictures = tuple(str(tmp_path / f"{k}.png") for k in range(2))
    options = {"fit": QUICK["fit"], "sample": QUICK["sample"], "schedule": QUICK["schedule"], "frames": 3}
    recipe = Recipe(pictures, styles=(f"{file}:0.5",), **options)  # type: ignore[arg-type]
    result = Morpher(tiny_pipeline()).make(recipe)
    film = result.save(tmp_path / "a.mkv")
    settings: Any = read_settings(film)
    assert settings["styles"] == ["ink.safetensors:0.5"] and len(settings["style_hashes"]) == 1
    again = Morpher(tiny_pipeline()).make(Recipe.read(film))
    assert [frame.tobytes() for frame in again.frames] == [frame.tobytes() for frame in result.frames]
    assert "--style ink.safetensors:0.5" in Recipe.read(film).command()
    assert Recipe.read(film).changed(style=["b.safetensors"]).style_hashes == ()
    style_file(tiny_pipeline, file, seed=7)
    with pytest.raises(RecipeError, match=r"styles: .*ink.safetensors' is another file than .*a.mkv was made with"):
        Morpher(tiny_pipeline()).make(Recipe.read(film))


def test_a_prepared_path_is_known_by_its_loras_and_their_weights(tmp_path: Path) -> None:
    file = style_file(tiny_pipeline, tmp_path / "ink.safetensors")
    recipes = [Recipe(loras=(f"{file}{weight}",)) for weight in ("", ":0.5", ":0.7")]
    recipes += [Recipe(styles=(f"{file}:0.5",)), Recipe(styles=(f"{file}:0.5",), style_hashes=("a",)), Recipe()]
    assert len({fit_key(recipe) for recipe in recipes}) == len(recipes)
    assert fit_key(Recipe(loras=(f"{file}:0.5",))) == fit_key(recipes[1])


def test_what_cannot_be_a_style_is_said(tmp_path: Path) -> None:
    xl = style_file(tiny_xl_pipeline, tmp_path / "xl.safetensors")
    for styles, kind, said in (
        (xl, LoraError, "is a LoRA for Stable Diffusion XL, the model is Stable Diffusion 1.x or 2.x"),
        ("none.safetensors:0.5", LoraError, "none.safetensors does not exist"),
        ("ink.safetensors:500", ConfigError, "is 500, but must be a number from -100 to 100"),
        (3, ConfigError, "a style is 3, but must be a file or a Lora"),
    ):
        with pytest.raises(kind, match=said):
            Morpher(tiny_pipeline()).prepare(PICTURES, fit=None, steps=1, styles=styles)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is 101, but must be"):
        Recipe(styles=("a.safetensors:101",))
