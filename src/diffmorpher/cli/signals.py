"""How the program is stopped: at once as long as there is nothing to clean up, in good order once the work has begun.

Imports next to nothing, so that it is in force before anything slow is imported.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

#: Ctrl-C; a request to end; the terminal that was closed (which Windows does not have).
_SIGNALS = [number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None))]
_armed = False
_asked: int | None = None


def stop_at_once() -> None:
    """From now on end without an exception: in the midst of an import it may be swallowed, or break a library."""
    global _armed
    _armed = True
    _handle(_end)


def stop_by_exception() -> None:
    """From now on raise `KeyboardInterrupt`, so that what is half-written is removed; for whom `stop_at_once` was meant."""
    if _armed:
        _handle(_raise)


def check() -> None:
    """Raise `KeyboardInterrupt` if one was asked for and swallowed, as by a callback in C."""
    if _asked is not None:
        raise KeyboardInterrupt


def leave(status: int) -> NoReturn:
    """End the process; when it was stopped, without waiting for threads that are at work on what nobody wants any more."""
    for number in _SIGNALS:  # another one would only break into the way out
        if _armed:
            signal.signal(number, signal.SIG_IGN)
    if _armed and stopped(status):
        os._exit(status)
    sys.exit(status)


def stopped(status: int) -> bool:
    """Whether an exit status is that of a process which was stopped."""
    return status in [128 + number for number in _SIGNALS]


def status() -> int:
    """The exit status of whoever was stopped, as shells have it: 128 and the signal's number."""
    return 128 + (_asked or signal.SIGINT)


def _handle(handler: object) -> None:
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # `nohup`
            signal.signal(number, handler)  # type: ignore[arg-type]


def _raise(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = number
    raise KeyboardInterrupt


def _end(number: int, frame: FrameType | None) -> None:
    clear = b"\r\x1b[2K\x1b[?25h" if os.isatty(2) else b""  # a bar may be there, and no cursor
    with suppress(OSError):
        os.write(2, clear + b"diffmorpher: stopped\n")
    os._exit(128 + number)
