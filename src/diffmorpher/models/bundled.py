"""The bundled model's files as they were published: checked when it is loaded, once in each process."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from ..errors import ModelError
from ..files.atomic import file_hash

#: Lines of "SHA-256  file", as sha256sum writes and checks them.
SUMS = "SHA256SUMS"


def write_sums(folder: Path) -> None:
    """List every file of a model but its card."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in (SUMS, "README.md"))
    lines = (f"{file_hash(file)}  {file.relative_to(folder).as_posix()}\n" for file in files)
    (folder / SUMS).write_text("".join(lines), "utf-8")


@cache  # what raises is asked again
def check_sums(folder: Path) -> None:
    """Raise `ModelError` where a file that is listed is missing or another."""
    try:
        listed = [line.split("  ", 1) for line in (folder / SUMS).read_text("utf-8").splitlines()]
        wrong = next((name for digest, name in listed if file_hash(folder / name) != digest), None)
    except (OSError, ValueError) as error:
        raise ModelError(f"the bundled model cannot be read ({error}): install diffmorpher again.") from error
    if wrong is not None or not listed:
        raise ModelError(
            f"the bundled model's {wrong or SUMS} is not the one that was published, it is damaged or was changed: install "
            "diffmorpher again, or give the folder of a model of your own with --model."
        )
