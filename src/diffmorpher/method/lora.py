"""A bank of LoRAs, one per image, that adds to a network's linear layers row by row (method, sections 2 and 3)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import LoraError
from ..files.loras import Lora


class LoraBank:
    """K LoRAs over the same layers: `down[name]` is A, (K, r, in), and `up[name]` is B, (K, out, r), both float32.

    While `attached`, the layer at `name` adds `B_b A_b x` to row b of its batch; `set_rows` says what row b's mixture is.
    `start` names the draw of A that all K began from, None where they did not begin from one.
    """

    def __init__(self, down: dict[str, Tensor], up: dict[str, Tensor], metadata: Sequence[dict[str, str]]):
        self.down, self.up = down, up
        self.metadata = list(metadata)
        self._rows: dict[str, tuple[Tensor, Tensor]] | None = None

    # ---- making one

    @classmethod
    def create(
        cls, layers: dict[str, nn.Linear], num_images: int, rank: int, seed: int, device: torch.device | str = "cpu"
    ) -> LoraBank:
        """Fresh LoRAs: one draw of A with standard deviation 1/r shared by all, B zero; so they add nothing yet."""
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same start on every device
        down, up, digest = {}, {}, hashlib.sha256()
        for name, layer in layers.items():
            a = torch.randn(rank, layer.in_features, generator=generator) / rank
            digest.update(a.numpy().tobytes())
            down[name] = a.to(device).repeat(num_images, 1, 1)
            up[name] = torch.zeros(num_images, layer.out_features, rank, device=device)
        start = {"rank": str(rank), "seed": str(seed), "start": digest.hexdigest()[:16]}
        return cls(down, up, [dict(start) for _ in range(num_images)])

    @classmethod
    def stack(
        cls, loras: Sequence[Lora], network: nn.Module, names: Sequence[str], device: torch.device | str = "cpu"
    ) -> LoraBank:
        """A bank from LoRAs made earlier; smaller ranks and missing layers are filled with zeros, which changes nothing.

        names: what to call each LoRA in an error, its file say. Raises `LoraError` if one does not fit the network.
        """
        linears = _linear_layers(network)
        for lora, name in zip(loras, names, strict=True):
            _check_fits(lora, linears, name)
        layers = [name for name in linears if any(name in lora.down for lora in loras)]
        down, up = {}, {}
        for layer in layers:
            rank = max(lora.down[layer].shape[0] for lora in loras if layer in lora.down)
            in_features, out_features = _features(linears[layer])
            down[layer] = torch.zeros(len(loras), rank, in_features, device=device)
            up[layer] = torch.zeros(len(loras), out_features, rank, device=device)
            for k, lora in enumerate(loras):
                if layer in lora.down:
                    r = lora.down[layer].shape[0]
                    down[layer][k, :r] = lora.down[layer].to(device)
                    up[layer][k, :, :r] = lora.up[layer].to(device)
        return cls(down, up, [lora.metadata for lora in loras])

    # ---- what is in it

    @property
    def start(self) -> str | None:
        starts = {m.get("start") for m in self.metadata}
        ranks = {m.get("rank") for m in self.metadata}
        return starts.pop() if len(starts) == 1 and len(ranks) == 1 else None

    def parameters(self) -> list[Tensor]:
        """All A and B, (K, ...) each, to be trained."""
        return [*self.down.values(), *self.up.values()]

    def lora(self, k: int) -> Lora:
        """Image k's LoRA by itself, on the CPU, to be saved or stacked with others."""
        return Lora(
            {name: a[k].detach().cpu().clone() for name, a in self.down.items()},
            {name: b[k].detach().cpu().clone() for name, b in self.up.items()},
            dict(self.metadata[k]),
        )

    # ---- using it

    @torch.no_grad()
    def set_rows(self, weights: Tensor, blend: Literal["auto", "factors", "product"] = "auto") -> None:
        """Row b is the mixture `weights[b]` of the K LoRAs, at most two of them non-zero.          # (B, K)

        "factors" mixes the matrices, `A_b = sum_k w_bk A_k`, `B_b` likewise; "product" the layers, `sum_k w_bk B_k A_k x`;
        "auto" takes factors where all began from one draw of A, product otherwise.
        """
        if blend == "auto":
            blend = "factors" if self.start else "product"
        self._rows = {}
        for name in self.down:
            down, up = self.down[name], self.up[name]
            w = weights.to(down)
            if blend == "factors":
                self._rows[name] = torch.einsum("bk,kri->bri", w, down), torch.einsum("bk,kor->bor", w, up)
            else:  # both neighbours' ranks side by side: one product of rank 2r
                w_2, k_2 = w.topk(min(2, w.shape[1]), dim=1)  # (B, 2)
                scaled = up[k_2] * w_2[:, :, None, None]  # (B, 2, out, r)
                self._rows[name] = down[k_2].flatten(1, 2), scaled.transpose(1, 2).flatten(2)

    @contextmanager
    def attached(self, network: nn.Module) -> Iterator[LoraBank]:
        """While open, the bank's layers of `network` add their LoRA; until `set_rows` part k of a batch uses LoRA k."""
        self._rows = None
        handles = []
        try:
            for name in self.down:
                handles.append(network.get_submodule(name).register_forward_hook(self._hook(name)))
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self._rows = None

    def _hook(self, name: str) -> Any:
        def add_lora(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            down, up = (self.down[name], self.up[name]) if self._rows is None else self._rows[name]
            x = args[0]  # (B, N, in); (B, in) for time embeddings; (B, in, H, W) for 1 x 1 convolutions
            pixels = isinstance(module, nn.Conv2d)
            flat = x.flatten(2).transpose(1, 2) if pixels else x.reshape(x.shape[0], -1, x.shape[-1])
            # (K, B / K x N, in) while no rows are set: the batch is in K equal parts, one for each LoRA.
            low = torch.bmm(flat.reshape(len(down), -1, flat.shape[-1]), down.to(x.dtype).transpose(1, 2))
            high = torch.bmm(low, up.to(x.dtype).transpose(1, 2)).reshape(*flat.shape[:2], -1)  # (B, N, out)
            return output + (high.transpose(1, 2) if pixels else high).reshape(output.shape)

        return add_lora


def _linear_layers(network: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers a LoRA may add to, by module path: linear ones, and 1 x 1 convolutions, which are linear per pixel."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
    }


def _features(layer: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    """In and out. Not by the weight's shape: a quantised layer's is packed."""
    return (
        (layer.in_channels, layer.out_channels)
        if isinstance(layer, nn.Conv2d)
        else (layer.in_features, layer.out_features)
    )


def _check_fits(lora: Lora, linears: dict[str, nn.Linear | nn.Conv2d], name: str) -> None:
    for layer, down in lora.down.items():
        linear = linears.get(layer)
        if linear is None:
            raise LoraError(f"{name}: the LoRA is for another model (this one has no linear layer {layer}).")
        up = lora.up[layer]
        in_features, out_features = _features(linear)
        if (up.shape[0], down.shape[1]) != (out_features, in_features):
            raise LoraError(
                f"{name}: the LoRA is for another model (its {layer} maps {down.shape[1]} to {up.shape[0]} features, "
                f"this model's {in_features} to {out_features})."
            )
