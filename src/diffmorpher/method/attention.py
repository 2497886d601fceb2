"""Self-attention with keys and values of the image taken from the two end images (method, section 7)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ..errors import ConfigError
from ..models.backbone import AttentionSite, Backbone
from .interpolate import Between, lerp


def check_mode(backbone: Backbone, mode: str) -> None:
    """Raise `ConfigError` for an attention mode that the model's attention cannot have."""
    if mode == "outer":
        check_unet(backbone, 'the attention mode "outer"', 'take "features" or "kv"')


def check_unet(backbone: Backbone, what: str, instead: str) -> None:
    """Raise `ConfigError` if the network is no U-Net, whose self-attention layers have no text in them."""
    if backbone.network_part != "unet":
        raise ConfigError(f"{what} is for U-Nets (Stable Diffusion 1, 2 and XL), not for {backbone.family}: {instead}.")


@contextmanager
def interpolated_attention(
    backbone: Backbone, rows: Between, mode: Literal["features", "kv", "outer"], image_rows: int = 0
) -> Iterator[None]:
    """While open, row b of a batch draws its image's keys and values from its two end rows of the same batch.

    rows: for every row of the batch the two batch rows that hold its end images, and its alpha. An end row names itself.
    mode: "features" mixes what goes into the projections to keys and values, `K_b = to_k((1 - a) h_left + a h_right)` with
    row b's own LoRA; "kv" mixes what comes out, `K_b = (1 - a) K_left + a K_right`, each end's made with its own LoRA; "outer"
    mixes what attention gives, see `_OuterAttention`. image_rows: how many rows of a sequence are the image where text stands
    beside it; the text keeps its own keys and values. A LoRA bank must be attached before, so that its share is in what comes
    out. `rows` lies on the device where the network runs (which, offloaded, need not be where its weights are now).
    """
    left, right, alpha = rows.left, rows.right, rows.alpha

    def mix(x: Tensor) -> Tensor:  # (B, N, D)
        return lerp(x[left], x[right], alpha)

    with ExitStack() as stack:
        if mode == "outer":
            stack.enter_context(self_attention(backbone.network, _OuterAttention(left, right, alpha), "up_blocks."))
        else:
            for site in backbone.attention_sites():
                layer = backbone.network.get_submodule(site.layer)
                if mode == "kv":
                    handle = layer.register_forward_hook(_mixed_output(site, mix, image_rows))
                elif site.columns is None:
                    handle = layer.register_forward_pre_hook(_mixed_input(site, mix, image_rows))
                else:
                    handle = layer.register_forward_hook(_again_with_mixed_input(site, mix, image_rows))
                stack.callback(handle.remove)
        yield


Change = Callable[[Tensor], Tensor]


def _mixed_input(site: AttentionSite, mix: Change, image_rows: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_at_image(args[0], site, image_rows, mix), *args[1:])

    return hook


def _mixed_output(site: AttentionSite, mix: Change, image_rows: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return _at_image(output, site, image_rows, mix, site.columns)

    return hook


def _again_with_mixed_input(site: AttentionSite, mix: Change, image_rows: int) -> Any:
    """For a layer that makes more than keys and values: it runs a second time, for those of a mixed input."""
    again = False

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        nonlocal again
        if again:
            return None
        again = True
        try:
            mixed = module(_at_image(args[0], site, image_rows, mix))  # with its LoRA, whose hook came before this one
        finally:
            again = False
        columns = slice(*site.columns) if site.columns else slice(None)
        output = output.clone()
        output[..., columns] = mixed[..., columns]
        return output

    return hook


def _at_image(
    x: Tensor, site: AttentionSite, image_rows: int, change: Change, columns: tuple[int, int] | None = None
) -> Tensor:
    """A sequence (B, N, D) changed where the image lies in it."""
    if site.rows == "all" and columns is None:
        return change(x)
    first, last = {"all": (0, None), "first": (0, image_rows), "last": (x.shape[1] - image_rows, None)}[site.rows]
    part = (slice(None), slice(first, last), slice(*columns) if columns else slice(None))
    changed = x.clone()
    changed[part] = change(x[part])
    return changed


@contextmanager
def self_attention(network: nn.Module, processor: Any, within: str = "") -> Iterator[None]:
    """While open, the self-attention layers whose path starts with `within` work by a diffusers attention processor."""
    before: dict[Any, Any] = {}
    try:
        for name, module in network.named_modules():
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
