"""Films on a real local Ray whose workers are killed at work: the same bytes as on one machine, each film once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from conftest import tiny_pipeline
from diffmorpher import Recipe
from diffmorpher.cluster.desk import Desk, make_part
from diffmorpher.cluster.films import make_films
from diffmorpher.cluster.maker import Maker
from diffmorpher.errors import Cancelled
from diffmorpher.files.films import read_settings
from diffmorpher.gather import gather


def write_pictures(folder: Path, count: int) -> list[str]:
    names = [f"{i}.png" for i in range(count)]
    for i, name in enumerate(names):
        Image.effect_noise((32, 32), 20 + 30 * i).convert("RGB").save(folder / name)
    return names


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures and a tiny model in the folder that the test runs in."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tiny_pipeline().save_pretrained(tmp_path / "model")
    write_pictures(tmp_path, 4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(pictures: int, frames: int, steps: int, seed: int = 0) -> Recipe:
    names = tuple(f"{i}.png" for i in range(pictures))
    plain = Recipe(names, model="model", device="cpu", seed=seed, frames=frames)
    return gather(plain.changed(steps=steps, lora_steps=2, lora_rank=2))[0]


# ---- sharing, in one process


def helping(desk: Desk, over: threading.Event, fails: bool) -> None:
    """Somebody who takes parts and makes them, or never does."""
    token = 0
    while not over.is_set():
        token += 1
        if (part := desk.take(token)) is None:
            time.sleep(0.001)
            continue
        assert desk.path and desk.config
        desk.bring(token, None if fails else make_part(desk.path, desk.config, part))


@pytest.mark.parametrize("fails", [False, True], ids=["helps", "gives_all_back"])
@pytest.mark.parametrize("loop", [False, True])
def test_frames_of_helpers_are_those_of_one_alone(data: Path, fails: bool, loop: bool) -> None:
    wanted = recipe(3, 23, 2).changed(loop=loop)
    maker = Maker()
    morpher = maker.model.load(wanted)
    alone = morpher.make(wanted)
    desk, over = Desk(ahead=3), threading.Event()
    taken: list[int] = []
    take, desk.take = desk.take, lambda token: (lambda part: taken.append(token) or part if part else part)(take(token))  # type: ignore[method-assign]
    helper = threading.Thread(target=helping, args=(desk, over, fails))
    helper.start()
    try:
        shared = morpher.make(wanted, helpers=desk)
    finally:
        over.set()
        helper.join()
    assert taken, "nobody helped"
    assert [a.tobytes() for a in shared.frames] == [a.tobytes() for a in alone.frames]
    assert shared.alphas == alone.alphas and shared.distances == alone.distances
    assert shared.unet_rows == alone.unet_rows


def test_a_film_that_is_stopped_ends_alone(data: Path) -> None:
    """Not the next one of the same worker, though what is said of the first comes late."""
    maker = Maker()
    for name in ("first", "second"):
        (data / name).mkdir()
        recipe(2, 3, 2).write(data / name / "recipe.toml")
    note = maker._note
    maker._note = lambda *at: (maker.stop("first"), note(*at))  # type: ignore[method-assign]
    assert isinstance(maker.job(data / "first"), Cancelled)
    assert maker.take("first", 1) is None and maker.shared("second") is None
    assert maker.job(data / "second") is None and (data / "second" / "film.mp4").is_file()


# ---- on a real Ray


def workers() -> list[psutil.Process]:
    """The processes of our actors, under whatever Ray started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ray::_Actor" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@contextmanager
def beside(act: Callable[[], bool]) -> Iterator[None]:
    """Call `act` over and over beside the block, until it says that it is done."""
    over = threading.Event()

    def loop() -> None:
        while not over.is_set() and not act():
            time.sleep(0.02)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.slow
def test_a_batch_on_ray_is_that_of_one_machine_though_its_workers_are_killed(data: Path) -> None:
    pytest.importorskip("ray")
    films = [(recipe(2, 5, 20, seed), Path(f"film{seed}.mp4")) for seed in range(4)] + [
        (recipe(4, 40, 20), Path("long.mp4"))
    ]
    killed: list[int] = []

    def kill_now_and_then() -> bool:
        made = len(list(data.glob("*.mp4")))
        if made > len(killed) and len(there := workers()) == 2:
            os.kill(there[made % 2].pid, signal.SIGKILL)
            killed.append(there[made % 2].pid)
        return len(killed) == 3

    with beside(kill_now_and_then):
        made = dict(make_films(films, "local", 2))
    assert len(killed) >= 2
    assert set(made) == {out for _, out in films}
    assert not any(isinstance(result, str) for result in made.values()), made
    assert not list(data.glob(".diffmorpher-*.part"))
    maker = Maker()
    for wanted, out in films:
        result = maker.film(wanted, data / "alone.mp4")
        assert not isinstance(result, str), result
        assert out.read_bytes() == (data / "alone.mp4").read_bytes(), out
        assert made[out].alphas == result.alphas and made[out].unet_rows == result.unet_rows


@pytest.mark.slow
def test_a_batch_is_typed_with_ray_as_without(data: Path) -> None:
    pytest.importorskip("ray")
    torch.manual_seed(1)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(data / "model" / "vae"))
    vae.save_pretrained(data / "another")
    (data / "batch.toml").write_text(
        'model = "model"\nvae = "another"\n'
        '[[film]]\npictures = ["0.png", "1.png"]\nframes = 5\nname = "a"\n'
        '[[film]]\npictures = ["1.png", "2.png", "3.png"]\nframes = 30\nname = "b"\n'
    )
    command = [
        sys.executable,
        "-m",
        "diffmorpher",
        "morph",
        "--from",
        "batch.toml",
        "--steps",
        "2",
        "--lora-steps",
        "2",
    ]
    command += ["--lora-rank", "2", "-o"]
    on_ray = subprocess.run([*command, "ray", "--json", "--jobs", "2", "--ray"], capture_output=True, text=True)
    assert on_ray.returncode == 0, on_ray.stderr
    alone = subprocess.run([*command, "alone", "--json"], capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    for name in ("a.mp4", "b.mp4"):
        assert (data / "ray" / name).read_bytes() == (data / "alone" / name).read_bytes()
    films = {Path(film["output"]).name: film for film in json.loads(on_ray.stdout)["films"]}
    for film in json.loads(alone.stdout)["films"]:
        other = films[Path(film["output"]).name]
        assert {k: v for k, v in film.items() if k not in ("output", "seconds")} == {
            k: v for k, v in other.items() if k not in ("output", "seconds")
        }
    assert read_settings(data / "ray" / "a.mp4")["vae"] == "another"
    again = subprocess.run([*command, "ray", "--ray"], capture_output=True, text=True)
    assert again.returncode == 0 and "0 made, 2 there already" in again.stderr


@pytest.mark.slow
def test_a_cluster_that_asks_for_a_token(data: Path) -> None:
    """`ray start` does where a Ray of one's own left one; whoever gives an address is asked, and told how to answer."""
    pytest.importorskip("ray")
    (data / "batch.toml").write_text(
        'model = "model"\n[[film]]\npictures = ["0.png", "1.png"]\nframes = 3\nname = "a"\n'
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "diffmorpher", "morph", "--from", "batch.toml", "--lora-steps", "1"]
    command += ["--steps", "1", "--ray", f"127.0.0.1:{port}", "-o", "films"]
    known = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "known"}
    silent = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    start = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--num-cpus", "1", "--port", port]
    with (data / "log").open("w") as log:
        cluster = subprocess.Popen([*start, "--include-dashboard", "false"], env=known, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 120
        while "Ray runtime started" not in (data / "log").read_text():
            assert cluster.poll() is None and time.monotonic() < until, (data / "log").read_text()
            time.sleep(0.2)
        made = subprocess.run(command, env=known, capture_output=True, text=True)
        refused = subprocess.run([*command[:-1], "others"], env=silent, capture_output=True, text=True)
    finally:
        cluster.send_signal(signal.SIGTERM)
        cluster.wait(timeout=60)
    assert made.returncode == 0 and (data / "films" / "a.mp4").is_file(), made.stderr
    assert refused.returncode == 2 and "RAY_AUTH_MODE=token" in refused.stderr, refused.stderr
    assert "Traceback" not in refused.stderr
