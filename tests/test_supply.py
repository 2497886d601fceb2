"""What an installation brings is listed with its licence."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path

from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LICENCES = runpy.run_path(str(ROOT / "scripts/licences.py"))


def test_every_dependency_has_a_licence() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [project["optional-dependencies"][extra] for extra in LICENCES["EXTRAS"] if extra]
    wanted = {canonicalize_name(re.split(r"[\[<>=!~ ]", line)[0]) for line in sum(extras, project["dependencies"])}
    text = (ROOT / "docs/licences.md").read_text("utf-8")
    assert wanted - {"diffmorpher"} <= LICENCES["names_of"](text)
    assert "not said" not in text
    found = LICENCES["closure"]("")
    assert {"torch", "pillow", "huggingface-hub", "markupsafe"} <= found  # the last comes with torch's jinja2
    assert "gradio" not in found
