"""Framing: shapes that suit the model, where pictures are cut, and what is said of it beforehand."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from conftest import tiny_pipeline
from diffmorpher import FitConfig, Morpher, Recipe, read_settings
from diffmorpher.cli import app
from diffmorpher.errors import ConfigError
from diffmorpher.files.focus import what_matters
from diffmorpher.gather import gather
from diffmorpher.models.catalog import CATALOG, ModelSpec

FEW = ("--steps", "1", "--no-lora", "--frames", "2")


@pytest.fixture(scope="module")
def morpher() -> Morpher:
    return Morpher(tiny_pipeline())


@pytest.mark.parametrize(
    ("own", "shape", "size"),
    [
        ((512, 512), "square", (512, 512)),
        ((512, 512), "16:9", (680, 384)),
        ((512, 512), "9:16", (384, 680)),
        ((1024, 1024), "16:9", (1368, 768)),
        ((1024, 1024), "4:5", (916, 1144)),
        ((768, 768), "square", (768, 768)),
    ],
)
def test_a_shape_is_the_nearest_size_that_suits_the_model(own: Any, shape: str, size: Any) -> None:
    morpher = Morpher(tiny_pipeline(), spec=ModelSpec("", "", size=own))
    factor = morpher.backbone.size_multiple
    found = morpher.working_size(shape)
    assert morpher.working_size(found) == found, "it is one that can be used"
    assert abs(found[0] - size[0]) <= 2 * factor and abs(found[1] - size[1]) <= 2 * factor
    assert found[0] * found[1] == pytest.approx(own[0] * own[1], rel=0.02)
    width, height = map(int, shape.replace("square", "1:1").split(":"))
    assert found[0] / found[1] == pytest.approx(width / height, rel=0.006)


def test_a_shape_that_is_none(morpher: Morpher) -> None:
    with pytest.raises(ConfigError, match=r"the size is 'wide', but must be \(width, height\), or one of square, 16:9"):
        morpher.working_size("wide")


def test_a_size_far_from_the_models_own_is_said_beforehand(morpher: Morpher) -> None:
    pictures = [Image.effect_noise((64, 64), s).convert("RGB") for s in (20, 60)]
    for size in ((64, 64), (32, 96), (16, 16)):
        with pytest.warns(UserWarning, match=f"{size[0]}x{size[1]} is far from the 32x32 that the model was made for"):
            morpher.prepare(pictures, fit=None, steps=1, size=size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        morpher.prepare(pictures, fit=None, steps=1, size=(48, 32))


def test_a_photograph_for_the_bundled_model_is_said_beforehand(demo: dict[str, Image.Image]) -> None:
    photograph = Image.effect_noise((64, 64), 60).convert("RGB")
    knows_emoji = Morpher(tiny_pipeline(), spec=replace(CATALOG["mini"], size=(32, 32)))
    with pytest.warns(
        UserWarning, match="^image 1: not on white, as a photograph is, but the bundled model knows 3D emoji"
    ):
        knows_emoji.prepare([demo["pear"], photograph], fit=None, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        knows_emoji.prepare([demo["pear"], demo["rose"]], fit=None, steps=1)
        Morpher(tiny_pipeline()).prepare([demo["pear"], photograph], fit=None, steps=1)


def test_every_picture_is_cut_at_its_own_focus_in_the_film_and_in_the_fit(morpher: Morpher) -> None:
    rng = np.random.default_rng(0)
    wide = [Image.fromarray(rng.integers(0, 256, (32, 96, 3), dtype=np.uint8)) for _ in range(2)]

    def latents(**options: Any) -> Any:
        return morpher.prepare(wide, fit=None, steps=1, **options).latents

    left, right = ([picture.crop((x, 0, x + 32, 32)) for picture in wide] for x in (0, 64))
    cut = [left[0], right[1]]
    expected = morpher.prepare(cut, fit=None, steps=1).latents
    assert latents(focus=("0,0.5", "1,0.5")).allclose(expected)
    assert not latents(focus="0,0.5").allclose(expected) and latents(focus=("center",)).allclose(latents())
    fit = FitConfig(rank=2, steps=1)
    by_focus, by_hand = morpher.fit(wide[0], fit=fit, focus="0,0.5"), morpher.fit(left[0], fit=fit)
    assert by_focus.metadata["image_hash"] == by_hand.metadata["image_hash"]
    with pytest.raises(ConfigError, match="3 focuses were given for 2 images"):
        latents(focus=("center",) * 3)


def test_auto_finds_a_thing_on_its_background(demo: dict[str, Image.Image]) -> None:
    """Each demo picture's thing on three backgrounds, to the right; a square crop must have it whole."""
    rng = np.random.default_rng(0)
    ramp = np.broadcast_to(np.linspace(0, 200, 480)[None, :, None], (200, 480, 3))
    for background in (np.full((200, 480, 3), 255), rng.integers(60, 140, (200, 480, 3)), ramp):
        for name, picture in demo.items():
            thing = picture.resize((120, 120))
            canvas = Image.fromarray(background.astype(np.uint8))
            canvas.paste(thing, (330, 40), Image.fromarray(((np.asarray(thing).min(2) < 250) * 255).astype(np.uint8)))
            left = min(max(what_matters(canvas)[0] * 480 - 100, 0), 280)
            assert left <= 335 and left + 200 >= 445, name
    assert what_matters(Image.new("RGB", (64, 32), "grey")) == (0.5, 0.5)


def test_auto_finds_a_face() -> None:
    """matplotlib's picture of Grace Hopper, whose eyes are at (0.51, 0.33) of it, in a wide dark room."""
    pytest.importorskip("cv2")
    portrait = Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")
    room = Image.new("RGB", (1800, 600), (60, 50, 40))
    room.paste(portrait, (1200, 0))
    x, y = what_matters(room)
    assert x == pytest.approx((1200 + 0.51 * 512) / 1800, abs=0.02) and y == pytest.approx(0.36, abs=0.06)


def test_a_recipe_is_settled_where_its_pictures_are_found(morpher: Morpher, tmp_path: Path) -> None:
    wide = Image.new("RGB", (96, 32), "white")
    wide.paste((200, 0, 0), (70, 8, 86, 24))
    wide.save(tmp_path / "a.png")
    wide.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "b.png")
    files = (str(tmp_path / "a.png"), str(tmp_path / "b.png"))
    found, _ = gather(Recipe(files, focus=("auto",)))
    (x, _), (other, _) = (map(float, each.split(",")) for each in found.focus)
    assert x == pytest.approx(78 / 96, abs=0.02) and other == pytest.approx(18 / 96, abs=0.02)
    path = morpher.prepare(files, fit=None, steps=1, focus="auto")
    assert tuple(path.settings["focus"]) == found.focus
    assert path.latents.allclose(morpher.prepare(files, fit=None, steps=1, focus=found.focus).latents)


def test_on_the_command_line(
    morpher: Morpher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app, "_load", lambda recipe, typed=(), no_cache=False: morpher)
    Image.effect_noise((64, 64), 20).convert("RGB").save("square.png")
    Image.effect_noise((128, 64), 60).convert("RGB").save("wide.png")

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["diffmorpher", "morph", *words, *FEW])
        with pytest.raises(SystemExit) as end:
            app.main()
        return int(end.value.code or 0), capfd.readouterr().err

    two = ("square.png", "wide.png")
    status, err = run(*two, "-o", "a.mp4", "--focus", "center", "--focus", "0.2,0.5")
    assert status == 0, err
    assert "To fit 32x32, 0 % of square.png, 50 % of wide.png is cut off. (--focus says where" in err
    settings: Any = read_settings("a.mp4")
    assert settings["focus"] == ["center", "0.2,0.5"] and settings["size"] == [32, 32]
    assert Recipe.read("a.mp4").focus == ("center", "0.2,0.5")
    status, err = run("--from", "a.mp4", "-o", "b.mp4", "--resize", "blur", "--size", "4:5")
    assert status == 0 and "cut off" not in err, err
    settings = read_settings("b.mp4")
    width, height = settings["size"]
    assert settings["resize"] == "blur" and width / height == pytest.approx(4 / 5, rel=0.1)
    status, err = run(*two, "-o", "c.mp4", *("--focus", "center") * 3)
    assert status == 2 and "3 focuses were given for 2 images: give one for all, one each, or none." in err
