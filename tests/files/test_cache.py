"""The cache of what took long: found by content, shared by processes, done without where it fails."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from conftest import tiny_pipeline
from diffmorpher import Cancelled, FitConfig, Lora, Morpher, SampleConfig
from diffmorpher.errors import ConfigError
from diffmorpher.files.cache import Cache, cache_folder, cache_limit, default_cache, digest

PICTURES = [Image.effect_noise((32, 32), 50 + 50 * i).convert("RGB") for i in range(2)]
FIT = FitConfig(rank=2, steps=3)
GIGABYTE = 10**9


class Steps:
    """A progress callback that counts, and stops at the n-th word of a stage."""

    def __init__(self, stage: str = "", at: int = 0) -> None:
        self.seen: list[tuple[str, int]] = []
        self._stop = (stage, at)

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.seen.append((stage, done))
        if (stage, self.of(stage)) == self._stop:
            raise Cancelled("enough")

    def of(self, stage: str) -> int:
        return sum(name == stage for name, _ in self.seen)


def film(morpher: Morpher, progress: Any = None, prompts: Any = "a", pictures: Any = None, **more: Any) -> list[bytes]:
    sample = SampleConfig(steps=3, batch_size=2)
    result = morpher(
        pictures or PICTURES, prompts, 5, fit=more.pop("fit", FIT), sample=sample, progress=progress, **more
    )
    return [frame.tobytes() for frame in result.frames]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", GIGABYTE)


def test_what_was_made_is_not_made_again(cache: Cache) -> None:
    plain = film(Morpher(tiny_pipeline()))
    first, second = Steps(), Steps()
    morpher = Morpher(tiny_pipeline(), cache=cache)
    assert film(morpher, first) == plain and first.of("fit") == 3 and first.of("invert") == 3
    rows = morpher.backbone.unet_rows
    again = Morpher(tiny_pipeline(), cache=cache)  # as in another process
    assert film(again, second) == plain
    assert rows > 0 and again.backbone.unet_rows == 0 and second.of("fit") == second.of("invert") == 0


@pytest.mark.parametrize("change", ["prompt", "seed", "steps", "picture", "weights", "order", "third", "style"])
def test_everything_that_matters_is_in_the_key(cache: Cache, change: str) -> None:
    film(Morpher(tiny_pipeline(), cache=cache))
    pipe, more = tiny_pipeline(), dict[str, Any]()
    if change == "prompt":
        more["prompts"] = ["a", "b"]
    elif change == "seed":
        more["seed"] = 1
    elif change == "steps":
        more["fit"] = replace(FIT, steps=4)
    elif change == "picture":
        more["pictures"] = [PICTURES[0], PICTURES[0].rotate(90)]
    elif change == "order":
        more["pictures"] = PICTURES[::-1]
    elif change == "third":
        more["pictures"] = [*PICTURES, PICTURES[0].rotate(90)]
    elif change == "style":
        query = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
        more["styles"] = [Lora({query: torch.ones(1, 64)}, {query: torch.ones(64, 1)}, {})]
    else:  # one layer in the middle of the network, as a fused LoRA changes it
        with torch.no_grad():
            pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight += 0.01
    steps = Steps()
    found = film(Morpher(pipe, cache=cache), steps, **dict(more))
    assert steps.of("fit") >= 3 and found == film(Morpher(pipe), **more)


@pytest.mark.parametrize(("stage", "at", "left"), [("fit", 2, 1), ("invert", 2, 0), ("sample", 4, 0)])
def test_a_run_that_was_stopped_goes_on(tmp_path: Path, stage: str, at: int, left: int) -> None:
    """Half a fit is half a fit less, and the film is that of a run that nobody stopped."""
    cache = Cache(tmp_path, GIGABYTE, save_every=0)
    plain = film(Morpher(tiny_pipeline()))
    with pytest.raises(Cancelled):
        film(Morpher(tiny_pipeline(), cache=cache), Steps(stage, at))
    steps = Steps()
    assert film(Morpher(tiny_pipeline(), cache=cache), steps) == plain
    assert steps.of("fit") == left
    assert not list(cache.root.glob("*.half*")) and not list(cache.root.glob("*.lock"))


def test_low_memory_takes_the_images_one_by_one(tmp_path: Path) -> None:
    cache = Cache(tmp_path, GIGABYTE, save_every=0)
    plain = film(Morpher(tiny_pipeline(), low_memory=True))
    with pytest.raises(Cancelled):
        film(Morpher(tiny_pipeline(), low_memory=True, cache=cache), Steps("fit", 5))
    steps = Steps()
    assert film(Morpher(tiny_pipeline(), low_memory=True, cache=cache), steps) == plain
    assert steps.of("fit") == 1  # of six


def test_what_is_damaged_is_made_anew(cache: Cache) -> None:
    plain = film(Morpher(tiny_pipeline(), cache=cache))
    for i, (file, size, _) in enumerate(cache.entries()):
        data = bytearray(file.read_bytes())
        if i % 2:
            data[-1] ^= 1  # one bit of a tensor
        file.write_bytes(data if i % 2 else data[: size // 2])
    steps = Steps()
    assert film(Morpher(tiny_pipeline(), cache=cache), steps) == plain and steps.of("fit") == 3
    assert film(Morpher(tiny_pipeline(), cache=cache), steps) == plain and steps.of("fit") == 3


def test_what_was_not_used_for_longest_goes(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit=5_000)
    for i in range(4):
        cache.save(f"{i}", {"x": torch.zeros(250)})  # 1 kB, and a header
        os.utime(cache.root / f"{i}.safetensors", (i, i))
    assert cache.load("0") is not None  # which makes it the latest
    cache.save("4", {"x": torch.zeros(750)})
    assert cache.load("0") is not None and cache.load("4") is not None and cache.load("1") is None
    assert sum(size for _, size, _ in cache.entries()) <= 5_000


@pytest.mark.parametrize("place", ["a file", "/proc/cache", "full"])
def test_a_place_that_cannot_be_written_is_done_without(tmp_path: Path, place: str) -> None:
    (tmp_path / "a file").write_text("no folder")
    expected = film(Morpher(tiny_pipeline()))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if place == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limit[1]))
    try:
        with pytest.warns(UserWarning, match="the cache in .* is not used"):
            assert film(Morpher(tiny_pipeline(), cache=Cache(tmp_path / place, GIGABYTE))) == expected
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".safetensors", ".part")]


# ---- real processes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures and a model."""
    folder = tmp_path_factory.mktemp("place")
    tiny_pipeline().save_pretrained(folder / "model")
    for i, picture in enumerate(PICTURES):
        picture.save(folder / f"{i}.png")
    return folder


class Runs:
    """The same `morph` again and again, with one cache."""

    def __init__(self, place: Path, cache: Path, *settings: str) -> None:
        self.place, self.cache = place, cache
        self.settings = settings or ("--lora-steps", "60", "--steps", "20", "--frames", "9")
        self.environment = os.environ | {"DIFFMORPHER_CACHE": str(cache), "DIFFMORPHER_CACHE_GB": "1"}

    def start(self, out: Path, *more: str) -> subprocess.Popen[str]:
        pictures = [str(self.place / f"{i}.png") for i in range(2)]
        command = [
            sys.executable,
            "-m",
            "diffmorpher",
            "morph",
            *pictures,
            "--model",
            str(self.place / "model"),
            "--json",
        ]
        command += ["--device", "cpu", "--size", "32x32", "-p", "a", *self.settings, "-o", str(out), *more]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def made(self, out: Path, *more: str) -> bytes:
        process = self.start(out, *more)
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
        return out.read_bytes()

    def left(self) -> list[str]:
        """Names in the cache that are not an entry."""
        return [file.name for file in self.cache.rglob("*") if file.is_file() and file.suffix != ".safetensors"]


def killed_and_whole(place: Path, tmp_path: Path, kills: int, how: Sequence[signal.Signals], *settings: str) -> None:
    """A run that is killed again and again comes to the film of one that nobody disturbed, and leaves nothing behind."""
    runs, draw = Runs(place, tmp_path / "cache", *settings), random.Random(0)
    started = time.monotonic()
    film = runs.made(tmp_path / "undisturbed.mp4", "--no-cache")
    whole = time.monotonic() - started
    assert not (tmp_path / "cache").exists()
    out = tmp_path / "out" / "film.mp4"
    out.parent.mkdir()
    died = 0
    for i in range(kills):
        process = runs.start(out)
        try:
            process.wait(timeout=draw.uniform(0.3, 1) * whole)
        except subprocess.TimeoutExpired:
            process.send_signal(how[i % len(how)])
            died += 1
        process.communicate(timeout=60)
        assert not out.exists() or out.read_bytes() == film
        if out.exists():  # it had come to its end: from nothing again
            out.unlink()
            for file in (tmp_path / "cache").rglob("*.safetensors"):
                file.unlink()
    assert died >= kills / 2
    assert runs.made(out) == film
    assert [file.name for file in out.parent.iterdir()] == ["film.mp4"] and runs.left() == []


def test_killed_and_begun_again(place: Path, tmp_path: Path) -> None:
    killed_and_whole(place, tmp_path, 2, (signal.SIGKILL, signal.SIGTERM))


@pytest.mark.slow
@pytest.mark.timeout(3600)  # five minutes, on machines that may be busy
def test_killed_at_fifty_moments(place: Path, tmp_path: Path) -> None:
    settings = ("--lora-steps", "300", "--steps", "50", "--frames", "17")
    killed_and_whole(place, tmp_path, 50, (signal.SIGKILL, signal.SIGTERM, signal.SIGINT), *settings)


def one_fit_for_all(place: Path, tmp_path: Path, count: int) -> None:
    runs = Runs(place, tmp_path / "cache")
    outs = [tmp_path / f"{i}.mp4" for i in range(count)]
    processes = [runs.start(out) for out in outs]
    rows = []
    for process in processes:
        figures, said = process.communicate(timeout=600)
        assert process.returncode == 0, said
        rows.append(json.loads(figures)["unet_rows"])
    fitted = [n >= 3 * 60 * 2 for n in rows]  # a row that is trained on counts three
    assert fitted.count(True) == 1, rows
    assert len({out.read_bytes() for out in outs}) == 1 and runs.left() == []


def test_two_processes_want_the_same(place: Path, tmp_path: Path) -> None:
    one_fit_for_all(place, tmp_path, 2)


@pytest.mark.slow
def test_eight_processes_want_the_same(place: Path, tmp_path: Path) -> None:
    one_fit_for_all(place, tmp_path, 8)


# ---- parts


def test_a_digest_tells_apart_what_is_alike() -> None:
    x = torch.arange(4.0)
    different = [
        (x,), (x.reshape(2, 2),), (x.double(),), (x, x), ([x, x],), ({"x": x},), ({"y": x},), ("1",), (1,), (1.0,),
        (None,), ([],), ({},), ("a", "b"), ("ab",), (["a", "b"],), ([["a"], "b"],), (True,),
    ]  # fmt: skip
    assert len({digest(*parts) for parts in different}) == len(different)
    assert digest(x[::2]) == digest(x[::2].clone()) and digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


def test_a_limit_that_is_no_size_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFMORPHER_CACHE_GB", "2.5")
    assert cache_limit() == 2_500_000_000
    for wrong in ("much", "-1", "nan"):
        monkeypatch.setenv("DIFFMORPHER_CACHE_GB", wrong)
        with pytest.raises(ConfigError, match="DIFFMORPHER_CACHE_GB"):
            cache_limit()


def test_the_folder_is_one_on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DIFFMORPHER_CACHE", "~/kept")  # as a shell leaves it between quotes
    assert cache_folder() == tmp_path / "kept"
    monkeypatch.setenv("DIFFMORPHER_CACHE_GB", "1")
    monkeypatch.setenv("DIFFMORPHER_CACHE", "s3://bucket/kept")
    with pytest.raises(ConfigError, match="DIFFMORPHER_CACHE is 's3://bucket/kept', an address"):
        default_cache()
