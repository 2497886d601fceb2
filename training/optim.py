"""Muon (K. Jordan 2024): momentum whose matrix is made orthogonal before each step.

torch.optim.Muon takes matrices only; a convolution's kernel is one too, once it is flattened over its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Muon for weights of two and more dimensions, AdamW for all others and for those in `plain`.

    The step's size is matched to AdamW's (0.2 sqrt(max(rows, columns)), J. Liu et al. 2025), so that both share one rate.
    """

    def __init__(
        self, model: nn.Module, lr: float, weight_decay: float = 1e-2, plain: Iterable[nn.Module] = ()
    ) -> None:
        kept = {id(p) for module in plain for p in module.parameters()}
        parameters = list(model.parameters())
        matrices = [p for p in parameters if p.ndim >= 2 and id(p) not in kept]
        taken = {id(p) for p in matrices}
        # On a GPU the rate is a tensor, so that a step can be captured once and replayed with another rate.
        gpu = parameters[0].is_cuda
        rate = torch.tensor(lr, device=parameters[0].device) if gpu else lr
        super().__init__([{"params": matrices}], {"lr": rate, "weight_decay": weight_decay})
        others = [p for p in parameters if id(p) not in taken]
        self.others = torch.optim.AdamW(others, rate, (0.9, 0.99), weight_decay=0.0, fused=True, capturable=gpu)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for alike in self._by_shape(group["params"]).values():
                gradients = [p.grad for p in alike]
                momenta = [self._momentum(p) for p in alike]
                torch._foreach_lerp_(momenta, gradients, 0.05)
                nesterov = torch._foreach_lerp(gradients, momenta, 0.95)
                updates = orthogonal(torch.stack([x.flatten(1) for x in nesterov]))
                scale = group["lr"] * (0.2 * max(updates.shape[1:]) ** 0.5)
                for p, update in zip(alike, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(scale * update.view(p.shape))
        for group in self.others.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
        self.others.step()

    def _momentum(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        return state["momentum"]

    @staticmethod
    def _by_shape(parameters: Iterable[Tensor]) -> dict[tuple[int, ...], list[Tensor]]:
        """Those that have a gradient, in groups of one shape each, whose matrices are made orthogonal together."""
        groups: dict[tuple[int, ...], list[Tensor]] = {}
        for p in parameters:
            if p.grad is not None:
                groups.setdefault(tuple(p.shape), []).append(p)
        return groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.others.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {"matrices": super().state_dict(), "others": self.others.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        rate = self.param_groups[0]["lr"]
        super().load_state_dict(state["matrices"])
        self.others.load_state_dict(state["others"])
        for group in (*self.param_groups, *self.others.param_groups):
            group["lr"] = rate  # on a GPU the very tensor that a captured step reads


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearly the orthogonal factors of matrices' polar decompositions, by the quintic Newton-Schulz iteration.

    matrices: (..., rows, columns), float32. On a GPU the iteration is in bfloat16, which it was made for.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.bfloat16() if x.is_cuda else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)
