"""Layers that make more than keys and values, and sequences that hold more than the image, against a plain loop."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from diffmorpher.method.attention import interpolated_attention
from diffmorpher.method.interpolate import Between
from diffmorpher.method.lora import LoraBank
from diffmorpher.models.backbone import AttentionSite

TEXT, IMAGE = 3, 4


class Fused(nn.Module):
    """Queries, keys, values and a part of an MLP from one layer, as FLUX.2's single blocks have them: 2 + 2 + 2 + 5 columns."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["features", "kv"])
@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("columns", [None, (2, 6)])
def test_only_the_images_keys_and_values_are_mixed(mode: Any, place: Any, columns: Any) -> None:
    net, x = Fused(), torch.randn(3, TEXT + IMAGE, 6)  # rows: left, right, one between
    bank = LoraBank.create({"proj": net.proj}, 3, rank=2, seed=0)
    bank.up["proj"] = torch.randn(3, 11, 2)
    rows = Between(torch.tensor([0, 1, 0]), torch.tensor([0, 1, 1]), torch.tensor([0.0, 0.0, 0.3]))
    backbone: Any = SimpleNamespace(network=net, attention_sites=lambda: [AttentionSite("proj", place, columns)])

    def plain(row: int, h: torch.Tensor) -> torch.Tensor:
        lora = bank.up["proj"][row] @ bank.down["proj"][row]
        return h @ (net.proj.weight + lora).T + net.proj.bias

    with bank.attached(net):
        with interpolated_attention(backbone, rows, mode, IMAGE):
            got = net(x)
        after = net(x)
    want = torch.stack([plain(row, x[row]) for row in range(3)])
    assert_close(after, want)  # the hooks are gone, the LoRA is not
    mixed = plain(2, 0.7 * x[0] + 0.3 * x[1]) if mode == "features" else 0.7 * want[0] + 0.3 * want[1]
    image = slice(IMAGE) if place == "first" else slice(TEXT, None)
    part = slice(*columns) if columns else slice(None)
    want[2, image, part] = mixed[image, part]
    assert_close(got, want)
