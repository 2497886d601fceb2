"""The process's own settings of torch, on which what comes out would depend: set for the time of the work, by one thread."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

#: Threads take turns, each holding it for a part of the work: a network has the LoRAs and hooks of one morph at a time, and
#: torch's settings are the whole process's.
_TURN = threading.RLock()


@contextmanager
def settled(tf32: bool = False) -> Iterator[None]:
    """While open, torch's default dtype and device are its own, autocast is off, and float32 products on a GPU are rounded to
    TF32 or not (torch's own default is to do so in convolutions). Afterwards each is as it was found.
    """
    # OpenMP's number of threads is each thread's own. A new one has the default's until torch is asked for the process's
    # (`torch.set_num_threads`) in it: convolutions would be split, and their sums rounded, otherwise than elsewhere.
    torch.get_num_threads()
    with _TURN, ExitStack() as stack:
        places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
        for place in places:
            stack.callback(setattr, place, "allow_tf32", place.allow_tf32)
            place.allow_tf32 = tf32
        if torch.get_default_dtype() != torch.float32:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def in_turn(function: Callable[P, R]) -> Callable[P, R]:
    """The function, working within `settled`."""

    @functools.wraps(function)
    def work(*args: P.args, **kwargs: P.kwargs) -> R:
        with settled():
            return function(*args, **kwargs)

    return work
