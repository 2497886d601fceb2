"""Work that goes on in smaller parts where memory, a GPU's or the machine's, does not hold the larger ones."""

from __future__ import annotations

import ctypes
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch

from ..errors import OutOfMemory
from .backbone import Backbone

R = TypeVar("R")

_ONEDNN = "could not create a primitive"  # a convolution's own space on a CPU
#: What torch's own errors say when memory runs out, beside `torch.OutOfMemoryError` and Python's `MemoryError`.
_SAID = ("out of memory", "can't allocate memory", "cannot allocate memory", "ALLOC_FAILED", "bad_alloc", _ONEDNN)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out, or was raised because of one that does."""
    while error is not None:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError, OutOfMemory)):
            return True
        if isinstance(error, (RuntimeError, OSError)) and any(said in str(error) for said in _SAID):
            return True
        error = error.__cause__
    return False


def in_parts(
    backbone: Backbone,
    doing: str,
    unit: str,
    cells: tuple[int, int],
    size: int,
    work: Callable[[int], R],
    least: int = 1,
) -> R:
    """What `work(size)` gives, from parts of at most `size`; where memory runs out, of half as many, down to `least`.

    doing, unit: for people, "sample" and "frame" say; cells: height and width of the latents. What turned out to fit is
    remembered in `backbone.fits` for the next time. Raises `OutOfMemory`, which says what would need less.
    """
    known = (doing, *cells)
    size = min(size, backbone.fits.get(known, size))
    while True:
        try:
            return work(size)
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            if size <= least:
                raise OutOfMemory(_give_up(backbone, f"{doing} one {unit}", cells)) from error
        # The error is gone here, and with it what its traceback kept in memory.
        smaller = backbone.fits[known] = size // 2
        then = f"{smaller} at once" if smaller else "gradient checkpointing, which takes longer"
        warnings.warn(
            f"not enough memory to {doing} {size} {unit}{'s' * (size > 1)} at once; going on with {then}.", stacklevel=3
        )
        free(backbone.device)
        size = smaller


@contextmanager
def explained(backbone: Backbone, doing: str, cells: tuple[int, int]) -> Iterator[None]:
    """While open, an error of memory that runs out is an `OutOfMemory`, which says what would need less."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(_give_up(backbone, doing, cells)) from error


def free(device: torch.device) -> None:
    """Give back what torch, and on Linux the C library, keep for later: not all who ask are served from that."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()


def _give_up(backbone: Backbone, doing: str, cells: tuple[int, int]) -> str:
    height, width = (side * backbone.vae_factor for side in cells)
    less = [] if backbone.low_memory else ["--low-memory (low_memory=True)"]
    if getattr(backbone.network, "dtype", None) == torch.float32:
        less.append("--dtype bfloat16")
    smaller = [
        max(backbone.smallest_side, int(side / 2**0.5) // backbone.size_multiple * backbone.size_multiple)
        for side in (width, height)
    ]
    if smaller != [width, height]:
        less.append(f"--size {smaller[0]}x{smaller[1]}")
    kind = "memory" if backbone.device.type == "cpu" else f"memory of the device ({backbone.device.type})"
    tips = ", ".join(less) if less else "a smaller model, or more memory"
    return f"not enough {kind} to {doing} at {width}x{height}; what needs less: {tips}."
