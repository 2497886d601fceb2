"""Figures of merit of one film, and Frechet distances over many (method, section 9)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..method.ghost import ghost, middle_third
from ..method.perceptual import PerceptualDistance, pdv, ppl

#: For each figure of a film, what it is, and whether less of it is better.
FIGURES = {
    "ppl": ("perceptual path length: sum of the distances between neighbours", True),
    "pdv": ("perceptual distance variance: unevenness of the film", True),
    "end_distance": ("perceptual distance of first and last frame from the inputs, mean of both", True),
    "end_psnr": ("the same in decibels", False),
    "directness": ("path length over the distance of first and last frame", True),
    "roughness": ("largest triangle deficit of three frames in a row", True),
    "ghost": ("how much of a cross-fade of the ends the middle third is: 1 a dissolve, 0 new pictures", True),
}


@torch.inference_mode()
def figures(pixels: Tensor, inputs: Tensor, distance: PerceptualDistance) -> dict[str, Any]:
    """The figures of one film.

    pixels: its frames (n, 3, H, W), n >= 3, float32 in [-1, 1]; inputs: the first and the last image it was made of,
    (2, 3, H, W). With d(i, j) the perceptual distance of frames i and j:

    - distances: d(i, i+1), n - 1 of them; ppl: their sum; pdv: their variance over n - 1;
    - end_distance_0, end_distance_1, end_psnr_0, end_psnr_1: first and last frame against the inputs, and their
      means end_distance, end_psnr; PSNR is 10 log10(4 / mse), at most 100;
    - directness: ppl / d(0, n-1). LPIPS is no metric, so values below 1 occur;
    - roughness (second-order smoothness): max_i (d(i, i+1) + d(i+1, i+2) - d(i, i+2)) / d(i, i+2);
    - ghost: of a frame f between the inputs A and B, 1 - min_b |f - ((1-b) A + b B)| / min(|f - A|, |f - B|) with b in
      [0, 1] and |.| the Euclidean norm over all pixels (`method/ghost.py`); its mean over the frames of the middle third. 1
      for a dissolve, 0 where no blend is nearer than an end, 0.13 where f is as far from A and B as these from each other.
    """
    gaps = distance.consecutive(pixels).tolist()
    skips = torch.cat([distance(pixels[i : i + 1], pixels[i + 2 : i + 3]) for i in range(len(pixels) - 2)]).tolist()
    whole = distance(pixels[:1], pixels[-1:]).item()
    ends = pixels[[0, -1]]
    end_distances = distance(ends, inputs).tolist()
    middle = pixels[middle_third(0, len(pixels) - 1)]
    end_psnrs = [psnr(end, image) for end, image in zip(ends, inputs, strict=True)]
    return {
        "ppl": ppl(gaps),
        "pdv": pdv(gaps),
        "end_distance": sum(end_distances) / 2,
        "end_psnr": sum(end_psnrs) / 2,
        "directness": _ratio(ppl(gaps), whole),
        "roughness": max(_ratio(gaps[i] + gaps[i + 1] - skip, skip) for i, skip in enumerate(skips)),
        "ghost": ghost(middle, *inputs).mean().item(),
        "end_distance_0": end_distances[0],
        "end_distance_1": end_distances[1],
        "end_psnr_0": end_psnrs[0],
        "end_psnr_1": end_psnrs[1],
        "distances": gaps,
    }


def psnr(a: Tensor, b: Tensor) -> float:
    """10 log10(4 / mse) decibels for images in [-1, 1]; 100 where they are closer than that."""
    mse = (a - b).square().mean().item()
    return min(100.0, 10 * math.log10(4 / mse)) if mse > 0 else 100.0


def _ratio(a: float, b: float) -> float:
    """a / b, at most a million (JSON has no infinity); 0 over 0 is 0, for a film in which nothing moves."""
    return min(1e6, a / b) if b > 0 else (1e6 if a > 0 else 0.0)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two Gaussians with the means and covariances of features a (N, D) and b (M, D).

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), covariances over N - 1, in float64 (Heusel et al. 2017). The
    trace of the root is the sum of the singular values of R_a^T R_b with C = R R^T, R^T the centred features over
    sqrt(N - 1): no matrix root is taken, and nothing is added to a singular covariance.
    """
    a, b = a.double(), b.double()
    if len(a) < 2 or len(b) < 2:
        raise ValueError(f"at least two features on each side are needed, got {len(a)} and {len(b)}")
    roots = [(x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b)]
    shared = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()  # (N, M): its singular values are those of R_a^T R_b
    trace = sum((root.square().sum() for root in roots), torch.zeros((), dtype=torch.float64)) - 2 * shared
    return max(0.0, ((a.mean(0) - b.mean(0)).square().sum() + trace).item())


def frechet_of_films(inputs: Tensor, films: Sequence[Tensor], seed: int = 0, draws: int = 10) -> float:
    """The paper's protocol: all input images against 2 random frames of every film, the mean of 10 draws.

    inputs: features (M, D); films: features (n, D) of each film's frames.
    """
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(draws):
        sample = torch.cat([film[torch.randperm(len(film), generator=generator)[:2]] for film in films])
        distances.append(frechet_distance(inputs, sample))
    return sum(distances) / len(distances)


@torch.inference_mode()
def perceptual_features(pixels: Tensor, distance: PerceptualDistance) -> Tensor:
    """Features of frames (n, 3, H, W) for a Frechet distance that needs no download: the perceptual network's five maps, each
    averaged over the picture, (n, 1152). Its figures are called "frechet", never FID: they are not Inception's."""
    return torch.cat([torch.cat([maps.mean((2, 3)) for maps in distance.features(frame[None])], 1) for frame in pixels])
