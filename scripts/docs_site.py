"""Hooks of mkdocs.yml: README.md becomes the front page, and what pages link to outside docs/ comes along, under source/."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from diffmorpher import _WHERE, __all__

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
#: Everything that `import diffmorpher` offers, from the docstrings.
API = "# API\n\nWhat `import diffmorpher` offers.\n\n" + "\n\n".join(
    f"::: diffmorpher.{_WHERE[name]}.{name}" for name in sorted(__all__)
)


def place(source: str) -> str:
    """Where a file of the repository stands in the site."""
    if source == "README.md":
        return "index.md"
    return source.removeprefix("docs/") if source.startswith("docs/") else f"source/{source}"


def targets(source: str, text: str) -> Iterator[str]:
    """The files of the repository that a page links to. Raises `FileNotFoundError` for one that is not there."""
    for _, link, _ in LINK.findall(text):
        path = link.partition("#")[0]
        if path and "://" not in path and not link.startswith("mailto:"):
            target = resolved(source, path)
            if not (ROOT / target).is_file():
                raise FileNotFoundError(f"{source} links to {link}, which is no file.")
            yield target


def resolved(source: str, path: str) -> str:
    """A relative link of a page as a file of the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), path))


def linked() -> list[str]:
    """Every file that is reached from README.md and docs/ by links, pages and others."""
    waiting = ["README.md", *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md")))]
    found: list[str] = []
    while waiting:
        source = waiting.pop()
        if source not in found:
            found.append(source)
            if source.endswith(".md"):
                waiting += targets(source, (ROOT / source).read_text("utf-8"))
    return sorted(found)


def on_files(files: Files, config: Any) -> Files:
    """Add what lies outside docs/."""
    for source in linked():
        if not source.startswith("docs/"):
            files.append(File.generated(config, place(source), abs_src_path=str(ROOT / source)))
    files.append(File.generated(config, "api.md", content=API))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn a page's links, which are those of the repository, into those of the site."""
    here = page.file.src_uri
    source = next((each for each in linked() if place(each) == here), None)
    return markdown if source is None else LINK.sub(lambda link: _moved(link, source, here), markdown)


def _moved(link: re.Match[str], source: str, here: str) -> str:
    path, hash_, anchor = link[2].partition("#")
    if not path or "://" in path:
        return link[0]
    there = posixpath.relpath(place(resolved(source, path)), posixpath.dirname(here) or ".")
    return f"{link[1]}{there}{hash_}{anchor}{link[3]}"
