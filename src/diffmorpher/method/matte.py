"""Transparency of frames made on white: what is white and reaches the border, or lies where no picture is, is not there.

Chosen by looking, against interpolating the pictures' own transparency (as distances from their outlines, or as pictures by
the same path): those outlines are not where the frames' are, and leave white beside them or cut into them.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import max_pool2d

#: Colours that are this far from white, of 255, in no channel may be background.
_WHITE = 24
#: Pixels from the background to those that are wholly of the thing.
_EDGE = 2


def matte(frame: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """A frame with its opacity.                                                             # (4, H, W) uint8, RGBA, straight

    frame: (3, H, W) uint8, on white; left, right: the opacity of the pictures that it lies between, (H, W) uint8, at alpha 0
    and 1 exactly its own.
    """
    if alpha in (0, 1):
        opacity = (left if alpha == 0 else right).float() / 255
    else:
        away = 255 - frame.float().amin(0)  # how far from white
        empty = left.maximum(right) < 13  # in both pictures, such as the hole of a ring
        background = torch.from_numpy(_reached((away < _WHITE).numpy(), empty.numpy()))
        near = _largest(background.float(), _EDGE) > 0
        # An edge pixel mixes white with what is beside it: by how much, its distance from white says.
        mixed = (away / _largest(away * ~background, _EDGE + 1).clamp(min=1)).clamp(max=1)
        opacity = torch.where(near, mixed, 1.0)
        opacity = torch.where(background, mixed * (away > 3), opacity)
    there = opacity.clamp(min=1 / 255)
    colours = (frame.float() - 255 * (1 - there)) / there  # the white taken out again
    colours = torch.where(opacity > 0, colours, 255.0)  # so that who leaves the opacity out sees white
    return torch.cat([colours, opacity[None] * 255]).round().clamp(0, 255).byte()


def _largest(x: Tensor, reach: int) -> Tensor:
    """The largest value around each pixel."""
    return max_pool2d(x[None, None].float(), 2 * reach + 1, 1, reach)[0, 0]


def _reached(free: NDArray[np.bool_], sure: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The free pixels that are joined to the border, or to a free one that is surely background."""
    start = sure.copy()
    start[[0, -1]] = start[:, [0, -1]] = True
    reached = start & free
    before = -1
    while before != (before := int(reached.sum())):
        for axis in (0, 1):  # whole runs of free pixels at once, along rows and columns
            runs = np.cumsum(~free, axis=axis)
            lines = np.arange(free.shape[1 - axis])
            runs = runs + (lines[None] if axis == 0 else lines[:, None]) * (free.shape[axis] + 1)
            hit = np.zeros(runs.max() + 1, dtype=bool)
            hit[runs[reached]] = True
            reached = hit[runs] & free
    return reached
