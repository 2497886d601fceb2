"""CLIP's tokenizers, built from the one bundled vocabulary: Stable Diffusion 1.x, 2.x and XL differ in their padding alone."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

from .catalog import ASSETS

CONFIGS = ASSETS / "configs"
#: CLIP uses the first 48,894 merges of the file, which has 262,144: 49,408 tokens with 2 x 256 bytes and two marks.
_MERGES = 49408 - 512 - 2


def clip_tokenizer(folder: Path) -> Any:
    """The tokenizer that a folder's `tokenizer_config.json` describes."""
    from transformers import CLIPTokenizer

    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    del settings["tokenizer_class"]
    vocab, merges = _vocabulary()
    return CLIPTokenizer(dict(vocab), list(merges), **settings)


@cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens with their ids: bytes, bytes that end a word, merges in the file's order, start and end of a text."""
    lines = gzip.decompress((CONFIGS / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode("utf-8").split("\n")
    merges = [(first, second) for first, second in map(str.split, lines[1 : _MERGES + 1])]
    letters = _bytes_as_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    return {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}, merges


def _bytes_as_letters() -> list[str]:
    """A letter for each byte, in CLIP's order: those that can be printed stand for themselves and come first."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printed] + [chr(256 + i) for i in range(256 - len(printed))]
