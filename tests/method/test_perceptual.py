"""The perceptual distance: against the original network, on real pictures, and as a part others rely on."""

from __future__ import annotations

import copy
import itertools
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from diffmorpher.errors import ModelError
from diffmorpher.method import perceptual
from diffmorpher.method.perceptual import PerceptualDistance, pdv, perceptual_distance, ppl


def pattern(phase: float, height: int, width: int) -> Tensor:
    """A synthetic image (1, 3, H, W) in [-1, 1]: a disc before waves, both moved by `phase`."""
    y, x = np.meshgrid(np.arange(height) / height, np.arange(width) / width, indexing="ij")
    waves = [np.sin(2 * np.pi * ((3 + c) * x + phase)) * np.cos(2 * np.pi * (2 * y - phase * c)) for c in range(3)]
    disc = (x - 0.3 - 0.4 * phase) ** 2 + (y - 0.5) ** 2 < 0.05
    return torch.from_numpy(np.where(disc, 0.8 - phase, 0.6 * np.stack(waves))).float()[None]


def film(frames: int, height: int = 40, width: int = 33) -> Tensor:
    return torch.cat([pattern(0.13 * i, height, width) for i in range(frames)])


@pytest.fixture(scope="module")
def distance() -> PerceptualDistance:
    return perceptual_distance()


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """Three of the demo pictures at most, (B, 3, 96, 96) in [-1, 1]."""
    files = sorted((Path(perceptual.__file__).parents[1] / "assets" / "demo").glob("*.png"))
    assert len(files) >= 2
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB").resize((96, 96))) for file in files[:3]])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


# Printed by the original network, stlpips_pytorch.stlpips.LPIPS(net="alex", variant="shift_tolerant") of the package
# stlpips-pytorch 0.0.2, on the same patterns; torchvision, IPython and torchsummary, which it imports but does not use
# here, were stubs.
@pytest.mark.parametrize(
    ("height", "width", "phases", "expected"),
    [
        (64, 64, (0.0, 0.05), 0.0184317),
        (64, 64, (0.0, 0.5), 0.5644814),
        (64, 64, (0.3, 0.9), 0.4233966),
        (45, 70, (0.0, 0.05), 0.0241608),
        (45, 70, (0.0, 0.5), 0.5891139),
        (45, 70, (0.3, 0.9), 0.4603795),
        (128, 96, (0.0, 0.05), 0.0552522),
        (128, 96, (0.0, 0.5), 0.6090515),
        (128, 96, (0.3, 0.9), 0.4869263),
    ],
)
def test_equals_the_original_network(
    distance: PerceptualDistance, height: int, width: int, phases: tuple[float, float], expected: float
) -> None:
    a, b = (pattern(phase, height, width) for phase in phases)
    assert distance(a, b).item() == pytest.approx(expected, abs=2e-6)


def test_is_zero_for_equal_images_and_symmetric(distance: PerceptualDistance, pictures: Tensor) -> None:
    others = pictures.roll(1, dims=0)[:2]
    there, back = distance(pictures[:2], others), distance(others, pictures[:2])
    assert torch.equal(distance(pictures, pictures.clone()), torch.zeros(len(pictures)))
    assert there.shape == (2,) and there.dtype == torch.float32 and (there > 0.1).all()
    torch.testing.assert_close(there, back)


def test_grows_with_noise_blur_and_shift(distance: PerceptualDistance, pictures: Tensor) -> None:
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    noisy = [distance(pictures, pictures + sigma * noise) for sigma in (0.05, 0.1, 0.2)]

    def blurred(size: int) -> Tensor:
        edge = size // 2
        return functional.avg_pool2d(functional.pad(pictures, (edge,) * 4, mode="replicate"), size, stride=1)

    blurry = [distance(pictures, blurred(size)) for size in (3, 5, 7)]
    moved = [distance(pictures[..., :80], pictures[..., shift : shift + 80]) for shift in (1, 4, 16)]
    for growing in (noisy, blurry, moved):
        steps = torch.stack([torch.zeros(len(pictures)), *growing]).diff(dim=0)
        assert (steps > 0).all()


def test_a_shift_by_one_pixel_costs_far_less_than_noise_of_the_same_size(
    distance: PerceptualDistance, pictures: Tensor
) -> None:
    still, moved = pictures[..., :95], pictures[..., 1:]
    noise = torch.randn(still.shape, generator=torch.Generator().manual_seed(0))
    size = (moved - still).square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
    noise *= size / noise.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
    assert (distance(still, moved) < 0.1 * distance(still, still + noise)).all()


def test_features_are_of_unit_length(distance: PerceptualDistance) -> None:
    features = distance.features(film(2))
    assert [maps.shape[1] for maps in features] == [64, 192, 384, 256, 256]
    for maps in features:
        torch.testing.assert_close(maps.square().sum(dim=1), torch.ones_like(maps[:, 0]))


@pytest.mark.parametrize("chunk_size", [1, 3, 6, 100])
def test_consecutive_is_forward_on_neighbours(distance: PerceptualDistance, chunk_size: int) -> None:
    images = film(7)
    expected = torch.cat([distance(a[None], b[None]) for a, b in itertools.pairwise(images)])
    assert expected.min() > 0.01
    torch.testing.assert_close(distance.consecutive(images, chunk_size=chunk_size), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frames", [0, 1])
def test_consecutive_of_less_than_two_images_is_empty(distance: PerceptualDistance, frames: int) -> None:
    assert distance.consecutive(torch.zeros(frames, 3, 32, 32)).shape == (0,)


def test_consecutive_runs_the_network_once_per_image_and_in_chunks(
    distance: PerceptualDistance, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    features = distance.features

    def counted(images: Tensor) -> list[Tensor]:
        rows.append(len(images))
        return features(images)

    monkeypatch.setattr(distance, "features", counted)
    distance.consecutive(film(7), chunk_size=3)
    assert rows == [3, 3, 1]


def test_runs_in_float32_whatever_the_images_and_autocast(distance: PerceptualDistance) -> None:
    a, b = film(2).bfloat16().unsqueeze(1)
    expected = distance(a.float(), b.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(distance(a.float(), b.float()), expected)
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(distance(a.to(dtype), b.to(dtype)), expected)
    assert expected.dtype == torch.float32


def test_the_gradient_is_that_of_finite_differences(distance: PerceptualDistance) -> None:
    a, b = film(2).unsqueeze(1)
    a.requires_grad_()
    (gradient,) = torch.autograd.grad(distance(a, b).sum(), a)
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        slope = (distance(a + step, b) - distance(a - step, b)).item() / 2e-2
    assert slope == pytest.approx(gradient.norm().item(), rel=0.02)


def test_only_the_images_can_have_a_gradient(distance: PerceptualDistance) -> None:
    images = film(2)
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    assert not distance.training
    assert not distance(images, images).requires_grad
    assert not distance.consecutive(images.requires_grad_()).requires_grad


def test_pixels_without_any_feature_are_equal_and_have_no_gradient(distance: PerceptualDistance) -> None:
    dead = copy.deepcopy(distance)
    for bias in dead.biases:
        bias.data.fill_(-1e4)
    a, b = film(2).unsqueeze(1)
    a.requires_grad_()
    distances = dead(a, b)
    distances.sum().backward()
    assert distances.item() == 0
    assert a.grad is not None and torch.equal(a.grad, torch.zeros_like(a))


def test_a_module_first_asked_for_in_inference_mode_still_serves_as_a_loss() -> None:
    with torch.inference_mode():
        distance = perceptual_distance("cpu:0")  # a name that no other test asks for, so that it is loaded here
    a, b = film(2).unsqueeze(1)
    distance(a.requires_grad_(), b).sum().backward()
    assert a.grad is not None and a.grad.abs().sum() > 0


def test_is_loaded_once_per_device_without_importing_the_package_or_drawing_random_numbers() -> None:
    assert perceptual_distance() is perceptual_distance(torch.device("cpu"))
    state = torch.get_rng_state()
    PerceptualDistance()
    assert torch.equal(torch.get_rng_state(), state)
    assert "stlpips_pytorch" not in sys.modules


def test_the_blur_kernels_in_the_weights_file_are_the_one_used(distance: PerceptualDistance) -> None:
    checkpoint = torch.load(perceptual._find_weights(), map_location="cpu", weights_only=True)
    kernels = [tensor for name, tensor in checkpoint.items() if name.endswith(".filt")]
    assert len(kernels) == 3
    for kernel in kernels:
        assert torch.equal(kernel, distance.blur_kernel.expand_as(kernel))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 64, 64), r"\(B, 3, H, W\), got \(3, 64, 64\)"),
        ((1, 1, 64, 64), r"\(B, 3, H, W\), got \(1, 1, 64, 64\)"),
        ((1, 64, 64, 3), r"\(B, 3, H, W\), got \(1, 64, 64, 3\)"),
        ((1, 3, 20, 64), "at least 21 x 21 pixels, got 20 x 64"),
        ((1, 3, 64, 20), "at least 21 x 21 pixels, got 64 x 20"),
    ],
)
def test_refuses_images_of_the_wrong_shape(distance: PerceptualDistance, shape: tuple[int, ...], message: str) -> None:
    images = torch.zeros(shape)
    for call in (distance.features, distance.consecutive, lambda images: distance(images, images)):
        with pytest.raises(ValueError, match=message):
            call(images)


def test_refuses_unlike_shapes_integers_and_empty_chunks(distance: PerceptualDistance) -> None:
    with pytest.raises(ValueError, match=r"one shape, got \(1, 3, 64, 64\) and \(2, 3, 64, 64\)"):
        distance(torch.zeros(1, 3, 64, 64), torch.zeros(2, 3, 64, 64))
    with pytest.raises(ValueError, match=r"got torch\.uint8"):
        distance.consecutive(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        distance.consecutive(torch.zeros(2, 3, 64, 64), chunk_size=0)


def test_the_smallest_size_works(distance: PerceptualDistance) -> None:
    assert 0.01 < distance(pattern(0, 21, 21), pattern(0.5, 21, 21)).item() < 1


def test_missing_weights_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> list[metadata.PackagePath]:
        raise metadata.PackageNotFoundError(name)

    def without_weights(name: str) -> list[metadata.PackagePath]:
        return [metadata.PackagePath("stlpips_pytorch/stlpips.py")]

    def unknown_files(name: str) -> None:
        return None

    for files in (not_installed, without_weights, unknown_files):
        monkeypatch.setattr(metadata, "files", files)
        with pytest.raises(ModelError, match="pip install stlpips-pytorch"):
            PerceptualDistance()


def test_refuses_a_weights_file_with_missing_or_unknown_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = torch.load(perceptual._find_weights(), map_location="cpu", weights_only=True)
    checkpoint["lin5.model.1.weight"] = checkpoint.pop("lin4.model.1.weight")
    torch.save(checkpoint, tmp_path / "weights.pth")
    monkeypatch.setattr(perceptual, "_find_weights", lambda: tmp_path / "weights.pth")
    with pytest.raises(ModelError, match=r"unknown: lin4\.model\.1\.weight, lin5\.model\.1\.weight"):
        PerceptualDistance()


def test_ppl_is_the_sum_and_pdv_the_variance_of_the_population() -> None:
    assert ppl([0.5, 0.25, 0.75]) == pytest.approx(1.5)
    assert pdv([0.5, 0.25, 0.75]) == pytest.approx(0.125 / 3)
    assert pdv([0.3]) == 0
    assert ppl([]) == 0
    with pytest.raises(ValueError, match="no distances"):
        pdv([])
