"""Write docs/licences.md: what this project stands on, and the licence of each package as it says itself.

python scripts/licences.py            # from what is installed: a development environment has all of it
python scripts/licences.py --check    # status 1 where the page says something else
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PAGE = Path(__file__).resolve().parents[1] / "docs" / "licences.md"
#: Extras that come with the program, in the order of the page; "dev" and "docs" are for those who work on it.
EXTRAS = ("", "web", "bench", "ray", "serve")
#: Where a package's own metadata say nothing, or a whole text: as its LICENSE file has it.
KNOWN = {"stlpips-pytorch": "BSD-2-Clause"}
_HEAD = """# Licences

diffmorpher is under the Apache License 2.0; data that it carries are in NOTICE. Installing it brings the packages below, each
under a licence of its own, which is what its metadata say. None is copied into this package. PyAV's wheels carry FFmpeg, and
with it x264, which writes .mp4 and is under the GPL. Written by `scripts/licences.py`.

| Package | Licence | Comes with |
| --- | --- | --- |
"""


def licence(package: Distribution) -> str:
    """The licence that a package's metadata name: an expression, a short text, or classifiers."""
    about = package.metadata
    short = about.get("License") or ""
    short = "" if len(short) > 80 or short == "UNKNOWN" else short.strip()  # else the whole text
    found = about.get("License-Expression") or KNOWN.get(canonicalize_name(package.name)) or short
    classifiers = [c.split(" :: ")[-1] for c in about.get_all("Classifier") or () if c.startswith("License ::")]
    return (found or " and ".join(classifiers) or "not said").replace("|", "/").replace("\n", " ")


def closure(extra: str, name: str = "diffmorpher") -> set[str]:
    """Every package that an installation with this extra brings, by canonical names, as far as it is installed here."""
    found: set[str] = set()
    open_: list[tuple[str, frozenset[str]]] = [(name, frozenset({extra}))]
    done = set()
    while open_:
        each = open_.pop()
        if each in done:
            continue
        done.add(each)
        try:
            package = distribution(each[0])
        except PackageNotFoundError:
            continue  # for another system, or not chosen here
        if each[0] != name:
            found.add(canonicalize_name(package.name))
        for line in package.requires or ():
            wanted = Requirement(line)
            if wanted.marker is None or any(wanted.marker.evaluate({"extra": e}) for e in each[1] | {""}):
                open_.append((canonicalize_name(wanted.name), frozenset(wanted.extras)))
    return found


def page(extras: Iterable[str] = EXTRAS) -> str:
    first: dict[str, str] = {}
    for extra in extras:
        for name in sorted(closure(extra)):
            first.setdefault(name, f"`[{extra}]`" if extra else "every installation")
    rows = (f"| {name} | {licence(distribution(name))} | {with_} |" for name, with_ in sorted(first.items()))
    return _HEAD + "\n".join(rows) + "\n"


def names_of(text: str) -> set[str]:
    return set(re.findall(r"^\| ([a-z0-9-]+) \| ", text, re.MULTILINE))


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        same = PAGE.is_file() and PAGE.read_text("utf-8") == text
        print("docs/licences.md is right." if same else "docs/licences.md is out of date: python scripts/licences.py")
        return 0 if same else 1
    PAGE.write_text(text, "utf-8")
    print(f"{PAGE}: {len(names_of(text))} packages.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
