"""Films made again, changed, written down and made by the batch: `morph --from`, `--save-recipe`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffmorpher import Morpher, Recipe, read_settings
from diffmorpher.cli import app
from diffmorpher.errors import ModelError
from diffmorpher.files.films import save_film
from diffmorpher.models.catalog import ASSETS

DEMO = ASSETS / "demo"
SMALL = ("--steps", "2", "--frames", "3", "--lora-steps", "1")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    tmp_path: Path, loaded_mini: Morpher, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Run:
    """The command line in this process, with pear, rose and tulip in its working folder, and a model that is loaded already."""
    for name in ("pear", "rose", "tulip"):
        shutil.copy(DEMO / f"{name}.png", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        app, "_load", lambda recipe, typed=(), no_cache=False: loads.append(recipe.model) or loaded_mini
    )
    loads: list[str] = []

    def run(*arguments: str) -> tuple[int, str, str]:
        loads.clear()
        monkeypatch.setattr(sys, "argv", ["diffmorpher", *arguments])
        with pytest.raises(SystemExit) as end:
            app.main()
        out, err = capfd.readouterr()
        return int(end.value.code or 0), out, err

    run.loads = loads  # type: ignore[attr-defined]
    return run


def test_the_same_film_in_another_process_and_another_place(tmp_path: Path) -> None:
    """Byte for byte, with nobody's folders in it."""

    def morph(*arguments: str, cwd: Path) -> None:
        command = [sys.executable, "-m", "diffmorpher", "morph", *arguments]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    home, elsewhere = tmp_path / "private-home", tmp_path / "elsewhere"
    home.mkdir()
    (elsewhere / "films").mkdir(parents=True)
    shutil.copy(DEMO / "pear.png", home)
    morph(
        str(home / "pear.png"), str(DEMO / "rose.png"), "-p", "a fruit", "-o", "a.mp4", *SMALL, "--fps", "5", cwd=home
    )
    film = (home / "a.mp4").read_bytes()
    assert b"private-home" not in film and str(DEMO).encode() not in film
    shutil.move(home / "a.mp4", elsewhere / "films/a.mp4")
    shutil.copy(DEMO / "pear.png", elsewhere / "films")  # one beside the film, one in the working folder
    shutil.copy(DEMO / "rose.png", elsewhere)
    shutil.rmtree(home)
    morph("--from", "films/a.mp4", "-o", "again.mp4", cwd=elsewhere)
    assert (elsewhere / "again.mp4").read_bytes() == film


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.mov", "a.mkv", "a.gif", "a.webp", "a.apng", "a.png", "a"])
def test_every_kind_of_output_can_be_made_again(run: Run, tmp_path: Path, name: str) -> None:
    assert run("morph", "pear.png", "rose.png", "-o", name, *SMALL, "--ping-pong", "--fps", "4")[0] == 0
    again = f"again{Path(name).suffix}"
    assert run("morph", "--from", name, "-o", again)[0] == 0
    if name == "a":
        files = sorted((tmp_path / "a").iterdir())
        assert len(files) == 3
        assert all(file.read_bytes() == (tmp_path / "again" / file.name).read_bytes() for file in files)
    else:
        assert (tmp_path / name).read_bytes() == (tmp_path / again).read_bytes()
    assert read_settings(tmp_path / name) == read_settings(tmp_path / again)


def test_further_options_change_it_and_the_output_says_so(run: Run, tmp_path: Path) -> None:
    assert run("morph", "pear.png", "rose.png", "-o", "a.mp4", *SMALL, "-p", "one", "-p", "two")[0] == 0
    status, out, err = run(
        "morph", "--from", "a.mp4", "-o", "b.gif", "--frames", "4", "--no-lora", "--lora-steps", "7", "--json"
    )
    assert status == 0 and "--lora-steps changes nothing with --no-lora." in err
    settings = json.loads(out)["settings"]
    assert (settings["frames"], settings["fit"], settings["prompts"]) == (4, False, ["one", "two"])
    assert Recipe.read("b.gif").changed(frames=3) == Recipe.read("a.mp4").changed(no_lora=True)
    assert run("morph", "--from", "b.gif", "-o", "c.gif")[0] == 0
    assert (tmp_path / "b.gif").read_bytes() == (tmp_path / "c.gif").read_bytes()
    # What is on can be switched off again.
    assert run("morph", "--from", "b.gif", "-o", "d.gif", "--loop", "--no-adain", "--ping-pong")[0] == 0
    off = ("--no-loop", "--adain", "--no-ping-pong")
    assert run("morph", "--from", "d.gif", "-o", "e.gif", *off)[0] == 0
    assert (tmp_path / "e.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()


def test_a_recipe_is_written_down_with_a_film_or_alone(run: Run, tmp_path: Path) -> None:
    status, _, err = run("morph", "pear.png", "rose.png", "-o", "a.mp4", *SMALL, "--save-recipe", "recipes/r.toml")
    assert status == 0 and "Wrote recipes/r.toml" in err
    assert Recipe.read("recipes/r.toml").pictures == ("../pear.png", "../rose.png")
    assert run("morph", "--from", "recipes/r.toml", "-o", "b.mp4")[0] == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert run("morph", "--from", "a.mp4", "--fps", "3", "--save-recipe", "alone.toml")[0] == 0
    assert run.loads == [] and Recipe.read("alone.toml").fps == 3  # type: ignore[attr-defined]
    text = (tmp_path / "alone.toml").read_text()
    other = text.replace("rose.png", "tulip.png")
    (tmp_path / "other.toml").write_text(other)
    status, _, err = run("morph", "--from", "other.toml", "-o", "c.mp4")
    assert status == 2 and "'tulip.png' is another picture than the 'tulip.png' that other.toml was made of" in err
    (tmp_path / "other.toml").write_text(re.sub(r"picture_hashes = \[.*?\]\n", "", other, flags=re.DOTALL))
    assert run("morph", "--from", "other.toml", "-o", "c.mp4")[0] == 0
    assert (read_settings("c.mp4") or {})["pictures"] == ["pear.png", "tulip.png"]


def test_a_film_with_loras_needs_the_same_files(run: Run, tmp_path: Path) -> None:
    for name in ("pear", "rose"):
        assert run("fit", f"{name}.png", "-p", "a thing", "-o", f"{name}.safetensors", "--lora-steps", "1")[0] == 0
    loras = ("--lora", "pear.safetensors", "--lora", "rose.safetensors")
    assert run("morph", "pear.png", "rose.png", "-o", "a.mp4", "--steps", "2", "--frames", "3", *loras)[0] == 0
    assert run("morph", "--from", "a.mp4", "-o", "b.mp4")[0] == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    shutil.copy("pear.safetensors", "rose.safetensors")
    status, _, err = run("morph", "--from", "a.mp4", "-o", "b.mp4")
    assert status == 2 and "loras: 'rose.safetensors' is another file than a.mp4 was made with" in err


def test_inputs_are_not_written_over(run: Run, tmp_path: Path) -> None:
    assert run("morph", "pear.png", "rose.png", "-o", "a.mp4", *SMALL)[0] == 0
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for arguments, said in (
        (("--from", "a.mp4", "-o", "a.mp4"), "is what the film is made from"),
        (("--from", "a.mp4", "-o", "rose.png"), "is a picture to be morphed"),
        (("--from", "a.mp4", "-o", "b.mp4", "--save-recipe", "b.mp4"), "is asked for twice"),
    ):
        status, _, err = run("morph", *arguments)
        assert status == 2 and said in err, err
    assert before == {file: file.read_bytes() for file in tmp_path.iterdir()}


def test_frames_that_are_inputs_are_not_written_over_either(run: Run, tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    for i, name in enumerate(("pear", "rose")):
        shutil.copy(DEMO / f"{name}.png", tmp_path / f"f/frame_000{i}.png")
    pictures = ("f/frame_0000.png", "f/frame_0001.png")
    for places in (("-o", "f"), ("-o", "a.mp4", "--save-frames", "f")):
        status, _, err = run("morph", *pictures, *places, *SMALL)
        assert status == 2 and "output 'f' would write over 'f/frame_0000.png', a picture to be morphed" in err, err
    assert run("morph", "pear.png", "rose.png", "-o", "g", *SMALL)[0] == 0
    status, _, err = run("morph", "--from", "g", "-o", "g/frame_0000.png")
    assert status == 2 and "is what the film is made from" in err


@pytest.mark.parametrize("option", [("--save-frames", "f"), ("--save-path", "a.morph"), ("--json",)])
def test_what_only_a_film_has_needs_an_output(run: Run, tmp_path: Path, option: tuple[str, ...]) -> None:
    status, _, err = run("morph", "pear.png", "rose.png", "--save-recipe", "r.toml", *option)
    assert status == 2 and "Missing option '-o'" in err and not (tmp_path / "r.toml").exists()


def test_a_device_that_was_typed_must_be_here(tmp_path: Path) -> None:
    recipe = replace(Recipe(device="nosuch"), origin=tmp_path / "a.mp4")
    with pytest.raises(ModelError, match="the device 'nosuch' is not usable here"):
        app._load(recipe, {"device": "nosuch"})
    with pytest.warns(UserWarning, match="was made on 'nosuch', which is not here"):
        app._load(recipe)


BATCH = """
frames = 3
[fit]
steps = 1
[sample]
steps = 2

[[film]]
pictures = ["pear.png", "rose.png"]
out = "one.mp4"

[[film]]
pictures = ["rose.png", "tulip.png"]
out = "two.gif"
"""


def test_a_batch_is_made_once(run: Run, tmp_path: Path) -> None:
    (tmp_path / "batch.toml").write_text(BATCH)
    status, out, err = run("morph", "--from", "batch.toml", "-o", "films", "--json")
    assert status == 0, err
    assert run.loads == ["mini"], "the model was loaded for each film"  # type: ignore[attr-defined]
    made: list[dict[str, Any]] = json.loads(out)["films"]
    assert [film["output"] for film in made] == ["films/one.mp4", "films/two.gif"]
    assert [film["settings"]["pictures"] for film in made] == [["pear.png", "rose.png"], ["rose.png", "tulip.png"]]
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "films").iterdir()}

    status, out, err = run("morph", "--from", "batch.toml", "-o", "films", "--json")
    assert (status, run.loads, json.loads(out)["films"]) == (0, [], [])  # type: ignore[attr-defined]
    assert "films/one.mp4 is there already" in err
    (tmp_path / "batch.toml").write_text(BATCH + "frames = 4\n")  # of the second alone
    assert run("morph", "--from", "batch.toml", "-o", "films")[0] == 0
    assert (tmp_path / "films/one.mp4").stat().st_mtime_ns == times[tmp_path / "films/one.mp4"]
    assert Recipe.read("films/two.gif").frames == 4
    # An option typed beside it holds for every film, and what changes nothing is said once.
    further = ("--fps", "3", "--no-lora", "--lora-rank", "2", "--json")
    status, out, err = run("morph", "--from", "batch.toml", "-o", "films", *further)
    assert err.count("--lora-rank changes nothing with --no-lora.") == 1
    assert status == 0 and [film["settings"]["fps"] for film in json.loads(out)["films"]] == [3, 3]


def test_a_table_of_pairs(run: Run, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text(
        "category,name,image_0,image_1,prompt_0,prompt_1\n"
        "fruit,pear-rose,pear.png,rose.png,a pear,a rose\nflowers,rose-tulip,rose.png,tulip.png,a rose,a tulip\n"
    )
    assert run("morph", "--from", "pairs.csv", "-o", "films", *SMALL)[0] == 0
    assert sorted(file.name for file in (tmp_path / "films").iterdir()) == ["pear-rose.mp4", "rose-tulip.mp4"]
    assert Recipe.read("films/rose-tulip.mp4").prompts == ("a rose", "a tulip")


@pytest.mark.parametrize(
    "text", ['[[film]]\npictures = ["pear.png", "rose.png"]', "image_0,image_1\npear.png,rose.png"]
)
def test_a_batch_of_one_is_a_batch(run: Run, tmp_path: Path, text: str) -> None:
    name = "one.toml" if "film" in text else "one.csv"
    (tmp_path / name).write_text(text)
    assert run("morph", "--from", name, "-o", "films", *SMALL)[0] == 0
    assert [file.name for file in (tmp_path / "films").iterdir()] == ["pear-rose.mp4"]


def test_a_film_does_not_say_where_another_goes(run: Run, tmp_path: Path) -> None:
    assert run("morph", "pear.png", "rose.png", "-o", "a.png", *SMALL)[0] == 0
    settings = read_settings("a.png") or {}
    save_film([Image.new("RGB", (8, 8))], "b.png", metadata=settings | {"out": str(tmp_path / "tulip.png")})
    tulip = (tmp_path / "tulip.png").read_bytes()
    status, _, err = run("morph", "--from", "b.png", "-o", "c.png")
    assert status == 2 and "the key 'out' is not known" in err
    assert (tmp_path / "tulip.png").read_bytes() == tulip and not (tmp_path / "c.png").exists()


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        (("tulip.png", "nosuch.png"), (), "film 2 of the batch: pictures: 'nosuch.png' is neither beside batch.toml"),
        (("two.gif", "one.mp4"), (), "two films of the batch go to 'one.mp4'"),
        (("two.gif", "two.avi"), (), "film 2 of the batch: Output 'two.avi' ends in '.avi'"),
        (("two.gif", "tulip.png"), (), "output 'tulip.png' writes over a file that a film of the batch is made from"),
        (("one.mp4", "tulip.png"), (), "output 'tulip.png' writes over a file that a film of the batch is made from"),
        (('out = "two.gif"', 'model = "nosuch"'), (), "film 2 of the batch: the model 'nosuch' is not known"),
        (("steps = 2", "steps = 0"), (), "batch.toml, film 1: sample.steps: steps is 0"),
        (("", ""), ("pear.png", "rose.png"), "a batch says itself which pictures and outputs it has"),
        (("", ""), ("--frames", "1"), "frames is 1"),
        (("", ""), ("-o", "film.mp4"), "-o 'film.mp4' is a film's name, but a batch needs a folder"),
    ],
)
def test_what_is_wrong_with_a_batch_is_said_before_the_first_film(
    run: Run, tmp_path: Path, change: tuple[str, str], arguments: tuple[str, ...], said: str
) -> None:
    (tmp_path / "batch.toml").write_text(BATCH.replace(*change) if change[0] else BATCH)
    before = sorted(tmp_path.iterdir())
    status, out, err = run("morph", "--from", "batch.toml", *arguments)
    assert status == 2 and said in err and err.count("\n") == 1, err
    assert out == "" and run.loads == [] and sorted(tmp_path.iterdir()) == before  # type: ignore[attr-defined]


def test_a_model_that_cannot_be_loaded_does_not_stop_the_others(run: Run, tmp_path: Path, loaded_mini: Morpher) -> None:
    def load(recipe: Recipe, typed: object = (), no_cache: bool = False) -> Morpher:
        if recipe.model == "sd15":
            raise ModelError("no such model here.")
        return loaded_mini

    (tmp_path / "batch.toml").write_text(BATCH.replace('out = "one.mp4"', 'out = "one.mp4"\nmodel = "sd15"'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "_load", load)
        status, _, err = run("morph", "--from", "batch.toml")
    assert status == 1 and "one.mp4: no such model here." in err and (tmp_path / "two.gif").exists()


def test_a_film_that_fails_does_not_stop_the_others(run: Run, tmp_path: Path) -> None:
    (tmp_path / "batch.toml").write_text(
        BATCH.replace('out = "one.mp4"', 'out = "one.mp4"\nfit = {learning_rate = 1e30, steps = 9}')
    )
    status, out, err = run("morph", "--from", "batch.toml", "--json")
    assert status == 1 and "1 of 2 films failed; run again" in err, err
    found = json.loads(out)
    assert len(found["films"]) == len(found["failed"]) == 1 and "NaN" in found["failed"][0]
    assert (tmp_path / "two.gif").exists() and not (tmp_path / "one.mp4").exists()
