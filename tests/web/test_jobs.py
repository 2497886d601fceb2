"""What stands behind the web page, without gradio and browser: settings, their command line, the line of jobs, visitors."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image
from servers import Server

from conftest import tiny_pipeline
from diffmorpher import FitConfig, Morpher, Recipe
from diffmorpher.cli.checks import check_port, parse_auth
from diffmorpher.errors import Cancelled, ConfigError, DiffMorpherError, ImageError, SoundError
from diffmorpher.files.atomic import file_hash
from diffmorpher.files.films import read_settings
from diffmorpher.files.loras import save_lora
from diffmorpher.models.catalog import ASSETS, CATALOG, check_model
from diffmorpher.recipe import film_name
from diffmorpher.web.downloads import downloads
from diffmorpher.web.estimate import Speed, length, rows
from diffmorpher.web.html import chart, frame, progress, strip
from diffmorpher.web.jobs import KEPT_VISITS, Session, Studio, check_picture, explain
from diffmorpher.web.keys import frames_key
from diffmorpher.web.line import LONGEST_LINE, Job, Line
from diffmorpher.web.settings import chosen, different_names, fields_of, long_enough, one_each, together, weighted
from diffmorpher.web.uploads import BROKEN_OFF
from diffmorpher.web.visits import Picture

DEMO = ASSETS / "demo"
SMALL: dict[str, Any] = {"frames": 3, "steps": 2, "lora_steps": 1}


# ---- settings and the command


def command(recipe: Recipe, names: list[str], prompts: list[str], loras: tuple[str, ...] = ()) -> str:
    return replace(recipe, pictures=tuple(names), prompts=tuple(prompts), loras=loras).command()


def test_defaults_are_those_of_the_command_line() -> None:
    assert chosen({}) == Recipe()
    assert command(chosen({}), ["a.png", "b.png"], ["", ""]) == "diffmorpher morph a.png b.png -o a-b.mp4"
    own = CATALOG["mini"]
    assert chosen({}).fit == own.fit and chosen({}).sample == own.sample
    assert chosen({"steps": 3}).sample == replace(own.sample, steps=3)


def test_the_command_says_what_differs_and_quotes_what_a_shell_would_split() -> None:
    recipe = chosen(
        {
            "frames": 24.0,
            "fps": "12",
            "loop": True,
            "ping_pong": True,
            "size": "256×192",
            "lora_lr": "0.0001",
            "adain": False,
            "reschedule": False,
        }
    )
    line = command(recipe, ["my cat.png", "-dog.png"], ["a cat", "a dog's nose"])
    assert shlex.split(line) == [
        *("diffmorpher", "morph", "my cat.png", "./-dog.png", "-p", "a cat", "-p", "a dog's nose"),
        *("-o", "my cat--dog.mp4", "--frames", "24", "--fps", "12", "--loop", "--ping-pong", "--size", "256x192"),
        *("--lora-lr", "0.0001", "--no-adain", "--no-reschedule"),
    ]
    assert "-p 'a pet'" in command(Recipe(), ["a.png", "b.png"], ["a pet", "a pet"])
    with_loras = command(chosen({"lora_steps": 5}), ["a.png", "b.png"], ["", ""], ("a.safetensors", "b.safetensors"))
    assert with_loras.count("--lora ") == 2 and "--lora-steps" not in with_loras


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"no_lora": True, "fix_lora": 0.5, "guidance": 2.5, "seed": 7, "resize": "pad", "attention_lambda": 0.25},
        {"lora_steps": 9, "lora_rank": 4, "loop": True, "ping_pong": True, "model": "sd15"},
        {"preset": "paper", "steps": 9, "model": "sd15"},
        {"model": "sd21-base", "prediction": "v"},
        {"preset": "preview", "frames": 5},
        {"seconds": "3.5", "hold": "0.5, 1", "stretch": [2], "ease": "in-out", "reverse": True},
        {"stretch": "2", "frames": 30, "size": "16:9", "resize": "blur", "focus": "center; 0.2, 0.7"},
    ],
)
def test_the_command_is_one_that_the_command_line_accepts(settings: dict[str, Any], monkeypatch: Any) -> None:
    from diffmorpher.cli import app

    recipe = chosen(settings)
    line = command(recipe, [str(DEMO / "pear.png"), str(DEMO / "rose.png")], ["a", "b"])
    understood: list[Recipe] = []

    def stop(recipe: Recipe, typed: object = (), no_cache: bool = False) -> None:
        understood.append(recipe)
        raise DiffMorpherError("far enough")

    monkeypatch.setattr(app, "_load", stop)
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as end:
        app.main()
    assert end.value.code == 1  # it came as far as loading the model
    same = {name: getattr(recipe, name) for name in ("pictures", "prompts", "picture_hashes")}
    assert replace(understood[0], **same) == recipe, "the command makes another film"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"frames": 2.5}, "frames is 2.5, but must be a whole number"),
        ({"frames": 1}, "frames is 1, but must be a whole number from 2"),
        ({"frames": 241}, "at most 240 on this page"),
        ({"steps": 1000}, "at most 200 on this page"),
        ({"size": "2048x2048"}, "at most 1024 on this page"),
        ({"size": "big"}, "not of the form WxH"),
        ({"lora_lr": "nan"}, "LoRA rate is 'nan', but must be a number"),
        ({"lora_steps": "0"}, "LoRA steps"),
        ({"adain": "yes"}, "must be true or false"),
        ({"resize": "squash"}, '"crop", "pad" or "blur"'),
        ({"seed": -1}, "seed"),
        ({"fps": 0}, "fps"),
        ({"fps": 0.5}, "fps is 0.5, but must be at least 1 on this page"),
        ({"fps": 61}, "at most 60 on this page"),
        ({"prediction": "sample"}, 'the prediction is \'sample\', but must be "epsilon" or "v"'),
        ({"guidance": 16}, "at most 15 on this page"),
        ({"preset": "best"}, "preset is 'best'"),
        ({"preset": ["paper"]}, r"preset is \['paper'\]"),
        ({"fps": 10**400}, "must be a number"),
        ({"hold": "11"}, "Hold is 11, but can be at most 10 on this page"),
        ({"hold": "1;2"}, "hold is '1;2', but must be a number, or numbers with commas between"),
        ({"stretch": "40"}, "Frames is 321, but can be at most 240 on this page"),
        ({"seed": 10**400}, "must be a number"),
        ({"model": "x" * 400}, "is not known"),
    ],
)
def test_a_bad_setting_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffMorpherError, match=message):
        check_model(chosen(values).model)


def test_a_seed_is_exact_as_text_too() -> None:
    assert chosen({"seed": str(2**53 + 1)}).seed == chosen({"seed": 2**53 + 1}).seed == 2**53 + 1
    assert chosen({"seed": "4.0"}).seed == 4


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"preset": "paper", "fps": 12.0, "lora_steps": 9},
        {"preset": "preview", "size": "64x96"},
        {"model": "sd21-base", "prediction": "epsilon"},
        {"preset": "paper", "steps": 20, "lora_steps": 23},  # the model's own, but not the preset's
        {"adain": False, "loop": True, "no_lora": True, "seed": 3, "attention_lambda": 0.2, "model": "sd15"},
        {
            "seconds": 3,
            "hold": "0.5,0",
            "stretch": "2",
            "ease": "out",
            "reverse": True,
            "focus": "0.2,0.7",
            "size": "4:5",
        },
    ],
)
def test_a_films_settings_fill_the_form_that_makes_it_again(settings: dict[str, Any]) -> None:
    recipe = chosen(settings)
    values, missing = fields_of(recipe)
    assert chosen(values) == recipe and not missing
    _, missing = fields_of(recipe.changed(attention_mode="kv"))
    assert missing == ["--attention-mode"]


def test_names() -> None:
    assert different_names(["image.png", "image.png", "image-2.png"]) == ["image.png", "image-2.png", "image-2-2.png"]
    assert film_name(["cat.png", "dog.jpg"]) == "cat-dog"


def test_what_the_command_refuses(tmp_path: Path) -> None:
    assert parse_auth("ann:a:b") == ("ann", "a:b") and parse_auth(None) is None
    with pytest.raises(ConfigError, match="such as ann:secret"):
        parse_auth("secret")
    with pytest.raises(ConfigError, match="the port is 70000"):
        check_port(70000)
    (tmp_path / "gradio.py").write_text("raise ModuleNotFoundError('No module named gradio', name='gradio')")
    done = subprocess.run(
        [sys.executable, "-m", "diffmorpher", "web"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr == "diffmorpher: error: the page needs another package: pip install 'diffmorpher[web]'.\n"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not let us choose the thread")
def test_a_signal_that_the_system_hands_to_another_thread_stops_the_page(tmp_path: Path) -> None:
    """It does now and then; the main thread then slept for ever."""
    server = Server(tmp_path / "web")
    process = server.process
    try:
        other = next(int(name) for name in os.listdir(f"/proc/{process.pid}/task") if int(name) != process.pid)
        assert ctypes.CDLL(None).tgkill(process.pid, other, signal.SIGTERM) == 0
        assert process.wait(timeout=20) == 0
        assert not list(server.folder.glob("diffmorpher-*"))
    finally:
        process.kill()


def test_films_are_the_same_frames_whatever_only_says_how_they_are_played() -> None:
    images = [Image.new("RGB", (8, 8))] * 2
    plain = Recipe(("a.png", "b.png"), picture_hashes=("1", "2"), prompts=("a", "b"))

    def key(**typed: Any) -> str:
        return frames_key(plain.changed(**typed), images, None, (), None)

    for how in ({"fps": 12.0}, {"hold": (0.5, 0)}, {"quality": "best"}, {"ping_pong": True}, {"reverse": True}):
        assert key(**how) == key(), how
    others: list[dict[str, Any]] = [
        *({"loop": True}, {"frames": 9}, {"seconds": 3.0}, {"seed": 1}, {"size": (64, 64)}, {"prompt": ["a", "c"]}),
        *({"steps": 9}, {"adain": False}, {"guidance": 2.0}, {"reschedule": False}, {"ease": "in"}, {"lora_steps": 9}),
        *({"no_lora": True}, {"resize": "pad"}, {"focus": ["0,0"]}, {"transparent": True}, {"model": "sd15"}),
        {"prediction": "v"},
    ]
    keys = [key(**each) for each in ({}, *others)]
    assert len(set(keys)) == len(keys)
    assert key() != frames_key(replace(plain, picture_hashes=("1", "3")), images, None, (), None)


# ---- the line


def wait(job: Job) -> Any:
    assert job.done.wait(60)
    if job.error:
        raise job.error
    return job.result


def test_jobs_run_one_at_a_time_in_order_and_know_their_place() -> None:
    line, gate, started, order = Line(), threading.Event(), threading.Event(), []
    line.submit(lambda _: (started.set(), gate.wait(30)))
    rest = [line.submit(lambda _, i=i: order.append(i)) for i in range(3)]  # type: ignore[misc]
    assert started.wait(10)
    assert [job.ahead for job in rest] == [1, 2, 3]
    assert "2 jobs are before yours" in progress(rest[1])
    rest[1].cancel()
    assert [job.ahead for job in rest] == [1, 0, 2]
    gate.set()
    wait(rest[2])
    assert order == [0, 2]
    with pytest.raises(Cancelled):
        wait(rest[1])


def test_a_cancelled_job_stops_at_its_next_step_and_a_broken_one_does_not_stop_the_line() -> None:
    line, steps = Line(), []

    def work(report: Any) -> None:
        for i in range(1000):
            report("fit", i, 1000)
            steps.append(i)
            time.sleep(0.01)

    job = line.submit(work)
    while len(steps) < 3:
        time.sleep(0.005)
    assert "left" in progress(job) and "of 1000" in progress(job)
    job.cancel()
    with pytest.raises(Cancelled):
        wait(job)
    count = len(steps)
    assert isinstance(_failed(line.submit(lambda _: 1 / 0)), ZeroDivisionError)
    assert wait(line.submit(lambda _: 5)) == 5
    assert len(steps) == count < 100


def _failed(job: Job) -> Exception | None:
    job.done.wait(30)
    return job.error


def test_the_line_has_an_end() -> None:
    line, gate, started = Line(), threading.Event(), threading.Event()
    line.submit(lambda _: (started.set(), gate.wait(30)))
    assert started.wait(10)
    for _ in range(LONGEST_LINE):
        line.submit(lambda _: None)
    with pytest.raises(DiffMorpherError, match="Too many people are waiting"):
        line.submit(lambda _: None)
    gate.set()


# ---- visitors


@pytest.fixture
def studio(tmp_path: Path, loaded_mini: Morpher) -> Iterator[Studio]:
    studio = Studio(tmp_path / "root")
    studio.model.hold(loaded_mini, Recipe())
    yield studio
    studio.close()
    assert not studio.root.exists()


def test_only_the_file_is_written_again_where_frames_do_not_change(studio: Studio) -> None:
    ann = visit(studio, "ann", "pear", "rose")
    film = morph(studio, ann)
    job = studio.morph(ann, chosen(SMALL | {"fps": 5, "hold": "1", "reverse": True}), ann.pictures, ["", ""])
    again = wait(job)
    assert again.again and not film.again and not {"fit", "invert", "sample", "schedule"} & set(job.stages)
    assert [frame.tobytes() for frame in again.result.frames] == [frame.tobytes() for frame in film.result.frames]
    assert again.metadata["fps"] == 5 and again.metadata["reverse"]
    # The film before can still be watched, and made again; nothing else of it is kept.
    (kept,) = ann.earlier
    assert kept.recipe is not None and {file.name for file in kept.video.parent.iterdir()} == {
        "pear-rose.mp4",
        "pear-rose.toml",
    }
    assert Recipe.read(kept.recipe).fps == 8 and Recipe.read(kept.video).fps == 8
    assert not morph(studio, ann, frames=4).again and not morph(studio, ann, frames=4, seed=1).again


def test_what_the_network_predicts_is_the_films_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said on the page, kept in its film and its command, and forgotten by the next one."""
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    monkeypatch.setitem(CATALOG, "mini", replace(CATALOG["mini"], source=str(tmp_path / "tiny")))
    studio = Studio(tmp_path / "root")
    ann = visit(studio, "ann", "pear", "rose")
    films = [morph(studio, ann, prediction=each, size="32x32") for each in ("", "v", "")]
    plain, told, again = ([frame.tobytes() for frame in film.result.frames] for film in films)
    assert plain == again != told
    assert " --prediction v" in films[1].command and "prediction" not in films[0].command + films[2].command
    assert fields_of(Recipe.read(films[1].video))[0]["prediction"] == "v"
    studio.close()


def test_a_visitor_comes_back_for_a_while(tmp_path: Path) -> None:
    studio = Studio(tmp_path / "root", keep=60)
    for key in ("ann", "bob", "program"):
        visit(studio, key, "pear")
    studio.come_back("ann", "her token")
    studio.come_back("bob", "his token")
    folders = {key: studio.session(key).folder for key in ("ann", "bob", "program")}
    for key in folders:
        studio.leave(key)
    assert folders["ann"].exists() and not folders["program"].exists()
    assert studio.come_back("ann again", "her token").folder == folders["ann"]
    assert studio.come_back("somebody", "").folder not in folders.values()
    assert studio.come_back("eve", "a guess").folder not in folders.values()
    ending = studio.session("bob").ending
    assert ending is not None
    ending.function(*ending.args)  # his time is over
    assert not folders["bob"].exists() and studio.come_back("bob again", "his token").pictures == []
    studio.close()
    assert not studio.root.exists()


def test_how_long_a_film_will_be_and_take() -> None:
    recipe = Recipe(("a", "b", "c")).changed(frames=9, fps=10, hold=(0.5, 0, 1), ping_pong=True)
    assert length(recipe, 3) == pytest.approx((9 + 7 + 5 + 10) / 10)
    speed = Speed()
    assert speed.seconds(recipe, 3) is None
    speed.learn(recipe, 1000, 20.0)
    assert speed.seconds(recipe, 3) == pytest.approx(0.02 * rows(recipe, 3))
    speed.learn(recipe, 3, 20.0)  # all but nothing had to be made
    assert speed.seconds(recipe, 3) == pytest.approx(0.02 * rows(recipe, 3))
    assert speed.seconds(recipe.changed(model="sd15"), 3) is None


def test_rows_are_guessed_about_right(studio: Studio) -> None:
    film = morph(studio, visit(studio, "ann", "pear", "rose"), frames=12)
    assert rows(film.recipe, 2) == pytest.approx(film.result.unet_rows + 3 * 4 * 2 * film.recipe.fit.steps, rel=0.5)


def test_few_visitors_are_waited_for(tmp_path: Path) -> None:
    studio = Studio(tmp_path / "root", keep=60)
    folders = []
    for i in range(KEPT_VISITS + 2):
        folders.append(studio.come_back(f"visitor {i}", f"token {i}").folder)
        studio.leave(f"visitor {i}")
    assert [folder.exists() for folder in folders] == [False, False] + [True] * KEPT_VISITS
    studio.close()


def visit(studio: Studio, key: str, *names: str) -> Session:
    session = studio.session(key)
    for name in names:
        studio.add_picture(session, DEMO / f"{name}.png", held=True)
    return session


def morph(studio: Studio, session: Session, **settings: Any) -> Any:
    return wait(studio.morph(session, chosen(SMALL | settings), session.pictures, [""] * len(session.pictures)))


def test_a_film_and_the_fit_that_is_found_again(studio: Studio) -> None:
    ann, bob = visit(studio, "ann", "pear", "rose"), visit(studio, "bob", "pear", "rose")
    film = morph(studio, ann)
    assert film.metadata == read_settings(film.video) and film.metadata["fps"] == 8
    assert film.command.startswith("diffmorpher morph pear.png rose.png -o pear-rose.mp4 --frames 3")
    stages: list[set[str]] = []
    for settings in ({"frames": 4}, {"loop": True}, {"steps": 3}, {"lora_steps": 2}, {"seed": 1}):
        job = studio.morph(bob, chosen(SMALL | settings), bob.pictures, ["", ""])
        wait(job)
        stages.append(set(job.stages))
    assert ["fit" in seen for seen in stages] == [False, False, False, True, True]
    assert "invert" in stages[2]
    # Each samples his own film, at his own settings.
    one, two = wait(studio.frame_at(ann, 0.5)), wait(studio.frame_at(bob, 0.5))
    assert one.size == two.size and one.tobytes() != two.tobytes()
    assert one.tobytes() == film.result.frames[1].tobytes()


def test_a_paced_film(studio: Studio) -> None:
    ann = visit(studio, "ann", "pear", "rose")
    paced = {"frames": None, "seconds": 2, "fps": 4, "hold": "0.5,0", "ease": "in", "reverse": True}
    film = morph(studio, ann, **paced)
    assert len(film.result.frames) == 6 and film.result.times[-1] == 0
    settings: Any = film.metadata
    assert (settings["seconds"], settings["hold"], settings["reverse"], "frames" in settings) == (
        2,
        [0.5, 0],
        True,
        False,
    )
    assert settings["schedule"]["ease"] == "in"
    path = film.result.path.save(studio.root / "paced.morph")
    again = wait(studio.morph(ann, chosen(SMALL | paced), [], [], path_file=path))
    assert again.video.read_bytes() == again.result.save(studio.root / "same.mp4").read_bytes()
    assert len(again.result.frames) == 6
    with pytest.raises(ConfigError, match="Frames is 244, but can be at most 240 on this page"):
        studio.morph(ann, chosen({"seconds": 61, "fps": 4}), ann.pictures, ["", ""])


def test_a_film_with_sound_that_it_follows(studio: Studio, tmp_path: Path) -> None:
    ann = visit(studio, "ann", "pear", "rose")
    with wave.open(str(tmp_path / "song.wav"), "wb") as out:
        out.setparams((1, 2, 8000, 0, "NONE", ""))
        out.writeframes(bytes(8000) + 500 * bytes(range(100)))  # silence, then noise
    recipe = chosen(SMALL | {"frames": 8, "beat": True})
    with pytest.raises(ConfigError, match="needs a sound"):
        studio.morph(ann, recipe, ann.pictures, ["", ""])
    film = wait(studio.morph(ann, recipe, ann.pictures, ["", ""], audio=tmp_path / "song.wav"))
    alphas = film.result.alphas
    assert max(b - a for a, b in pairwise(alphas)) > 2 / 7, "it waits for the noise"
    settings: Any = film.metadata
    assert settings["audio"] == "song.wav" and "--audio song.wav --beat" in film.command
    for kind in ("mp4", "webm", "mov"):
        with av.open(str(downloads(film)[kind]())) as video:
            assert len(video.streams.audio) == 1
    values, missing = fields_of(replace(Recipe.read(film.video), device=None, dtype=None))
    assert values["beat"] is True and not missing
    with pytest.raises(SoundError, match="cannot be read"):
        studio.morph(ann, recipe, ann.pictures, ["", ""], audio=DEMO.parent / "study.html")


def test_downloads_hold_what_they_say(studio: Studio) -> None:
    ann = visit(studio, "ann", "pear", "rose")
    film = morph(studio, ann, ping_pong=True)
    files = {kind: write() for kind, write in downloads(film).items()}
    assert list(files) == ["mp4", "gif", "webp", "webm", "mov", "frames", "path", "loras"]
    with Image.open(files["gif"]) as gif:
        assert getattr(gif, "n_frames", 1) == 4  # three there, one back
    again = studio.morph(ann, chosen(SMALL), [], [], path_file=files["path"])
    assert wait(again).result.frames[1].tobytes() == film.result.frames[1].tobytes()
    assert "loras" not in downloads(morph(studio, ann, no_lora=True))
    assert not files["path"].exists(), "the film before is still there"


def test_a_visitor_who_leaves_takes_everything_along(studio: Studio, tmp_path: Path) -> None:
    upload = shutil.copy(DEMO / "pear.png", tmp_path / "pear.png")
    ann, bob = studio.session("ann"), studio.session("bob")
    for session in (ann, bob):
        studio.add_picture(session, Path(upload))  # the same bytes: one file, as gradio keeps uploads by content
    studio.end("ann")
    assert not ann.folder.exists() and Path(upload).exists()
    assert load(bob) == 1
    studio.end("bob")
    assert not Path(upload).exists()
    # One who leaves while his film is being made.
    cat = visit(studio, "cat", "pear", "rose")
    job = studio.morph(cat, chosen(SMALL | {"lora_steps": 500}), cat.pictures, ["", ""])
    while "fit" not in job.stages:
        time.sleep(0.01)
    studio.end("cat")
    with pytest.raises(Cancelled):
        wait(job)
    assert not cat.folder.exists()


def test_an_upload_that_came_again_stays_with_who_sent_it_last(studio: Studio, tmp_path: Path) -> None:
    """Gradio puts equal files in one place: the second takes that of the first."""
    upload = tmp_path / "digest" / "pear.png"
    upload.parent.mkdir()
    shutil.copy(DEMO / "pear.png", upload)
    studio.add_picture(studio.session("ann"), upload)
    (tmp_path / "new").write_bytes(upload.read_bytes())
    (tmp_path / "new").rename(upload)
    studio.end("ann")  # between the other's upload and his next request
    assert upload.exists()
    studio.add_picture(studio.session("bob"), upload)
    studio.end("bob")
    assert not upload.exists()


def test_no_name_removes_the_pages_own_pictures(studio: Studio, tmp_path: Path) -> None:
    own = Path(shutil.copy(DEMO / "pear.png", tmp_path / "pear.png"))
    studio.uploads.own.add(own)
    for name in (own, tmp_path / "digest" / ".." / "pear.png"):
        (tmp_path / "digest").mkdir(exist_ok=True)
        studio.add_picture(studio.session("ann"), name)
        studio.end("ann")
        assert own.exists()


def test_what_programs_and_broken_uploads_left_goes_in_an_hour(studio: Studio) -> None:
    uploads = studio.root / "uploads"
    uploads.mkdir(parents=True)
    for name, age in (("tmpold", BROKEN_OFF + 1), ("tmpnew", BROKEN_OFF - 60)):
        (uploads / name).touch()
        (uploads / f"digest-{name}").mkdir()
        os.utime(uploads / f"digest-{name}", (time.time() - age,) * 2)
        os.utime(uploads / name, (time.time() - age,) * 2)
    program, film = studio.session("program"), uploads / "film.mp4"
    film.touch()
    studio.uploads.hold(program, film)
    studio.session("another")
    assert film.exists() and program.folder.exists()
    program.until = time.monotonic() - 1
    studio.session("a third")
    assert not film.exists() and not program.folder.exists()
    assert {file.name for file in uploads.iterdir()} == {"tmpnew", "digest-tmpnew"}


def test_a_request_that_was_under_way_when_its_visitor_left_leaves_nothing(studio: Studio, tmp_path: Path) -> None:
    upload = Path(shutil.copy(DEMO / "pear.png", tmp_path / "pear.png"))
    studio.session("ann")
    studio.leave("ann")
    late = studio.session("ann")
    with pytest.raises(ImageError, match="not here any more"):
        studio.add_picture(late, upload)
    assert not upload.exists() and not late.folder.exists()
    images = [(name, DEMO / f"{name}.png") for name in ("pear", "rose")]
    job = studio.morph(late, chosen(SMALL), [Picture(*each) for each in images], ["", ""])
    with pytest.raises(Cancelled):
        wait(job)
    assert not late.folder.exists()


def test_what_is_written_while_its_visitor_leaves_goes_too(studio: Studio) -> None:
    ann = studio.session("ann")

    def write() -> Path:
        studio.end("ann")
        ann.folder.mkdir()  # as where it was not empty when it was to go
        return Path(shutil.copy(DEMO / "pear.png", ann.folder))

    assert not ann.written(write).exists() and not ann.folder.exists()


def test_letters_that_turn_a_name_around_are_left_out(studio: Studio, tmp_path: Path) -> None:
    upload = Path(shutil.copy(DEMO / "pear.png", tmp_path / "\u202egnp.exe\u2066.png"))
    assert studio.add_picture(studio.session("ann"), upload).name == "gnp.exe.png"


def load(session: Session) -> int:
    return sum(picture.file.is_file() for picture in session.pictures)


def test_styles_act_on_the_film_and_are_in_its_recipe(studio: Studio, tmp_path: Path) -> None:
    ann = visit(studio, "ann", "pear", "rose")
    plain = morph(studio, ann)
    file = tmp_path / "ink.safetensors"
    save_lora(studio.load("mini").fit(DEMO / "bus.png", fit=FitConfig(rank=2, steps=2, learning_rate=0.05)), file)
    film = wait(studio.morph(ann, chosen(SMALL), ann.pictures, ["", ""], styles=[(file, 0.5)]))
    recipe = Recipe.read(film.video)
    assert recipe.styles == ("ink.safetensors:0.5",) and recipe.style_hashes == (file_hash(file),)
    assert "--style ink.safetensors:0.5" in film.command
    assert film.result.frames[1].tobytes() != plain.result.frames[1].tobytes()  # the ends are the pictures
    again = wait(studio.morph(ann, chosen(SMALL), ann.pictures, ["", ""]))
    assert [frame.tobytes() for frame in again.result.frames] == [frame.tobytes() for frame in plain.result.frames]


def test_the_values_of_each_picture_and_their_field() -> None:
    assert one_each("hold", "0.5", 3) == ["0.5"] * 3 and together("hold", ["0.5"] * 3) == "0.5"
    assert one_each("hold", "0.5,0,1", 3) == ["0.5", "", "1"] and together("hold", ["0.5", "", "1"]) == "0.5,0,1"
    assert one_each("stretch", "2,1", 3) == ["2", "1", ""] and together("stretch", ["", "2"]) == "1,2"
    assert together("stretch", ["", ""]) == together("focus", ["", "", ""]) == together("hold", []) == ""
    assert (
        one_each("focus", "center; 0.2,0.7", 2) == ["", "0.2,0.7"]
        and together("focus", ["", "0.2,0.7"]) == "center;0.2,0.7"
    )
    assert long_enough("hold", "0.5,1", 3) == "0.5,1,0" and long_enough("hold", "0.5", 3) == "0.5"
    assert (
        long_enough("stretch", "2", 2) == "2,1" and long_enough("stretch", "2,1,4", 1) == "2,1,4"
    )  # of a film to come
    assert long_enough("focus", "", 3) == "" and long_enough("focus", "0.1,0.2;center", 3) == "0.1,0.2;center;center"
    assert weighted([Path("a"), Path("b")], "0.5, 1") == [(Path("a"), 0.5), (Path("b"), 1.0)]
    assert weighted([Path("a"), Path("b")], "") == [(Path("a"), 1.0), (Path("b"), 1.0)] and weighted([], "3") == []
    with pytest.raises(ConfigError, match="3 strengths were given for 2 styles"):
        weighted([Path("a"), Path("b")], "1,2,3")


def test_what_cannot_work_is_said_before_the_line(studio: Studio, tmp_path: Path) -> None:
    ann = visit(studio, "ann", "pear", "rose")
    with pytest.raises(ConfigError, match="at least two images"):
        studio.morph(ann, Recipe(), ann.pictures[:1], [""])
    with pytest.raises(ImageError, match="'pear.png' and 'pear.png' are the same picture"):
        studio.morph(ann, Recipe(), [ann.pictures[0]] * 2, ["", ""])
    with pytest.raises(DiffMorpherError, match="the model 'minni' is not known; did you mean 'mini'"):
        studio.morph(ann, Recipe(model="minni"), ann.pictures, ["", ""])
    with pytest.raises(ConfigError, match="LoRA files and a film without LoRA contradict each other"):
        studio.morph(ann, chosen({"preset": "preview"}), ann.pictures, ["", ""], loras=[tmp_path / "a.safetensors"] * 2)
    public = Studio(tmp_path / "public", {"mini"})
    with pytest.raises(ConfigError, match="'/etc' cannot be chosen here; take one of mini"):
        public.morph(ann, Recipe(model="/etc"), ann.pictures, ["", ""])
    Image.new("L", (10_000, 5_001)).save(tmp_path / "huge.png")
    with pytest.raises(ImageError, match="'huge.png' has 50 megapixels: at most 50"):
        check_picture(tmp_path / "huge.png")


def test_errors_for_people_tell_nothing_of_the_machine() -> None:
    assert explain(ConfigError("frames is 1.")) == "Frames is 1."
    assert explain(RuntimeError("CUDA out of memory")) == (
        "The machine ran out of memory: try a smaller size or fewer pictures."
    )
    assert "/secret" not in explain(ValueError("/secret/place"))


def test_pieces_of_html_escape_names_and_draw_every_gap() -> None:
    picture = Image.new("RGB", (8, 8))
    assert strip([picture] * 3, [0, 0.5, 1]).count("<img") == 3
    assert "0.25" in frame(picture, 0.25)
    drawn = chart([0.1, 0.3], [0.2, 0.2])
    assert drawn.count("<polyline") == 2 and chart([], [0.2]).count("<polyline") == 1
    from diffmorpher.web.html import note, thumbnail

    assert "<script" not in note("<script>") + thumbnail(picture, '"><script>')


def test_a_film_that_is_gone_is_not_found(tmp_path: Path) -> None:
    """A page that is left takes its films with it; its browser may still ask for one."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.responses import FileResponse
    from starlette.routing import Route
    from starlette.testclient import TestClient

    from diffmorpher.web.guard import Guard

    def breaks(request: object) -> None:
        raise RuntimeError("something else")

    film = tmp_path / "film.mp4"

    def goes(request: object) -> FileResponse:
        film.write_bytes(b"a film")
        answer = FileResponse(film, stat_result=film.stat())
        film.unlink()
        return answer

    routes = [Route("/file=film.mp4", lambda request: FileResponse(film)), Route("/file=goes.mp4", goes)]
    app = Starlette(routes=[*routes, Route("/breaks", breaks)], middleware=[Middleware(Guard)])
    client = TestClient(app)
    assert client.get("/file=film.mp4").status_code == 404
    assert (
        client.get("/file=goes.mp4").content == b""
    )  # after the headers: it breaks off, and is no fault of the server's
    film.write_bytes(b"a film")
    found = client.get("/file=film.mp4")
    assert found.status_code == 200 and found.content == b"a film" and "content-security-policy" in found.headers
    assert found.headers["x-frame-options"] == "SAMEORIGIN"
    with pytest.raises(RuntimeError, match="something else"):
        client.get("/breaks")
