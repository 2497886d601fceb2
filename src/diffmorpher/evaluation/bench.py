"""The benchmark's runner: every method on every pair, one folder for each, finished ones never made twice."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from ..errors import ConfigError
from ..progress import AWAKE, quiet_bars
from .cluster import run_on_ray
from .datasets import Pair
from .worker import Settings, Worker, finished


def parse_shard(text: str | None) -> tuple[int, int]:
    """ "2/8" as (2, 8); None is all of it, (1, 1). Raises `ConfigError`."""
    if text is None:
        return 1, 1
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"the shard {text!r} is not of the form i/n with i from 1 to n, such as 2/8.")
    return int(match[1]), int(match[2])


def run_bench(
    pairs: Sequence[Pair], settings: Settings, out: Path, jobs: int = 1, ray: str | None = None
) -> Iterator[tuple[str, str]]:
    """Run what is missing; yields (pair, method) as each is done or was found. Ctrl-C loses at most what is at work.

    jobs: processes, each with its own model; on a machine with several GPUs each takes one. ray: the address of a Ray cluster,
    "local" starts one.
    """
    if all(finished(out, pair, method, settings) for pair in pairs for method in settings.methods):
        yield from ((pair.name, method) for pair in pairs for method in settings.methods)
    elif ray is not None:
        yield from run_on_ray(pairs, settings, out, ray, jobs)
    elif jobs == 1:
        worker = Worker(settings, out)
        for pair in pairs:
            yield from worker.run_pair(pair)
    else:
        yield from _in_processes(pairs, settings, out, jobs)


# ---- several processes on one machine

_worker: Worker | None = None
_at_work = False


def _start(settings: Settings, out: Path, jobs: int, numbers: Any) -> None:
    global _worker
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _stop)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    quiet_bars()  # of every process's own loading
    number = numbers.get()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    gpus = torch.cuda.device_count()
    device = f"cuda:{number % gpus}" if gpus and settings.device in (None, "cuda") else None
    _worker = Worker(settings, out, device)


def _stop(number: int, frame: FrameType | None) -> None:
    """End this process within a step, what is half-written being removed; another signal must not break into that."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    if _at_work:
        raise KeyboardInterrupt
    os._exit(1)


def _stop_with_parent() -> None:
    """Whoever asked may be killed: nobody wants this process's work then."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    else:  # Windows
        os._exit(1)


def _work(pair: Pair) -> str:
    global _at_work
    assert _worker is not None
    _at_work = True
    try:
        _worker.make_pair(pair)
    except KeyboardInterrupt:
        os._exit(1)
    finally:
        _at_work = False
    return pair.name


def _in_processes(pairs: Sequence[Pair], settings: Settings, out: Path, jobs: int) -> Iterator[tuple[str, str]]:
    from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait

    context = multiprocessing.get_context("spawn")
    numbers = context.SimpleQueue()
    for number in range(jobs):
        numbers.put(number)
    pool = ProcessPoolExecutor(jobs, context, _start, (settings, out, jobs, numbers))
    try:
        at_work = {pool.submit(_work, pair) for pair in pairs}
        while at_work:
            done, at_work = wait(at_work, AWAKE, FIRST_COMPLETED)
            yield from ((pair.result(), method) for pair in done for method in settings.methods)
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
