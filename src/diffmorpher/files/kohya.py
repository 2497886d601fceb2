"""LoRAs of U-Nets by kohya's names, which diffusers, ComfyUI, the web UIs and kohya's own scripts all read."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from .lora_families import made_for

#: An attention layer as diffusers names it.
_ATTENTION = re.compile(
    r"(?:(?P<side>down|up)_blocks\.(?P<block>\d+)|mid_block)\.attentions\.(?P<layer>\d+)\.(?P<rest>.+)"
)


def with_kohyas_names(down: Mapping[str, Tensor], up: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA's matrices by kohya's keys. No alpha is written, which means scale 1 to all readers; diffusers would misplace the
    alphas of several ranks."""
    xl = made_for(down) == "Stable Diffusion XL"
    tensors: dict[str, Tensor] = {}
    for name in down:
        key = "lora_unet_" + (_stabilitys(name) if xl else name).replace(".", "_")
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = down[name], up[name]
    return tensors


def _stabilitys(name: str) -> str:
    """An attention layer by the block names of Stability's code, which kohya's files for SDXL have; two layers a block."""
    match = _ATTENTION.fullmatch(name)
    if match is None:  # the scripts' own readers take both
        return name
    if match["side"] is None:
        return f"middle_block.1.{match['rest']}"
    side, number = ("input", 1) if match["side"] == "down" else ("output", 0)
    return f"{side}_blocks.{3 * int(match['block']) + int(match['layer']) + number}.1.{match['rest']}"
