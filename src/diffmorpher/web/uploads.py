"""Files outside the visitors' folders, where gradio puts what they send and what programs fetch: they go with the visitors."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from .visits import Session

#: Seconds after which an upload that has not come to its end never will.
BROKEN_OFF = 3600.0


class Uploads:
    """Who holds which file. Equal files of several visitors are one file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.own: set[Path] = set()  # the page's own pictures, which a visitor may send too, and which stay
        self._held: Counter[tuple[Path, int]] = Counter()  # by file and inode
        self._lock = threading.Lock()

    def hold(self, session: Session, file: Path) -> None:
        """A file that must go when the visitor goes."""
        file = Path(os.path.abspath(file))  # one name for each, whatever a program sends
        if file in self.own or not file.is_file():
            return
        with self._lock:
            # Who sends an equal file puts a new one in the place of this, which must not go with who sent it before.
            held = file, file.stat().st_ino
            session.uploads.append(held)
            self._held[held] += 1
        if session.closed:
            self.release(session)

    def release(self, session: Session) -> None:
        """The visitor has gone."""
        with self._lock:
            held, session.uploads = session.uploads, []
            self._held.subtract(held)
            gone = [each for each in held if self._held[each] <= 0]
            for each in gone:
                self._held.pop(each, None)
        for file, inode in gone:
            with suppress(OSError):
                if file.stat().st_ino == inode:
                    file.unlink()

    def tidy(self) -> None:
        """Remove what broke off, and the folders that gradio makes for each file, once nobody is about to use them again."""
        for path in self._folder.glob("*"):
            with suppress(OSError):  # such as that of a folder with a file in it
                if path.stat().st_mtime < time.time() - BROKEN_OFF:
                    path.rmdir() if path.is_dir() else path.unlink()
