"""The docs site: built strictly, nothing fetched from elsewhere, every public name in it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import diffmorpher

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(out)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return out


def test_every_public_name_is_explained(site: Path) -> None:
    page = (site / "api" / "index.html").read_text("utf-8")
    headings = set(re.findall(r'id="diffmorpher\.[\w.]*?(\w+)"', page))
    assert set(diffmorpher.__all__) <= headings


def test_files_that_pages_link_to_come_along(site: Path) -> None:
    page = (site / "how-it-works" / "index.html").read_text("utf-8")
    links = re.findall(r'href="(\.\./source/[^"#]*\.py)"', page)
    assert links and all((site / "how-it-works" / link).resolve().is_file() for link in links)
    assert (site / "source" / "benchmarks" / "index.html").is_file()
    assert "A tiger turns into a wolf" in (site / "index.html").read_text("utf-8")


def test_no_page_asks_another_host_for_anything(site: Path) -> None:
    for file in site.rglob("*.html"):
        text = file.read_text("utf-8")
        assert not re.findall(r'<(?:script|img|link|iframe)[^>]* (?:src|href)="https?://[^"]*"', text), file


def test_a_link_to_nothing_stops_the_build() -> None:
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "scripts" / "docs_site.py")
    assert spec and spec.loader
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    assert list(hooks.targets("docs/web.md", "[a](../Makefile) [b](https://example.com) [c](#here)")) == ["Makefile"]
    with pytest.raises(FileNotFoundError, match="docs/web.md links to gone.md"):
        list(hooks.targets("docs/web.md", "[a](gone.md)"))
