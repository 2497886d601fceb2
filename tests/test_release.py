"""What `make release` checks, on this tree and on small trees with one fault each."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("pyproject.toml", "CITATION.cff", "CHANGELOG.md", "integrations/comfyui/pyproject.toml")


@pytest.fixture(scope="module")
def release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", ROOT / "scripts" / "release.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_one_version_everywhere(release: ModuleType) -> None:
    assert release.faults(trial=True) == []
    assert release.version() == version("diffmorpher")


@pytest.mark.parametrize("file", ["CITATION.cff", "integrations/comfyui/pyproject.toml"])
def test_another_version_is_named(release: ModuleType, tree: Path, file: str) -> None:
    path = tree / file
    path.write_text(path.read_text().replace(release.version(), "0.0.7"))
    assert release.faults(tree, trial=True) == [
        f"{file} says version 0.0.7, where pyproject.toml says {release.version()}."
    ]


def test_a_release_needs_a_dated_section_of_the_change_log(release: ModuleType, tree: Path) -> None:
    log = tree / "CHANGELOG.md"
    log.write_text("## [Unreleased]\n")
    assert ["## [" in each for each in release.faults(tree)] == [True]
    log.write_text(f"## [{release.version()}] - 2026-12-01\n")
    assert release.faults(tree) == []


def test_what_wheel_and_sdist_lack_is_named(release: ModuleType, tmp_path: Path) -> None:
    wheel, sdist = tmp_path / "a.whl", tmp_path / "a.tar.gz"
    with zipfile.ZipFile(wheel, "w") as pack:
        for name in (*(f"diffmorpher-1.dist-info/{need}" for need in release.NEEDED[:-1]), "tests/test_mini.py"):
            pack.writestr(name, "")
    assert release.wheel_faults(wheel) == ["a.whl lacks licenses/NOTICE.", "a.whl holds tests/test_mini.py."]
    with tarfile.open(sdist, "w:gz") as pack:
        for name in FILES:
            pack.add(ROOT / name, f"diffmorpher-1/{name}")
    assert "a.tar.gz lacks NOTICE." in release.sdist_faults(sdist)
    assert not [each for each in release.sdist_faults(sdist) if "CHANGELOG" in each]


def test_pythons_are_those_that_are_there_once_each(release: ModuleType) -> None:
    assert release.pythons(["no-such-python", sys.executable, sys.executable]) == [sys.executable]


def test_the_wheel_is_tried_out_and_not_this_checkout(
    release: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("DIFFMORPHER_CACHE_GB", "10")
    release.run(
        [sys.executable, "-c", "import os; print(*map(os.environ.get, ('PYTHONPATH', 'DIFFMORPHER_CACHE_GB')))"]
    )
    assert "None 0" in capfd.readouterr().out
