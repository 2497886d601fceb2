"""Ghost: on films of which it is known how much of a cross-fade they are."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from PIL import Image

from conftest import tiny_pipeline
from diffmorpher import FitConfig, Morpher, MorphResult, SampleConfig
from diffmorpher.evaluation.warp import dissolve, warp
from diffmorpher.method.ghost import CROSS_FADE, ghost, middle_third, said_ghost, some_of
from diffmorpher.path import to_pixels


def noise(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 96, 96, generator=torch.Generator().manual_seed(seed))


def disc(x: float) -> torch.Tensor:
    """A soft disc at a place along a dark picture."""
    across, down = torch.meshgrid(torch.linspace(0, 4, 192), torch.linspace(-0.5, 0.5, 48), indexing="xy")
    return torch.exp(-((across - x).square() + down.square()) / 0.02).expand(3, -1, -1)


def by_search(frame: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    """The definition, word for word."""
    blends = [(1 - t) * a + t * b for t in torch.linspace(0, 1, 1001)]
    nearest = min((frame - blend).norm().item() for blend in blends)
    return 1 - nearest / min((frame - a).norm().item(), (frame - b).norm().item())


def test_a_dissolve_is_one() -> None:
    a, b = noise(2)
    frames = torch.stack([torch.lerp(a, b, t) for t in (0.35, 0.5, 0.6)])
    torch.testing.assert_close(ghost(frames, a, b), torch.ones(3).double(), atol=1e-5, rtol=0)
    rounded = (frames * 30 + 128).round(), (a * 30 + 128).round(), (b * 30 + 128).round()
    assert ghost(*rounded).min() > 0.97, "in 8 bits too"


def test_a_new_picture_is_near_zero() -> None:
    """An equilateral triangle: the middle of a side is sqrt(3)/2 of it away from the third corner."""
    a, b, new = noise(3)
    assert ghost(new[None], a, b).item() == pytest.approx(1 - math.sqrt(3) / 2, abs=0.01)
    assert ghost(3 * new[None] - a - b, a, b).item() < 0.02, "one that is far from both"


def test_a_warp_is_near_zero_and_a_cross_fade_of_the_same_pictures_is_one() -> None:
    a, b = disc(0.5), disc(3.5)
    warp = torch.stack([disc(x) for x in (1.6, 2, 2.4)])
    assert ghost(warp, a, b).max() < 0.15
    assert ghost(torch.lerp(a, b, 0.4)[None], a, b).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("strength", [0, 0.25, 0.5, 0.75, 0.9, 1])
def test_a_double_exposure_of_known_strength(strength: float) -> None:
    """A share of the two ends over a new picture, all three independent and of one variance."""
    a, b, new = noise(3)
    frame = (1 - strength) * new + strength * (a + b) / 2
    left = math.sqrt(1.5) * (1 - strength)
    whole = math.sqrt((1 - strength) ** 2 + (1 - strength / 2) ** 2 + strength**2 / 4)
    assert ghost(frame[None], a, b).item() == pytest.approx(1 - left / whole, abs=0.01)
    assert ghost(frame[None], a, b).item() == pytest.approx(by_search(frame, a, b), abs=1e-4)


def test_the_threshold_tells_cross_fades_from_warps(demo: dict[str, Image.Image]) -> None:
    """Films of known kind of the demo's neighbours, in 8 bits; the model's own morphs are in docs/films.md."""
    pytest.importorskip("cv2")
    pictures = list(demo.values())
    for one, other in pairwise(pictures):
        ends = to_pixels([one, other])
        values = {}
        for make in (dissolve, warp):
            frames = ((make(ends, [0.4, 0.5, 0.6]) + 1) * 127.5).round()
            values[make] = ghost(frames, *((ends + 1) * 127.5)).mean().item()
        assert said_ghost(values[dissolve]).startswith("In the middle the pictures lie on top of each other (ghost 0.9")
        assert said_ghost(values[warp]) == "" and values[warp] < 0.5 < CROSS_FADE < 0.9 < values[dissolve]
    assert said_ghost(None) == ""


def test_beyond_the_ends_and_at_them() -> None:
    a, b = noise(2)
    frames = torch.stack([a, b, 1.5 * b - 0.5 * a])
    assert ghost(frames, a, b).tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    assert ghost(noise(1, 1), a, a).item() == pytest.approx(0, abs=1e-6), "there is nothing to blend"


def test_the_middle_third() -> None:
    assert middle_third(0, 15) == [5, 6, 7, 8, 9, 10]
    assert middle_third(3, 5) == [4] and middle_third(3, 4) == []
    assert some_of(range(100), 4) == [0, 33, 66, 99] and some_of([7, 8], 4) == [7, 8]


@pytest.mark.parametrize("loop", [False, True])
def test_of_a_film_as_it_is_made(loop: bool) -> None:
    pictures = [Image.effect_noise((32, 32), s).convert("RGB") for s in (20, 60, 90)]
    morpher = Morpher(tiny_pipeline())
    fit, sample = FitConfig(rank=2, steps=1), SampleConfig(steps=2)

    def film(count: int, **options: object) -> MorphResult:
        return morpher(pictures, num_frames=count, fit=fit, sample=sample, loop=loop, **options)  # type: ignore[arg-type]

    result = film(20)
    frames = [*result.frames, result.frames[0]] if loop else result.frames
    stops = [i for i, alpha in enumerate([*result.alphas, 3.0] if loop else result.alphas) if alpha == int(alpha)]
    pixels = to_pixels(frames)
    expected = []
    for start, end in pairwise(stops):
        middle = [i for i in range(start, end + 1) if 1 / 3 - 1e-9 <= (i - start) / (end - start) <= 2 / 3 + 1e-9]
        values = [by_search(pixels[i], pixels[start], pixels[end]) for i in middle]
        expected.append(sum(values) / len(values))
    assert result.ghosts == pytest.approx(expected, abs=1e-3) and len(expected) == len(pictures) - (not loop)
    assert result.ghost == pytest.approx(sum(expected) / len(expected), abs=1e-3)
    assert film(3).ghost is None
    streamed = film(20, write=lambda frames, settings: list(frames))
    assert streamed.ghosts == result.ghosts
