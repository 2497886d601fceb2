"""Data sets, figures of merit, intervals and the methods of the benchmark."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy import linalg, stats
from torch.testing import assert_close

from conftest import tiny_pipeline
from diffmorpher import FitConfig, Morpher
from diffmorpher.errors import ConfigError, DataError
from diffmorpher.evaluation import methods
from diffmorpher.evaluation.datasets import load_dataset
from diffmorpher.evaluation.inception import Inception, load_inception
from diffmorpher.evaluation.methods import METHODS, Effort, resolve_methods, run_method
from diffmorpher.evaluation.metrics import (
    figures,
    frechet_distance,
    frechet_of_films,
    perceptual_features,
    psnr,
)
from diffmorpher.evaluation.statistics import binomial_interval, bootstrap, paired_difference
from diffmorpher.evaluation.warp import dissolve, warp
from diffmorpher.method.perceptual import perceptual_distance


def picture(file: Path, colour: str = "red") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), colour).save(file)
    return file


# ---- data sets


def test_mini_is_bundled_and_held_out() -> None:
    dataset = load_dataset("mini")
    assert len(dataset.pairs) == 24 and dataset.has_prompts
    assert [sum(p.category == c for p in dataset.pairs) for c in dict.fromkeys(p.category for p in dataset.pairs)] == [
        4
    ] * 6
    listed = (Path(__file__).parents[2] / "training" / "held_out.txt").read_text().splitlines()
    for pair in dataset.pairs:
        assert all(file.stem.replace("-", " ") in listed for file in pair.images)
        assert all(prompt.partition(" ")[2] in listed for prompt in pair.prompts)
    assert [pair.category for pair in dataset.take(6)] == ["animals", "faces", "food", "vehicles", "nature", "unlike"]
    assert dataset.take(7)[1].category == "animals" and len(dataset.take(1000)) == 24


def test_morphbench_as_published(tmp_path: Path) -> None:
    for folder, name in (("Metamorphosis", "mars"), ("Metamorphosis", "cat"), ("Animation", "cat")):
        picture(tmp_path / folder / f"{name}_0.png")
        picture(tmp_path / folder / f"{name}_1.jpg", "blue")
    (tmp_path / "Metamorphosis" / "notes.txt").write_text("nothing")
    dataset = load_dataset(str(tmp_path))
    assert [(p.name, p.category) for p in dataset.pairs] == [
        ("Animation-cat", "Animation"),
        ("Metamorphosis-cat", "Metamorphosis"),
        ("Metamorphosis-mars", "Metamorphosis"),
    ]
    assert not dataset.has_prompts
    assert [file.name for file in dataset.pairs[0].images] == ["cat_0.png", "cat_1.jpg"]

    (tmp_path / "prompts.csv").write_text('mars,"a planet, red",a ball\nAnimation/cat,one cat,another\n')
    pairs = {pair.name: pair.prompts for pair in load_dataset(str(tmp_path)).pairs}
    assert pairs["Metamorphosis-mars"] == ("a planet, red", "a ball")
    assert pairs["Animation-cat"] == ("one cat", "another") and pairs["Metamorphosis-cat"] == ("", "")
    (tmp_path / "Metamorphosis" / "prompts.json").write_text(json.dumps({"cat": ["x", "y"]}))
    assert load_dataset(str(tmp_path)).pairs[1].prompts == ("x", "y")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_manifests(tmp_path: Path, suffix: str) -> None:
    for name in "abc":
        picture(tmp_path / "pictures" / f"{name}.png")
    rows = [
        {
            "image_0": "pictures/a.png",
            "image_1": "pictures/b.png",
            "image_2": "pictures/c.png",
            "prompt_1": "b",
            "name": "x",
        },
        {"image_0": "pictures/b.png", "image_1": "pictures/a.png", "category": "odd"},
    ]
    file = tmp_path / f"set{suffix}"
    if suffix == ".csv":
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, ["image_0", "image_1", "image_2", "prompt_1", "name", "category"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    dataset = load_dataset(str(file))
    first, second = dataset.pairs
    assert dataset.name == "set" and len(first.images) == 3 and first.prompts == ("", "b", "")
    assert (second.name, second.category, first.category) == ("b-a", "odd", "all")


def test_a_pairs_key_is_its_content(tmp_path: Path) -> None:
    for folder, colour in (("one", "red"), ("two", "red"), ("three", "blue")):
        picture(tmp_path / folder / "a_0.png", colour)
        picture(tmp_path / folder / "a_1.png", "green")
    keys = [load_dataset(str(tmp_path / folder)).pairs[0].key for folder in ("one", "two", "three")]
    assert keys[0] == keys[1] != keys[2]
    (tmp_path / "two" / "prompts.csv").write_text("a,x,y\n")
    assert load_dataset(str(tmp_path / "two")).pairs[0].key != keys[0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no pairs"),
        ({"a_0.png": "picture"}, "has no partner: a_1"),
        ({"a_0.png": "picture", "a_0.jpg": "picture"}, "two pictures called 'a_0'"),
        ({"pairs.csv": "image_0,image_1\nx.png,y.png\n"}, "does not exist"),
        ({"pairs.csv": "image_0\nx.png\n"}, "needs at least image_0 and image_1"),
        ({"pairs.csv": "image_0,image_1,label\nx.png,y.png,z\n"}, "has the column 'label'"),
        ({"pairs.jsonl": "{broken"}, "cannot be read"),
        ({"pairs.jsonl": "[1, 2]"}, "is not a table of texts"),
        ({"a_0.png": "picture", "a_1.png": "picture", "prompts.json": '{"a": ["x"]}'}, "a name and two prompts"),
        ({"a.png": "picture", "pairs.csv": "image_0,image_1,name\na.png,a.png,../x\n"}, "as it becomes a folder"),
        ({"a.png": "picture", "pairs.csv": "image_0,image_1\na.png,a.png\na.png,a.png\n"}, "two pairs called 'a-a'"),
    ],
)
def test_what_is_wrong_with_a_data_set_is_said(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        if content == "picture":
            picture(tmp_path / name)
        else:
            (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_dataset(str(tmp_path))


def test_an_unknown_data_set_is_said() -> None:
    with pytest.raises(DataError, match=r"'minni' is not known: give 'mini', a folder of pairs"):
        load_dataset("minni")


# ---- figures


class Ruler(torch.nn.Module):
    """A distance that can be worked out by hand: the absolute difference of the pictures' means, squared if asked."""

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        self.power = power

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.mean((1, 2, 3)) - b.mean((1, 2, 3))).abs() ** self.power

    def consecutive(self, images: torch.Tensor) -> torch.Tensor:
        return self(images[:-1], images[1:])


def grey(*levels: float) -> torch.Tensor:
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


def test_figures_by_hand() -> None:
    made: dict[str, Any] = figures(grey(0.0, 0.1, 0.4, 0.6), grey(0.0, 0.8), Ruler())  # type: ignore[arg-type]
    assert made["distances"] == pytest.approx([0.1, 0.3, 0.2])
    assert made["ppl"] == pytest.approx(0.6)
    assert made["pdv"] == pytest.approx((0.01 + 0.01 + 0) / 3)
    assert made["directness"] == pytest.approx(1.0) and made["roughness"] == pytest.approx(0.0, abs=1e-5)
    assert made["ghost"] == pytest.approx(1), "between grey and grey lies grey"
    assert (made["end_distance_0"], made["end_distance_1"]) == pytest.approx((0.0, 0.2))
    assert made["end_distance"] == pytest.approx(0.1)
    assert (made["end_psnr_0"], made["end_psnr_1"]) == pytest.approx((100.0, 10 * math.log10(4 / 0.04)), rel=1e-5)

    # There and back: 0 to 0.2 and back to 0.1 is 0.3 long, 0.1 apart; the deficit is (0.2 + 0.1 - 0.1) / 0.1.
    made = figures(grey(0.0, 0.2, 0.1), grey(0.0, 0.1), Ruler())  # type: ignore[arg-type]
    assert made["directness"] == pytest.approx(3.0) and made["roughness"] == pytest.approx(2.0)
    # With squared distances halves are shorter than the whole: directness falls below 1, the deficit below 0.
    made = figures(grey(0.0, 0.1, 0.2), grey(0.0, 0.2), Ruler(2))  # type: ignore[arg-type]
    assert made["directness"] == pytest.approx(0.5) and made["roughness"] == pytest.approx(-0.5)


def test_a_film_that_stands_still_has_finite_figures() -> None:
    still = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).expand(5, -1, -1, -1) * 2 - 1
    made = figures(still, still[:2], perceptual_distance())
    assert (
        made["ppl"] == made["pdv"] == made["directness"] == made["roughness"] == made["ghost"] == 0
        and made["end_psnr"] == 100
    )
    assert json.loads(json.dumps(made, allow_nan=False)) == made


def test_psnr() -> None:
    assert psnr(grey(0.5), grey(0.3)) == pytest.approx(20.0, rel=1e-5)
    assert psnr(grey(0.5), grey(0.5)) == 100


def test_frechet_distance_against_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 5, generator=generator) @ torch.randn(5, 5, generator=generator) + n / 50 for n in (40, 60))
    c_a, c_b = np.cov(a.double().numpy().T), np.cov(b.double().numpy().T)
    root = linalg.sqrtm(c_a @ c_b).real
    expected = float((a.double().mean(0) - b.double().mean(0)).square().sum()) + np.trace(c_a + c_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)
    # Along one axis: the difference of the means and that of the spreads, both squared.
    one = torch.tensor([[0.0], [2.0]])
    assert frechet_distance(one, 3 * one + 1) == pytest.approx((4 - 1) ** 2 + (2**0.5 * (3 - 1)) ** 2)
    # Fewer samples than dimensions: singular covariances, which a matrix root makes complex.
    few = torch.randn(4, 50, generator=generator)
    assert 0 <= frechet_distance(few, few + 1) == pytest.approx(50.0, rel=1e-6)


def test_frechet_of_films_takes_two_frames_of_each() -> None:
    films = [torch.full((9, 3), float(i)) for i in range(4)]
    inputs = torch.cat([film[:2] for film in films])
    assert frechet_of_films(inputs, films) == pytest.approx(0.0, abs=1e-9)
    varied = [torch.arange(27.0).view(9, 3) + 10 * i for i in range(4)]
    assert frechet_of_films(inputs, varied, seed=1) == frechet_of_films(inputs, varied, seed=1)
    assert frechet_of_films(inputs, varied, seed=1) != frechet_of_films(inputs, varied, seed=2)


def test_perceptual_features() -> None:
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = perceptual_features(images, perceptual_distance())
    assert features.shape == (3, 64 + 192 + 384 + 256 + 256)
    assert_close(perceptual_features(images[1:2], perceptual_distance()), features[1:2])


# ---- intervals


def test_bootstrap_intervals() -> None:
    data = np.random.default_rng(1).normal(3, 2, 200)
    mean, low, high = bootstrap(data.tolist())
    spread = 1.96 * data.std() / 200**0.5  # what theory says for so many
    assert mean == pytest.approx(data.mean())
    assert (low, high) == pytest.approx((mean - spread, mean + spread), abs=0.05)
    assert bootstrap([5.0]) == (5.0, 5.0, 5.0)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap([])
    # Pair by pair: what all pairs share falls out.
    a = data.tolist()
    assert paired_difference(a, [x + 0.1 for x in a]) == pytest.approx((0.1, 0.1, 0.1))


def test_binomial_interval() -> None:
    for wins, votes in ((0, 10), (3, 10), (10, 10), (55, 100)):
        expected = stats.binomtest(wins, votes).proportion_ci(0.95, "wilson")
        assert binomial_interval(wins, votes) == pytest.approx((expected.low, expected.high), abs=1e-9)
    with pytest.raises(ValueError, match="3 of 2 votes"):
        binomial_interval(3, 2)


# ---- methods


@pytest.fixture(scope="module")
def tiny() -> Morpher:
    return Morpher(tiny_pipeline())


@pytest.fixture
def pictures() -> list[Image.Image]:
    return [Image.effect_noise((40, 32), 90).convert("RGB"), Image.radial_gradient("L").convert("RGB")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFMORPHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DIFFMORPHER_CACHE_GB", "1")
    methods.clear_paths()


EFFORT = Effort(steps=3, fit=FitConfig(rank=2, steps=2))


def test_every_method_gives_a_film(tiny: Morpher, pictures: list[Image.Image]) -> None:
    for name in METHODS:
        made = run_method(name, tiny, pictures, ["a", "b"], 5, 0, EFFORT)
        assert made.pixels.shape == (5, 3, 32, 32) and made.pixels.dtype == torch.float32
        assert made.alphas[0] == 0 and made.alphas[-1] == 1 and made.alphas == sorted(made.alphas)
        eight_bits = (made.pixels + 1) * 127.5
        assert_close(eight_bits, eight_bits.round(), rtol=0, atol=1e-3)
        assert not made.pixels.isnan().any()


def test_rows_count_the_fit_also_where_another_method_made_it(tiny: Morpher, pictures: list[Image.Image]) -> None:
    frames, steps, fit = 5, 3, 3 * 2  # a trained row counts three
    for _ in range(2):
        rows = {
            n: run_method(n, tiny, pictures, ["a", "b"], frames, 0, EFFORT).unet_rows
            for n in ("ddim", "lora", "diffmorpher")
        }
        assert rows["ddim"] == 2 * steps + frames * steps
        assert rows["lora"] == rows["ddim"] + 2 * fit
        assert rows["diffmorpher"] == rows["lora"] + frames * steps
    assert run_method("dissolve", tiny, pictures, ["a", "b"], frames).unet_rows == 0


def test_the_same_seed_gives_the_same_film_from_the_cache_too(tiny: Morpher, pictures: list[Image.Image]) -> None:
    first = run_method("diffmorpher", tiny, pictures, ["a", "b"], 4, 3, EFFORT)
    methods.clear_paths()
    again = run_method("diffmorpher", tiny, pictures, ["a", "b"], 4, 3, EFFORT)
    assert_close(first.pixels, again.pixels, rtol=0, atol=0)
    other = run_method("diffmorpher", tiny, pictures, ["a", "b"], 4, 4, EFFORT)
    assert not torch.equal(first.pixels, other.pixels)


def test_dissolve_is_the_mean_in_the_middle() -> None:
    images = torch.stack([torch.full((3, 4, 4), -1.0), torch.full((3, 4, 4), 0.5)])
    assert_close(dissolve(images, [0.0, 0.5, 1.0])[:, 0, 0, 0], torch.tensor([-1.0, -0.25, 0.5]))


def test_warp_moves_where_dissolve_fades() -> None:
    """A dark square that has moved: half-way the warp shows one dark square in the middle, the dissolve two grey ones."""
    x = torch.arange(64.0)

    def square(left: int) -> torch.Tensor:
        texture = ((x[:, None] // 4 + x[None] // 4) % 2) * 0.4 + 0.6
        image = texture.expand(3, 64, 64).clone()
        image[:, 22:42, left : left + 20] = -0.9
        return image

    images = torch.stack([square(18), square(26)])
    middle = square(22)
    errors = [(blend(images, [0.5])[0] - middle)[:, 20:44, 14:50].abs().mean().item() for blend in (warp, dissolve)]
    assert errors[0] < 0.6 * errors[1]
    for end in (0, 1):
        assert_close(warp(images, [float(end)])[0], images[end], rtol=0, atol=0.01)


def test_names_and_presets() -> None:
    assert resolve_methods("dissolve, ablation,dissolve")[:2] == ["dissolve", "ddim"]
    assert len(resolve_methods("ablation")) == 5 and len(resolve_methods("lambda")) == 6
    with pytest.raises(ConfigError, match="did you mean 'dissolve'"):
        resolve_methods("disolve")
    with pytest.raises(ConfigError, match="there are dissolve, warp"):
        resolve_methods("zzz")


# ---- FID's network


def test_inception_has_the_published_sizes(tmp_path: Path) -> None:
    """By the published network: 21.8 million weights before the classifier, 299 x 299 to 2,048 channels of 8 x 8."""
    torch.manual_seed(0)
    network = Inception()
    assert sum(p.numel() for p in network.parameters()) == 21_785_568
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("Conv2d_4a_3x3", "Mixed_5b", "Mixed_5d", "Mixed_6a", "Mixed_6e", "Mixed_7a", "Mixed_7c"):
        network.get_submodule(name).register_forward_hook(
            lambda m, i, o, name=name: shapes.update({name: tuple(o.shape[1:])})
        )
    features = network(torch.rand(2, 3, 64, 48) * 2 - 1)
    assert features.shape == (2, 2048)
    assert shapes == {
        "Conv2d_4a_3x3": (192, 71, 71),
        "Mixed_5b": (256, 35, 35),
        "Mixed_5d": (288, 35, 35),
        "Mixed_6a": (768, 17, 17),
        "Mixed_6e": (768, 17, 17),
        "Mixed_7a": (1280, 8, 8),
        "Mixed_7c": (2048, 8, 8),
    }
    # A file in the published layout, the classifier and the counters of batches with it.
    states = network.state_dict() | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save(states, tmp_path / "inception.pth")
    loaded, digest = load_inception(tmp_path / "inception.pth")
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    assert_close(loaded(images), network(images))
    assert len(digest) == 16
    save_file(states, tmp_path / "INCEPTION.SAFETENSORS")
    assert_close(load_inception(tmp_path / "INCEPTION.SAFETENSORS")[0](images), network(images))


def test_files_that_hold_no_inception_are_said(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("nothing")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for name, message in (("text.pth", "cannot be read"), ("other.pth", "does not hold"), ("no.pth", "cannot be read")):
        with pytest.raises(DataError, match=message):
            load_inception(tmp_path / name)
