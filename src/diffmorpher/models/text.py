"""Prompts to tokens, the same way for every text encoder."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any


def tokenized(tokenizer: Any, prompts: Sequence[str], limit: int) -> Any:
    """`input_ids` and `attention_mask`, (B, limit) each, padded; a longer prompt is cut, with a warning."""
    for prompt in prompts:
        length = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
        if length > limit:
            warnings.warn(
                f"the prompt {prompt[:40]!r}... has {length} tokens; the model reads the first {limit} of them.",
                stacklevel=3,
            )
    return tokenizer(list(prompts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
