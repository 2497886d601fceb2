"""Films as they are made: insertion, exact ends, and what they cost in U-Net rows and in memory."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from conftest import tiny_pipeline
from diffmorpher import FitConfig, Morpher, MorphPath, SampleConfig, ScheduleConfig
from diffmorpher.config import ScheduleMethod
from diffmorpher.errors import Cancelled, ConfigError
from diffmorpher.files.films import save_film
from diffmorpher.method.schedule import (
    SCHEDULES,
    Film,
    Plan,
    gaps_of_rounds,
    insert_positions,
    most_even,
    uniform_positions,
)
from diffmorpher.models.catalog import CATALOG
from diffmorpher.stream import FrameStream, Measure

PICTURES = [Image.effect_noise((32, 32), s).convert("RGB") for s in (20, 60, 90)]
STEPS = 4


@pytest.fixture(scope="module")
def morpher() -> Morpher:
    return Morpher(tiny_pipeline())


@pytest.fixture(scope="module")
def path(morpher: Morpher) -> MorphPath:
    return morpher.prepare(PICTURES, fit=FitConfig(rank=2, steps=3, learning_rate=1e-2), steps=STEPS)


# ---- where frames are inserted


def test_frames_go_one_by_one_where_the_parts_are_longest() -> None:
    # 8 | 3 | 1: the first splits the 8 into fours, the second a 4-part gap into thirds (2.67), the third the 3 (1.5).
    assert insert_positions([0, 1, 2, 3], [8, 3, 1], 1) == [0.5]
    assert insert_positions([0, 1, 2, 3], [8, 3, 1], 2) == pytest.approx([1 / 3, 2 / 3])
    assert insert_positions([0, 1, 2, 3], [8, 3, 1], 3) == pytest.approx([1 / 3, 2 / 3, 1.5])
    assert insert_positions([0, 1], [0.0], 3) == [0.25, 0.5, 0.75]  # nothing changes: evenly
    assert insert_positions([0, 1, 2], [1, 1], 0) == []


def test_rounds_grow_evenly() -> None:
    assert gaps_of_rounds(15, 1, rounds=3) == [5, 10, 15]
    assert gaps_of_rounds(17, 1, rounds=2) == [9, 17]
    assert gaps_of_rounds(15, 1, rounds=1) == [15]
    assert gaps_of_rounds(7, 6, rounds=3) == [6, 7]  # each image is a frame
    assert gaps_of_rounds(2, 1, rounds=3) == [1, 2]


@given(
    st.lists(st.floats(0, 10), min_size=3, max_size=9),
    st.integers(0, 3),
    st.sets(st.integers(1, 8), max_size=3),
)
def test_the_most_even_are_kept(heights: list[float], spare: int, stops: set[int]) -> None:
    """Against all ways to leave so many out."""
    last = len(heights) - 1
    stops = {i for i in stops if i < last}
    spare = min(spare, last - 1 - len(stops))
    if spare < 0:
        return

    def gap(i: int, j: int) -> float:
        return abs(heights[j] - heights[i]) + 0.1 * (j - i) ** 2  # as LPIPS, no metric

    near = [[gap(i, j) for j in range(i + 1, min(last, i + 1 + spare) + 1)] for i in range(last)]
    kept = most_even(near, last - spare, stops)
    assert len(kept) == last + 1 - spare and kept[0] == 0 and kept[-1] == last and stops <= set(kept)

    def cost(nodes: Sequence[int]) -> float:
        return sum(gap(i, j) ** 2 for i, j in pairwise(nodes))

    inner = [i for i in range(1, last) if i not in stops]
    ways = [sorted({*range(last + 1)} - set(left)) for left in combinations(inner, spare)]
    assert cost(kept) == pytest.approx(min(map(cost, ways)))


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("most", [4, 60])
def test_an_inserted_film_is_that_of_its_positions(morpher: Morpher, path: MorphPath, loop: bool, most: int) -> None:
    """Whatever was made in which round: the frames are in order, every image is there, the distances are the frames'."""
    from dataclasses import replace

    round_trip = replace(path, loop=loop)
    sample = SampleConfig(steps=STEPS)
    before = morpher.backbone.unet_rows
    result = morpher.film(round_trip, 17, sample, ScheduleConfig(most=most))
    if most == 60:  # two more than asked for are made, and left out
        assert morpher.backbone.unet_rows - before >= (17 + 2) * STEPS
    assert len(result.alphas) == len(result.frames) == 17 and all(a < b for a, b in pairwise(result.alphas))
    assert {0.0, 1.0, 2.0} <= set(result.alphas) and max(result.alphas) < (3 if loop else 2.1)
    plain = round_trip.sample(result.alphas, sample)
    for ours, expected in zip(result.frames, plain, strict=True):
        assert np.abs(np.asarray(ours).astype(int) - np.asarray(expected)).max() <= 1
    closed = [*result.frames, result.frames[0]] if loop else result.frames
    from diffmorpher.method.perceptual import perceptual_distance
    from diffmorpher.path import to_pixels

    assert result.distances == pytest.approx(perceptual_distance().consecutive(to_pixels(closed)).tolist(), abs=1e-6)


def test_a_jump_gets_its_frames(morpher: Morpher, path: MorphPath, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all change lies in one place, rounds close in on it, which two passes cannot: they saw one wide gap."""
    jump, width = 0.4, 1e-3

    def distance(self: Measure | None, p: float, q: float, a: Any, b: Any) -> float:
        def height(x: float) -> float:
            return float(np.clip((x - jump) / width, 0, 1)) + 0.1 * x

        return height(q) - height(p)

    monkeypatch.setattr(Measure, "between", distance)
    widest = {}
    for method in ("two-pass", "insert"):
        schedule = ScheduleConfig(method=method, rounds=8)  # type: ignore[arg-type]
        stream = FrameStream(path, 32, SampleConfig(steps=1), schedule)
        positions = stream.plan()
        widest[method] = max(distance(None, p, q, None, None) for p, q in pairwise(positions))
    assert widest["insert"] < 0.7 * widest["two-pass"]


def test_a_way_to_space_frames_is_added_by_writing_and_naming_it(
    morpher: Morpher, path: MorphPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames that dwell on the first image; one of them is made for the choice, and not again."""
    asked: list[list[list[float]]] = []

    def squares(film: Film, schedule: ScheduleConfig) -> Plan:
        end = film.num_images - 1
        positions = [p * p / end for p in uniform_positions(film.num_frames, film.num_images)]
        film.make(positions[:1])
        asked.append(film.distances(positions[:4], reach=2))
        return Plan(positions)

    monkeypatch.setitem(SCHEDULES, "squares", squares)
    schedule, sample = ScheduleConfig(), SampleConfig(steps=STEPS)
    object.__setattr__(schedule, "method", "squares")  # as if `ScheduleMethod` named it
    seen: list[tuple[str, int, int]] = []
    result = morpher.film(path, 9, sample, schedule, lambda *at: seen.append(at))
    assert result.alphas == [p * p / 2 for p in np.linspace(0, 2, 9)] and len(result.frames) == 9
    (near,) = asked
    assert [len(row) for row in near] == [2, 2, 1] and [row[0] for row in near] == result.distances[:3]
    assert result.distances_before == [] and all(result.seconds[stage] > 0 for stage in ("schedule", "sample"))
    for stage, frames in (("schedule", 3), ("sample", 9)):
        assert [at[1:] for at in seen if at[0] == stage][-1] == (frames * STEPS, frames * STEPS)


def test_every_way_that_can_be_named_is_there() -> None:
    assert set(SCHEDULES) == {"uniform", *get_args(ScheduleMethod)}


@pytest.mark.parametrize("bad", [{"method": "best"}, {"rounds": 0}, {"spare": -1}, {"most": 1.5}])
def test_a_bad_schedule_is_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ScheduleConfig(**bad)


@pytest.mark.parametrize("frames", [5, 17, 40])
def test_progress_ends_at_its_total(path: MorphPath, frames: int) -> None:
    seen: list[tuple[str, int, int]] = []
    schedule = ScheduleConfig(most=20)
    path_film = FrameStream(path, frames, SampleConfig(steps=STEPS), schedule, lambda *at: seen.append(at))
    assert len(list(path_film)) == frames
    assert all(0 < done <= total for _, done, total in seen) and seen[-1][1] == seen[-1][2]
    done = [at[1] for at in seen]
    assert done == sorted(done)


# ---- exact ends


@pytest.mark.parametrize("settings", [{}, {"attention_mode": "kv"}, {"guidance_scale": 2.0}, {"adain": False}])
def test_exact_ends_lead_through_the_images_themselves(path: MorphPath, settings: dict[str, Any]) -> None:
    exact = path.sample([0, 1, 2], SampleConfig(steps=STEPS, exact_ends=True, **settings), output="latent")
    assert torch.allclose(exact, path.latents, atol=1e-6)
    plain = path.sample([0, 1, 2], SampleConfig(steps=STEPS, **settings), output="latent")
    assert (plain - path.latents).abs().max() > 1e-3  # what there was to give back
    near = path.sample([1e-6, 2 - 1e-6], SampleConfig(steps=STEPS, exact_ends=True, **settings), output="latent")
    assert torch.allclose(near, path.latents[[0, 2]], atol=1e-3)  # no jump from the ends to the frames beside them


def test_exact_ends_do_not_depend_on_the_batch(path: MorphPath) -> None:
    positions = [0.0, 0.2, 0.7, 1.0, 1.3, 1.9]
    whole, single = (
        path.sample(positions, SampleConfig(steps=STEPS, exact_ends=True, batch_size=size), output="latent")
        for size in (64, 1)
    )
    assert torch.allclose(whole, single, atol=1e-4)


# ---- costs


@contextmanager
def watching(morpher: Morpher, see: Any) -> Iterator[None]:
    handle = morpher.backbone.network.register_forward_hook(lambda module, args, output: see(args[0]))
    try:
        yield
    finally:
        handle.remove()


def test_rows_at_the_papers_settings_are_2300_and_at_the_bundled_models_under_1000() -> None:
    for spec, most in ((CATALOG["sd21-base"], 2300), (CATALOG["mini"], 1000)):
        morpher, seen = Morpher(tiny_pipeline(), spec=spec), [0]

        def count(z: torch.Tensor, seen: list[int] = seen) -> None:
            seen[0] += len(z) * (3 if torch.is_grad_enabled() else 1)

        with watching(morpher, count):
            result = morpher(PICTURES[:2], size=(32, 32))
        assert len(result.frames) == 16 and result.unet_rows == seen[0] <= most


def test_frames_are_the_same_for_every_batch_size(morpher: Morpher, path: MorphPath) -> None:
    films = [
        morpher.film(path, 11, SampleConfig(steps=STEPS, batch_size=size), ScheduleConfig(most=5))
        for size in (1, 4, 64)
    ]
    for film in films[1:]:
        assert film.alphas == pytest.approx(films[0].alphas, abs=1e-3)
        for a, b in zip(film.frames, films[0].frames, strict=True):
            assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 3


def test_no_weight_is_touched_between_frames(morpher: Morpher, path: MorphPath) -> None:
    def state() -> list[tuple[int, int]]:
        return [(p.data_ptr(), p._version) for p in morpher.backbone.network.parameters()]

    before, seen = state(), []
    with watching(morpher, lambda z: seen.append(state() == before)):
        morpher.film(path, 7, SampleConfig(steps=2, batch_size=2))
    assert len(seen) > 6 and all(seen) and state() == before


def test_live_latents_and_batches_do_not_grow_with_the_film(morpher: Morpher, path: MorphPath) -> None:
    peak: dict[int, int] = {}
    rows: dict[int, int] = {}
    for frames in (30, 120):
        peak[frames] = rows[frames] = 0

        def look(z: torch.Tensor, frames: int = frames) -> None:
            alive = {
                t.untyped_storage().data_ptr(): t.numel()
                for t in gc.get_objects()
                if isinstance(t, torch.Tensor) and t.shape[1:] == z.shape[1:]
            }
            peak[frames] = max(peak[frames], sum(alive.values()) // z[0].numel())
            rows[frames] = max(rows[frames], len(z))

        with watching(morpher, look):
            morpher.film(path, frames, SampleConfig(steps=1, batch_size=4), ScheduleConfig(most=8))
    assert max(rows.values()) <= 4 + 3  # a batch can touch three images
    assert peak[120] <= peak[30] + 4


def test_a_stream_gives_its_frames_one_by_one(morpher: Morpher, path: MorphPath) -> None:
    """The first frame of a long film is there before the last is sampled."""
    schedule = ScheduleConfig(most=6)
    stream = FrameStream(path, 60, SampleConfig(steps=1, batch_size=4), schedule)
    positions = stream.plan()
    before = morpher.backbone.unet_rows
    frames = iter(stream)
    assert next(frames).size == (32, 32) and morpher.backbone.unet_rows - before <= 4 + 3
    assert len(list(frames)) == 59 and len(positions) == 60 and len(stream.distances) == 59
    assert morpher.backbone.unet_rows - before >= 60 - 7


def test_a_film_is_written_as_it_is_made(morpher: Morpher, path: MorphPath, tmp_path: Path) -> None:
    """With `write` the frames go to the file one by one and the result holds none; the film is the same to the byte."""
    sample, schedule, out = SampleConfig(steps=1, batch_size=4), ScheduleConfig(most=6), tmp_path / "a.mp4"
    rows: list[int] = []

    def write(frames: Iterable[Image.Image], settings: dict[str, Any]) -> None:
        def watched() -> Iterator[Image.Image]:
            for frame in frames:
                rows.append(morpher.backbone.unet_rows)
                yield frame

        save_film(watched(), out, metadata=settings | {"fps": 8, "ping_pong": False})

    streamed = morpher.film(path, 40, sample, schedule, write=write)
    assert streamed.frames == [] and len(streamed.alphas) == 40 and len(streamed.distances) == 39
    assert rows[0] < rows[20] < rows[39]  # the first was written before the last was sampled
    kept = morpher.film(path, 40, sample, schedule)
    kept.save(tmp_path / "b.mp4")
    assert out.read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize("name", ["a.mp4", "frames"])
def test_a_film_that_fails_while_it_is_written_leaves_the_old_one(
    morpher: Morpher, path: MorphPath, tmp_path: Path, name: str
) -> None:
    save_film([Image.new("RGB", (8, 8))], tmp_path / name)
    before = sorted((f, f.read_bytes()) for f in tmp_path.rglob("*") if f.is_file())

    def stop(stage: str, done: int, total: int) -> None:
        if done > total / 2:
            raise Cancelled("stopped")

    def write(frames: Iterable[Image.Image], settings: dict[str, Any]) -> None:
        save_film(frames, tmp_path / name)

    with pytest.raises(Cancelled):
        morpher.film(path, 40, SampleConfig(steps=1, batch_size=4), ScheduleConfig(most=6), stop, write)
    assert sorted((f, f.read_bytes()) for f in tmp_path.rglob("*") if f.is_file()) == before
