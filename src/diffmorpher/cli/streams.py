"""Standard input, output and error as a program needs them that may be at work for hours. Imports next to nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


def secure_streams() -> None:
    """Let nobody's reading decide whether a film is made: closed streams are opened, broken ones go nowhere."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # else the next file that is opened would be taken for it
            os.open(os.devnull, os.O_RDWR)
    # What is said may be lost, results only where their reader wants no more of them (`| head -1`).
    sys.stdout = _Losing(sys.stdout or open(os.devnull, "w"), 1, BrokenPipeError)  # noqa: SIM115
    sys.stderr = _Losing(sys.stderr or open(os.devnull, "w"), 2, OSError)  # noqa: SIM115


class _Losing:
    """A stream of a given number that goes nowhere once it has met one of these errors."""

    def __init__(self, stream: TextIO, number: int, errors: type[OSError]) -> None:
        self._stream, self._number, self._errors = stream, number, errors

    def write(self, text: str) -> int:
        with self._lost():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._lost():
            self._stream.flush()

    @contextmanager
    def _lost(self) -> Iterator[None]:
        try:
            yield
        except self._errors:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._number)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def close_stdout() -> None:
    """Nobody may be left to read standard output: then Python must not complain on its way out."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
