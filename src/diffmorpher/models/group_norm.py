"""Group normalisation that is exact on a CPU, whatever the mean, the size and the memory layout of its input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional


def group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """`(x - m) / sqrt(v + eps) w + b`, each group's mean and variance in two passes: `m = c + mean(x - c)`, c the rounded mean.

    On a CPU torch takes `v = mean(x^2) - m^2` in one pass where the channels lie last, and computes `x s + (b - m s)`, the
    difference of two large numbers, in any layout. Its kernel for contiguous input is exact once c is taken off, which
    changes neither what comes out nor any gradient, so c needs none itself. Half precision is widened for the sums.
    """
    if x.device.type != "cpu":  # other kernels, where this was not found
        return nn.GroupNorm.forward(norm, x)
    groups = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous().view(len(x), norm.num_groups, -1)
    centred = (groups - groups.detach().mean(2, keepdim=True)).view(x.shape)
    weight, bias = (None if p is None else p.to(centred.dtype) for p in (norm.weight, norm.bias))
    return functional.group_norm(centred, norm.num_groups, weight, bias, norm.eps).to(x.dtype)


@contextmanager
def exact_group_norm(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While open, every `nn.GroupNorm` among the modules works by `group_norm`; one with a forward of its own keeps it."""
    norms = [m for m in modules if type(m).forward is nn.GroupNorm.forward and "forward" not in vars(m)]
    try:
        for norm in norms:
            norm.forward = MethodType(group_norm, norm)
        yield
    finally:
        for norm in norms:
            vars(norm).pop("forward", None)
