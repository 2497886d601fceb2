"""NaN and infinity, found at the step where they come up, with what most likely made them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import NumbersError


def is_finite(*tensors: Tensor) -> bool:
    """Whether all numbers are; tensors on the meta device, where operations are counted, hold none."""
    return all(x.is_meta or bool(x.isfinite().all()) for x in tensors)


def check_finite(x: Tensor, what: str, where: str, networks: Sequence[nn.Module], else_cause: str) -> None:
    """Raise `NumbersError` where x, called `what`, is not finite at `where`: "fit, step 3 of 200" say.

    networks: what made x; whether their weights or dtype explain it is looked at first. else_cause: what else will have.
    """
    if not is_finite(x):
        kind = "NaN" if bool(x.isnan().any()) else "infinity"
        raise NumbersError(f"{kind} in {what} ({where}): most likely {_cause(networks) or else_cause}.")


def _cause(networks: Sequence[nn.Module]) -> str:
    for network in networks:
        for name, weights in network.named_parameters():
            if weights.is_floating_point() and not is_finite(weights.data):
                return (
                    f"the model is damaged ({name} of its {type(network).__name__} is not finite); get its file again"
                )
    if any(getattr(network, "dtype", None) == torch.float16 for network in networks):
        return "float16, which ends at 65504, is too narrow for this model; use bfloat16 or float32"
    return ""
