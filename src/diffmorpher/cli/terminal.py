"""What the command line shows on standard error: warnings, a bar for each stage, and the summary of a run."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich import box
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ..progress import console, say
from . import signals


def begin(debug: bool) -> None:
    """What every command does first."""
    quiet_libraries()
    show_warnings(others=debug)


def quiet_libraries() -> None:
    """Errors only, and no bars, from the libraries below; to be called before they are imported."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def show_warnings(others: bool) -> None:
    """Show this package's warnings as one line each, and those of other packages only if asked to."""
    said: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in said:
            said.add(str(message))
            say(f"diffmorpher: warning: {message}")

    if not others:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module=r"diffmorpher\b")
    warnings.showwarning = show


class StageBars:
    """A `progress(stage, done, total)` callback: a bar for each stage, or without a terminal a line as each ends.

    Used in a `with` block.
    """

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_interactive,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last = ("", time.perf_counter())  # the stage at work, and when the one before it ended
        self._since = self._last[1]

    def __enter__(self) -> StageBars:
        signals.stop_by_exception()
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        signals.check()
        before, when = self._last
        if stage != before:
            self._since = when
        self._last = (stage, time.perf_counter())
        if console.is_interactive:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total)
            self._bars.update(self._tasks[stage], completed=done, total=total)
        elif done >= total:
            say(f"{stage} {done}/{total}, {self._last[1] - self._since:.1f} s")


def show_seconds(seconds: Mapping[str, float]) -> None:
    """A small table of the wall time of each stage and of all."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for stage in (*seconds, "total"):
        table.add_column(stage, justify="right")
    table.add_row(*(f"{s:.1f} s" for s in (*seconds.values(), sum(seconds.values()))))
    console.print(table)
