"""The package as a wheel: everything that the first run needs is inside, and it runs from elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_carries_the_model_and_its_demo_runs(tmp_path: Path) -> None:
    """Built with pip, unpacked where no source is, run with the dependencies that are installed here."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = subprocess.run(
        [*pip, "wheel", "--no-deps", "-w", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("diffmorpher-*.whl")
    assert wheel.stat().st_size < 60e6
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.startswith(("tests/", "training/", "scripts/"))]
    target = tmp_path / "site"
    installed = subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(target), str(wheel)], capture_output=True, text=True, check=False
    )
    assert installed.returncode == 0, installed.stderr
    code = "import diffmorpher; print(diffmorpher.__file__); from diffmorpher.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "demo", "--out", "films"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(target)), "the demo ran from the source folder"
    assert len(list((tmp_path / "films").iterdir())) == 3
