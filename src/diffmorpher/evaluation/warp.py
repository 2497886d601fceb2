"""Two classical baselines, without any model: cross-fading the pixels, and warping along dense correspondences."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..method.interpolate import Between, lerp
from ..path import to_pil


def dissolve(images: Tensor, positions: list[float]) -> Tensor:
    """(1 - a) I_0 + a I_1 in sRGB; images (K, 3, H, W) in [-1, 1], positions over [0, K-1]."""
    at = Between.images(positions, len(images))
    return lerp(images[at.left], images[at.right], at.alpha)


def warp(images: Tensor, positions: list[float]) -> Tensor:
    """Both neighbours moved along the optical flow between them, then cross-faded.

    F_01 is the dense flow from image 0 to image 1 (DIS: T. Kroeger et al. 2016, OpenCV), F_10 the other way. Frame a is
    (1 - a) I_0(x - a F_01(x)) + a I_1(x - (1 - a) F_10(x)), the usual approximation that the flow at the goal is that at the
    start. Outside the pictures the border's colour goes on. Raises `ConfigError` where OpenCV is not installed.
    """
    try:
        cv2: Any = importlib.import_module("cv2")
    except ImportError as error:
        raise ConfigError("the method 'warp' needs OpenCV: pip install 'diffmorpher[bench]'.") from error
    at = Between.images(positions, len(images))
    pictures = [np.asarray(picture) for picture in to_pil(images)]
    grey = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in pictures]
    estimator = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flows: dict[tuple[int, int], np.ndarray] = {}
    height, width = grey[0].shape
    grid = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float32)

    def moved(source: int, to: int, share: float) -> np.ndarray:
        if (source, to) not in flows:
            flows[source, to] = estimator.calc(grey[source], grey[to], None)
        places = grid - np.float32(share) * flows[source, to]
        return cv2.remap(pictures[source], places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)

    frames = []
    for left, right, a in zip(at.left.tolist(), at.right.tolist(), at.alpha.tolist(), strict=True):
        blend = (1 - a) * moved(left, right, a).astype(np.float32) + a * moved(right, left, 1 - a).astype(np.float32)
        frames.append(torch.from_numpy(blend).permute(2, 0, 1) / 127.5 - 1)
    return torch.stack(frames)
