"""Between two images: where a position lies, and the mixtures of noises, channel statistics and embeddings there.

Method, sections 5 and 6. Everything is batched over rows: row b lies at `alpha[b]` between its own two ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError


@dataclass(frozen=True)
class Between:
    """Rows between neighbouring images: row b is at `alpha[b]` in [0, 1] from image `left[b]` to image `right[b]`."""

    left: Tensor  # (B,) int64
    right: Tensor  # (B,) int64
    alpha: Tensor  # (B,) float64

    @classmethod
    def images(cls, positions: Sequence[float], num_images: int, loop: bool = False) -> Between:
        """Split positions over [0, K-1] (in a loop [0, K], where K is image 0 again) into two neighbours and an alpha.

        Raises `ConfigError` for a position outside that range.
        """
        last = num_images if loop else num_images - 1
        try:
            p = torch.as_tensor(positions, dtype=torch.float64, device="cpu").reshape(-1)
        except (TypeError, ValueError, RuntimeError) as error:  # torch's own, by what it met
            raise ConfigError(f"the positions are {positions!r:.100}, but must be numbers from 0 to {last}.") from error
        if not bool(((p >= 0) & (p <= last)).all()):
            bad = next(float(x) for x in p if not 0 <= float(x) <= last)
            raise ConfigError(f"position {bad:g} is outside the path; positions run from 0 to {last}.")
        left = p.floor().clamp(max=last - 1).long()
        return cls(left, (left + 1) % num_images, p - left)

    def on(self, device: torch.device) -> Between:
        """The same rows where a network runs, alpha in float32 (not every device has float64)."""
        return Between(self.left.to(device), self.right.to(device), self.alpha.float().to(device))

    def weights(self, num_images: int) -> Tensor:
        """One weight per image and row, zero but for the two neighbours.                       # (B, K) float64"""
        rows = torch.zeros(len(self.alpha), num_images, dtype=torch.float64)
        rows.scatter_add_(1, self.left[:, None], 1 - self.alpha[:, None])
        return rows.scatter_add_(1, self.right[:, None], self.alpha[:, None])


def _per_row(alpha: Tensor, like: Tensor) -> Tensor:
    return alpha.to(like).reshape(-1, *[1] * (like.ndim - 1))


def lerp(x_0: Tensor, x_1: Tensor, alpha: Tensor) -> Tensor:
    """`(1 - a) x_0 + a x_1` with one a per row, exact at 0 and 1 (section 6).                   # (B, ...)"""
    a = _per_row(alpha, x_0)
    return (1 - a) * x_0 + a * x_1


def slerp(z_0: Tensor, z_1: Tensor, alpha: Tensor) -> Tensor:
    """Spherical interpolation over each row's whole flattened latent, in float64 (section 5).   # (B, ...) -> (B, ...)"""
    # On the CPU, since not every device has float64.
    x, y = z_0.cpu().double().flatten(1), z_1.cpu().double().flatten(1)
    norms = x.norm(dim=1) * y.norm(dim=1)
    cos = ((x * y).sum(1) / norms.clamp_min(1e-300)).clamp(-1 + 1e-7, 1 - 1e-7)
    theta = cos.acos()
    a = alpha.to(theta)
    w_0, w_1 = ((1 - a) * theta).sin() / theta.sin(), (a * theta).sin() / theta.sin()
    return (w_0[:, None] * x + w_1[:, None] * y).reshape(z_0.shape).to(z_0)


def adain(z: Tensor, z_0: Tensor, z_1: Tensor, alpha: Tensor) -> Tensor:
    """Give `z` the interpolated channel means and spreads of `z_0` and `z_1` (AdaIN, section 5).  # (B, C, H, W)

    `z` is normalised with the biased variance and eps 1e-5; the ends' spread is `sqrt(unbiased variance + 1e-5)`.
    """

    def mean_std(x: Tensor, correction: int) -> tuple[Tensor, Tensor]:
        var, mean = torch.var_mean(x, dim=(2, 3), correction=correction, keepdim=True)
        return mean, (var + 1e-5).sqrt()

    mean, std = mean_std(z, 0)
    (mean_0, std_0), (mean_1, std_1) = mean_std(z_0, 1), mean_std(z_1, 1)
    return (z - mean) / std * lerp(std_0, std_1, alpha) + lerp(mean_0, mean_1, alpha)


def noise_between(noises: Tensor, rows: Between, use_adain: bool = True) -> Tensor:
    """The starting noise of each row: slerp of its two images' noises, then AdaIN.   # (K, C, h, w) -> (B, C, h, w)"""
    z_0, z_1 = noises[rows.left.to(noises.device)], noises[rows.right.to(noises.device)]
    z = slerp(z_0, z_1, rows.alpha)
    return adain(z, z_0, z_1, rows.alpha) if use_adain else z
