"""How many processes work side by side."""

from __future__ import annotations

import re

import torch

from ..errors import ConfigError


def choose_jobs(text: str, device: str | None) -> int:
    """ "auto": one process for each GPU; on a CPU one, whose threads take all cores. Otherwise the number."""
    if text == "auto":
        return max(1, torch.cuda.device_count()) if device in (None, "cuda") else 1
    if not re.fullmatch(r"\d{1,3}", text) or int(text) < 1:
        raise ConfigError(f'jobs is {text!r}, but must be "auto" or a whole number of at least 1.')
    return int(text)
