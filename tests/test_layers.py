"""The house: who may import whom (arrows point down only), read from the source itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import diffmorpher

ROOT = Path(diffmorpher.__file__).parent

#: From the top. A part may import what stands below it, and other files of its own part.
LAYERS = (
    ("cli",),
    ("web",),
    ("evaluation",),
    ("cluster",),
    ("morpher",),
    ("inputs",),
    ("stream", "result"),
    ("path",),
    ("method",),
    ("gather", "arguments", "framing"),
    ("recipe",),
    ("commands",),
    ("documents",),
    ("settings",),
    ("models",),
    ("files",),
    ("config", "progress", "errors"),
)
#: Arrows that a part must not have, although what they point to stands below it.
NEVER = (("web", "cli"), ("evaluation", "cli"), ("evaluation", "web"), ("web", "evaluation"))
#: The calls by which the command line reaches the page and the service.
DOORS = (("cli.app", "web.page", "serve"), ("cli.app", "web.service", "serve"))


def modules(root: Path) -> dict[str, Path]:
    """Module names within the package, "method.lora" say, and their files; the package's own front door is left out."""
    files = [
        file for file in root.rglob("*.py") if file.relative_to(root).as_posix() not in ("__init__.py", "__main__.py")
    ]
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(name: str, file: Path, known: dict[str, Path], package: str) -> Iterator[tuple[str, str]]:
    """(module of ours, name taken from it) for every import anywhere in the file, also those in functions."""
    home = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == package:
                    yield alias.name.removeprefix(package).lstrip("."), "*"
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = home[: len(home) - (node.level - 1)]
            elif node.module and node.module.split(".")[0] == package:
                base = []
            else:
                continue
            module = ".".join(
                [*base, *(node.module or "").removeprefix(package if not node.level else "").lstrip(".").split(".")]
            )
            module = module.strip(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".strip(".")
                yield (inner, "*") if inner in known else (module, alias.name)


def violations(root: Path, package: str = "diffmorpher") -> list[str]:
    """Each arrow that must not be, named."""
    known = modules(root)
    height = {part: i for i, layer in enumerate(LAYERS) for part in layer}
    arrows = {name: set(imports(name, file, known, package)) for name, file in known.items()}
    found = []
    for name, targets in sorted(arrows.items()):
        part = name.split(".")[0]
        if part not in height:
            found.append(f"{name} is in no layer")
            continue
        for target, what in sorted(targets):
            other = target.split(".")[0]
            if not target:
                found.append(f"{name} imports the package's front door")
            elif part != other and height.get(other, -1) < height[part]:
                found.append(f"{name} imports {target}, which does not stand below it")
            elif (part, other) in NEVER:
                found.append(f"{name} imports {target}: {part} must not know {other}")
            elif other == "web" and part != "web" and (name, target, what) not in DOORS:
                found.append(f"{name} reaches {target} by {what}: only cli.app may, by serve")
    return found + [f"circle: {' -> '.join(circle)}" for circle in circles(arrows)]


def circles(arrows: dict[str, set[tuple[str, str]]]) -> list[list[str]]:
    """Each circle of imports, by a walk in depth."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> None:
        if name in way:
            found.append([*way[way.index(name) :], name])
        elif name not in done:
            for target, _ in sorted(arrows.get(name, ())):
                visit(target, [*way, name])
            done.add(name)

    for name in sorted(arrows):
        visit(name, [])
    return found


def test_arrows_point_down_and_there_is_no_circle() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("method/fit.py", "from ..path import MorphPath", "method.fit imports path, which does not stand below it"),
        ("method/fit.py", "def f():\n    import diffmorpher.cli.app", "method.fit imports cli.app"),
        ("files/loras.py", "from diffmorpher.models import catalog", "files.loras imports models.catalog"),
        ("web/jobs.py", "from ..cli.checks import check_file", "web.jobs imports cli.checks"),
        ("evaluation/bench.py", "from ..web.page import serve", "evaluation.bench imports web.page"),
        ("cli/bench.py", "from ..web.page import serve", "cli.bench reaches web.page by serve"),
        ("cli/app.py", "from ..web import page", "cli.app reaches web.page by *"),
        ("config.py", "from .progress import console", "circle: config -> progress -> config"),
        ("method/fit.py", "from .. import Morpher", "method.fit imports the package's front door"),
        ("extra.py", "", "extra is in no layer"),
    ],
)
def test_each_kind_of_wrong_arrow_is_named(tmp_path: Path, file: str, line: str, said: str) -> None:
    """On a small house with one fault."""
    for name in (
        "cli/app",
        "cli/bench",
        "cli/checks",
        "web/page",
        "web/jobs",
        "evaluation/bench",
        "method/fit",
        "path",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").touch()
    for name in ("files/loras", "models/catalog", "errors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").touch()
    (tmp_path / "config.py").touch()
    (tmp_path / "progress.py").write_text("from . import config\n")
    assert violations(tmp_path) == []
    (tmp_path / file).write_text(line + "\n")
    assert any(each.startswith(said) for each in violations(tmp_path)), violations(tmp_path)
