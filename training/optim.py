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
        super().__init__([{"params": matrices}], {"lr": lr, "weight_decay": weight_decay})
        others = [p for p in parameters if id(p) not in taken]
        self.others = torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                momentum = state.setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                update = orthogonal(torch.lerp(p.grad, momentum, 0.95).flatten(1))  # Nesterov
                scale = 0.2 * max(update.shape) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view_as(p), alpha=-group["lr"] * scale)
        for group in self.others.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
        self.others.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.others.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {"matrices": super().state_dict(), "others": self.others.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state["matrices"])
        self.others.load_state_dict(state["others"])


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Nearly the orthogonal factor of a matrix's polar decomposition, by the quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.mT
