"""A bank of LoRAs, one per image, that adds to a network's linear layers row by row (method, sections 2 and 3)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from ..errors import LoraError
from ..files.lora_families import made_for
from ..files.loras import Lora


class LoraBank:
    """K LoRAs over the same layers: `down[name]` is A, (K, r, in), and `up[name]` is B, (K, out, r), both float32.

    A of a convolution is one itself, (K, r, in, h, w). While `attached`, the layer at `name` adds `B_b A_b x` to row b of its
    batch; `set_rows` says what row b's mixture is.
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
        cls,
        loras: Sequence[Lora],
        network: nn.Module,
        names: Sequence[str],
        device: torch.device | str = "cpu",
        family: str = "",
    ) -> LoraBank:
        """A bank from LoRAs made earlier; smaller ranks and missing layers are filled with zeros, which changes nothing.

        names: what to call each LoRA in an error, its file say; family: the model's, for the same. Raises `LoraError` if one
        does not fit the network.
        """
        found = _layers(network)
        loras = [_fitted(lora, found, name, family) for lora, name in zip(loras, names, strict=True)]
        layers = [name for name in found if any(name in lora.down for lora in loras)]
        down, up = {}, {}
        for layer in layers:
            rank = max(lora.down[layer].shape[0] for lora in loras if layer in lora.down)
            in_features, out_features = _features(found[layer])
            down[layer] = torch.zeros(len(loras), rank, *in_features, device=device)
            up[layer] = torch.zeros(len(loras), out_features, rank, device=device)
            for k, lora in enumerate(loras):
                if layer in lora.down:
                    r = lora.down[layer].shape[0]
                    down[layer][k, :r] = lora.down[layer].to(device)
                    up[layer][k, :, :r] = lora.up[layer].to(device)
        return cls(down, up, [lora.metadata for lora in loras])

    @classmethod
    def joined(
        cls,
        loras: Sequence[Lora],
        network: nn.Module,
        names: Sequence[str],
        device: torch.device | str = "cpu",
        family: str = "",
    ) -> LoraBank:
        """A bank of one LoRA that adds what all of these do together. Arguments and errors as in `stack`."""
        found = _layers(network)
        loras = [_fitted(lora, found, name, family) for lora, name in zip(loras, names, strict=True)]
        down, up = {}, {}
        for layer in found:
            if mine := [lora for lora in loras if layer in lora.down]:
                down[layer] = torch.cat([lora.down[layer] for lora in mine])[None].to(device)
                up[layer] = torch.cat([lora.up[layer] for lora in mine], dim=1)[None].to(device)
        return cls(down, up, [{}])

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

    def check(self, network: nn.Module) -> None:
        """Raise `LoraError` if it does not fit the network."""
        found = _layers(network)
        for k in range(len(self.metadata)):
            _check_fits(self.lora(k), found, f"LoRA {k}")

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
                self._rows[name] = torch.einsum("bk,k...->b...", w, down), torch.einsum("bk,kor->bor", w, up)
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
            x = args[0]  # (B, N, in); (B, in) for time embeddings; (B, in, H, W) for convolutions
            if down.ndim == 5:
                return output + _convolved(module, x, down.to(x.dtype), up.to(x.dtype))
            module = getattr(module, "base_layer", module)
            pixels = isinstance(module, nn.Conv2d)
            flat = x.flatten(2).transpose(1, 2) if pixels else x.reshape(x.shape[0], -1, x.shape[-1])
            # (K, B / K x N, in) while no rows are set: the batch is in K equal parts, one for each LoRA.
            low = torch.bmm(flat.reshape(len(down), -1, flat.shape[-1]), down.to(x.dtype).transpose(1, 2))
            high = torch.bmm(low, up.to(x.dtype).transpose(1, 2)).reshape(*flat.shape[:2], -1)  # (B, N, out)
            return output + (high.transpose(1, 2) if pixels else high).reshape(output.shape)

        return add_lora


def _convolved(layer: Any, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """What the LoRA adds to a convolution: its A as the layer convolves, then its B.   # (B, in, H, W) -> (B, out, H', W')

    All rows in one convolution, each in groups of its own; down: (K, r, in, h, w), B rows in K equal parts.
    """
    batch, rank = len(x), down.shape[1]
    each = batch // len(down)
    down, up = down.repeat_interleave(each, 0), up.repeat_interleave(each, 0)
    low = conv2d(
        x.reshape(1, -1, *x.shape[2:]), down.flatten(0, 1), None, layer.stride, layer.padding, layer.dilation, batch
    )
    high = torch.bmm(up, low.reshape(batch, rank, -1))  # (B, out, H' W')
    return high.reshape(batch, -1, *low.shape[2:])


def _layers(network: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers a LoRA may add to, by module path: linear ones and convolutions in one group.

    A layer to which the user has loaded adapters (PEFT's) counts as the one in it, at its own path.
    """
    found, wrapper = {}, ""
    for name, module in network.named_modules():
        if wrapper and name.startswith(wrapper):
            continue
        if hasattr(module, "base_layer"):
            wrapper, module = f"{name}.", module.base_layer
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            found[name] = module
    return found


def _features(layer: nn.Linear | nn.Conv2d) -> tuple[tuple[int, ...], int]:
    """Sizes of A without its rank, and rows of B. Not by the weight's shape: a quantised layer's is packed."""
    if isinstance(layer, nn.Linear):
        return (layer.in_features,), layer.out_features
    kernel = layer.kernel_size if max(layer.kernel_size) > 1 else ()  # 1 x 1 convolutions are linear per pixel
    return (layer.in_channels, *kernel), layer.out_channels


def _fitted(lora: Lora, layers: dict[str, nn.Linear | nn.Conv2d], name: str, family: str) -> Lora:
    """The LoRA as factors alone: kernels that lay flat in their shape, and what goes by the model's own weights worked out."""
    down, up = dict(lora.down), dict(lora.up)
    for layer, matrix in down.items():
        sizes = _features(layers[layer])[0] if layer in layers else ()
        if matrix.ndim == 2 and len(sizes) == 3 and matrix.shape[1] == math.prod(sizes):
            down[layer] = matrix.reshape(-1, *sizes)
    for layer in lora.gains:
        if found := layers.get(layer):
            down.setdefault(layer, torch.zeros(1, *_features(found)[0], dtype=torch.float32, device="cpu"))
            up.setdefault(layer, torch.zeros(_features(found)[1], 1, dtype=torch.float32, device="cpu"))
    lora = replace(lora, down=down, up=up)
    _check_fits(lora, layers, name, family)
    for layer, (kind, gain) in lora.gains.items():
        if layer not in layers:
            raise LoraError(f"{name}: the LoRA is for another model (this one has no such layer as {layer}).")
        difference = _difference(layers[layer], kind, gain, down[layer], up[layer], f"{name}: {layer}")
        down[layer] = (lora.strength * difference).reshape(-1, *down[layer].shape[1:])
        up[layer] = torch.eye(len(difference), dtype=torch.float32, device="cpu")
    return replace(lora, down=down, up=up, gains={})


@torch.no_grad()
def _difference(layer: nn.Linear | nn.Conv2d, kind: str, gain: Tensor, down: Tensor, up: Tensor, name: str) -> Tensor:
    """What DoRA or IA3 adds to a layer's weights, (out, in ...), the last dimensions flat."""
    if not layer.weight.is_floating_point() or layer.weight.numel() != len(up) * down[0].numel():
        raise LoraError(
            f"{name} is changed in proportion to its weights, which are quantised here; load the model without."
        )
    weight = layer.weight.detach().cpu().float()  # (out, in) or (out, in, h, w)
    flat = weight.flatten(1)
    outputs, inputs = weight.shape[:2]
    # PEFT's lengths of kernels are (1, out, 1, 1), LyCORIS' by inputs (1, in, 1, 1).
    each_input = kind != "magnitude" and gain.ndim > 1 and gain.shape[0] == 1 and outputs > 1
    if gain.numel() != (inputs if each_input else outputs):
        raise LoraError(
            f"{name}: the LoRA is for another model (it has {gain.numel()} factors there, this model {outputs} outputs and "
            f"{inputs} inputs)."
        )
    shape = [1] * weight.ndim
    shape[int(each_input)] = -1
    if kind == "ia3":
        if layer.bias is not None and not each_input:
            raise LoraError(f"{name} has a bias, which an IA3 scales too; that is not supported.")
        return (weight * (gain.reshape(shape) - 1)).flatten(1)
    whole = (flat + up @ down.flatten(1)).reshape(weight.shape)
    length = torch.linalg.vector_norm(whole, dim=[d for d in range(weight.ndim) if d != int(each_input)], keepdim=True)
    if not length.all():
        raise LoraError(f"{name}: a DoRA gives a length to weights that are all 0; the file does not fit this model.")
    return (whole * (gain.reshape(shape) / length) - weight).flatten(1)


def _check_fits(lora: Lora, layers: dict[str, nn.Linear | nn.Conv2d], name: str, family: str = "") -> None:
    for layer, down in lora.down.items():
        found, up = layers.get(layer), lora.up[layer]
        if found is not None and (down.shape[1:], up.shape[0]) == _features(found):
            continue
        theirs = made_for(lora.down)
        if family and theirs not in ("", family):
            raise LoraError(f"{name} is a LoRA for {theirs}, the model is {family}: give one made for that.")
        if found is None:
            raise LoraError(f"{name}: the LoRA is for another model (this one has no such layer as {layer}).")
        in_features, out_features = _features(found)
        raise LoraError(
            f"{name}: the LoRA is for another model (its {layer} maps {_said(down.shape[1:])} to {up.shape[0]} features, "
            f"this model's {_said(in_features)} to {out_features})."
        )


def _said(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
