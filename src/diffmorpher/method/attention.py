"""Self-attention of the up blocks with keys and values taken from the two end images (method, section 7)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .interpolate import Between, lerp


def replaced_steps(attention_lambda: float, steps: int) -> int:
    """How many of `steps` have their attention replaced: those with index i < lambda x T, free of rounding."""
    return math.ceil(round(attention_lambda * steps, 9))


@contextmanager
def interpolated_attention(unet: nn.Module, rows: Between, mode: Literal["features", "kv", "outer"]) -> Iterator[None]:
    """While open, row b of a batch draws its keys and values from its two end rows of the same batch.

    rows: for every row of the batch the two batch rows that hold its end images, and its alpha. An end row names itself.
    mode: "features" mixes what goes into `to_k` and `to_v`, `K_b = to_k((1 - a) h_left + a h_right)` with row b's own
    LoRA; "kv" mixes what comes out, `K_b = (1 - a) K_left + a K_right`, each end's made with its own LoRA; "outer"
    mixes what attention gives, see `_OuterAttention`. A LoRA bank must be attached before, so that its share is in what comes
    out. `rows` lies on the device where the U-Net runs (which, offloaded, need not be where its weights are now).
    """
    left, right, alpha = rows.left, rows.right, rows.alpha

    def mix(x: Tensor) -> Tensor:  # (B, N, D)
        return lerp(x[left], x[right], alpha)

    def mix_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (mix(args[0]), *args[1:])

    def mix_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return mix(output)

    if mode == "outer":
        with self_attention(unet, _OuterAttention(left, right, alpha), "up_blocks."):
            yield
        return
    handles: list[Any] = []
    try:
        for name, module in unet.named_modules():
            if name.startswith("up_blocks.") and name.endswith((".attn1.to_k", ".attn1.to_v")):
                if mode == "features":
                    handles.append(module.register_forward_pre_hook(mix_input))
                else:
                    handles.append(module.register_forward_hook(mix_output))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def self_attention(unet: nn.Module, processor: Any, within: str = "") -> Iterator[None]:
    """While open, the self-attention layers whose path starts with `within` work by a diffusers attention processor."""
    before: dict[Any, Any] = {}
    try:
        for name, module in unet.named_modules():
            if name.startswith(within) and name.endswith(".attn1"):
                before[module] = module.processor
                module.set_processor(processor)
        yield
    finally:
        for module, was in before.items():
            module.set_processor(was)


def project(attn: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of an attention layer, each (B, heads, N, D / heads), from its input (B, N, D)."""
    q, k, v = (
        layer(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for layer in (attn.to_q, attn.to_k, attn.to_v)
    )
    return q, k, v


def project_out(attn: Any, heads: Tensor) -> Tensor:
    """What an attention layer gives back, (B, N, D), from its heads (B, heads, N, D / heads)."""
    return attn.to_out[1](attn.to_out[0](heads.transpose(1, 2).flatten(2)))


class _OuterAttention:
    """`(1 - a) ATT(Q, [K, K_left], [V, V_left]) + a ATT(Q, [K, K_right], [V, V_right])`, the row's own keys and values first.

    The outer interpolation of AID (Q. He et al., NeurIPS 2024) with the end images as they ride in the batch. An end row
    (a = 0, left itself) sees everything twice, which is its own attention. A diffusers attention processor.
    """

    def __init__(self, left: Tensor, right: Tensor, alpha: Tensor) -> None:
        self.left, self.right, self.alpha = left, right, alpha

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:  # (B, N, D) -> (B, N, D)
        q, k, v = project(attn, hidden_states)

        def with_end(end: Tensor) -> Tensor:
            return scaled_dot_product_attention(q, torch.cat([k, k[end]], dim=2), torch.cat([v, v[end]], dim=2))

        return project_out(attn, lerp(with_end(self.left), with_end(self.right), self.alpha))
