"""Writing so that a file is there whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def temporary(folder: Path) -> Iterator[Path]:
    """A free name in `folder`; what still bears it at the end, for whatever reason, is removed."""
    path = folder / f".diffmorpher-{secrets.token_hex(4)}.part"
    try:
        yield path
    finally:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to, which takes `path`'s place if the block ends well. Parent folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary(path.parent) as part:
        yield part
        os.replace(part, path)
