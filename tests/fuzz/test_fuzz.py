"""A short run of `run.py`, and that what it watches for is seen."""

from __future__ import annotations

import os
import subprocess
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from readers import READERS
from run import made, warm
from watching import Bad, attempt

from diffmorpher.errors import ImageError

COUNTS = {"paths": 25, "results": 30}


@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_are_read_or_refused(reader: str, tmp_path: Path) -> None:
    (seeds_in := tmp_path / "seeds").mkdir()
    (folder := tmp_path / "work").mkdir()
    seeds = READERS[reader].seeds(seeds_in)
    warm(reader, seeds, folder)
    count, refused = COUNTS.get(reader, 60), 0
    for number in range(count):
        name, content = made(reader, number, seeds)
        (folder / name).write_bytes(content)
        try:
            refused += not attempt(READERS[reader].read, folder / name, folder)
        except Bad as error:
            raise AssertionError(f"input {number}: {error}") from error
    assert 0 < refused < count


def test_the_same_numbers_give_the_same_inputs() -> None:
    seeds = [("a", b'{"a": [1, 2, 3]}'), ("b", bytes(100))]
    inputs = [made("x", number, seeds) for number in range(200)]
    assert inputs == [made("x", number, seeds) for number in range(200)]
    assert len(set(inputs)) > 120 and not any(content in (seeds[0][1], seeds[1][1]) for _, content in inputs[:3])


def _long(file: Path) -> None:
    while True:
        pass


def _hidden(file: Path) -> None:
    with suppress(Exception):
        _long(file)


def _two_lines(file: Path) -> None:
    error = ImageError("a")
    error.args = ("a\nb",)  # in the making it would become one
    raise error


def _large(file: Path) -> None:
    bytearray(b"x") * 2**27


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another's error": (lambda file: {}["a"], "raises KeyError"),
    "two lines": (_two_lines, "no sentence"),
    "no words": (lambda file: (_ for _ in ()).throw(ImageError("")), "no sentence"),
    "hangs": (_long, "works for more than 0.3 s"),
    "hangs and hides it": (_hidden, "works for more than 0.3 s"),
    "memory": (_large, "takes 1.. MiB"),
    "a program": (lambda file: subprocess.run(["true"]), "subprocess.Popen"),
    "a shell": (lambda file: os.system("true"), "os.system"),
    "code": (lambda file: exec("1 + 1"), "exec of '<string>'"),
    "writes": (lambda file: (file.parent.parent / "x").write_text(""), "to write"),
    "makes folders": (lambda file: (file.parent.parent / "y").mkdir(), "os.mkdir"),
    "network": (lambda file: urllib.request.urlopen("http://127.0.0.1:9", timeout=1), "URLError|socket.connect"),
    "removes": (lambda file: (file.parent.parent / "z").unlink(missing_ok=True), "os.remove"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_no_reader_may_do_is_seen(kind: str, tmp_path: Path) -> None:
    read, message = BAD[kind]
    (folder := tmp_path / "work").mkdir()
    seconds = 0.3 if kind.startswith("hangs") else 5  # new memory alone may take 0.4 s on a machine that is short of it
    with pytest.raises(Bad, match=message):
        attempt(read, folder / "file", folder, seconds=seconds, size=2**26)
    assert attempt(lambda file: (file.parent / "x").write_text("x"), folder / "file", folder)
    assert not attempt(lambda file: (_ for _ in ()).throw(ImageError("no picture")), folder / "file", folder)
