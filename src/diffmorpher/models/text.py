"""Prompts to tokens, the same way for every text encoder."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any


def with_all_vectors(pipe: Any, prompts: Sequence[str], tokenizer: Any) -> list[str]:
    """The prompts with every token of a textual inversion as all that it has vectors for, as diffusers' pipelines do."""
    added, convert = tokenizer.get_added_vocab(), getattr(pipe, "maybe_convert_prompt", None)
    used = any(
        token in prompt for token in added for prompt in prompts
    )  # else diffusers logs of long prompts for nothing
    return convert(list(prompts), tokenizer) if convert and used else list(prompts)


def tokenized(tokenizer: Any, prompts: Sequence[str], limit: int) -> Any:
    """`input_ids` and `attention_mask`, (B, limit) each, padded; a longer prompt is cut, with a warning."""
    warn_if_cut(tokenizer, prompts, limit)
    return tokenizer(list(prompts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt")


def warn_if_cut(tokenizer: Any, prompts: Sequence[str], limit: int) -> None:
    """Warn of every prompt that is longer than the model reads."""
    for prompt in prompts:
        length = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
        if length > limit:
            warnings.warn(
                f"the prompt {prompt[:40]!r}... has {length} tokens; the model reads the first {limit} of them.",
                stacklevel=4,
            )
