"""The bundled model is the one that was published, or it is said that it is not."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from diffmorpher.errors import ModelError
from diffmorpher.models import bundled, catalog, loading
from diffmorpher.models.bundled import SUMS, check_sums

MINI = catalog.ASSETS / "mini"


def test_the_list_is_sha256sums_own_and_leaves_nothing_out() -> None:
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS], cwd=MINI, check=True)
    listed = {line.split("  ")[1] for line in (MINI / SUMS).read_text().splitlines()}
    files = {file.relative_to(MINI).as_posix() for file in MINI.rglob("*") if file.is_file()}
    assert files - listed == {SUMS, "README.md"} and listed <= files


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy in the package's place."""
    shutil.copytree(MINI, tmp_path / "mini")
    monkeypatch.setattr(catalog, "ASSETS", tmp_path)
    monkeypatch.setattr(loading, "ASSETS", tmp_path)
    return tmp_path / "mini"


def load(folder: Path) -> Any:
    return loading.load_pipeline(str(folder), torch.device("cpu"), torch.float32)


def test_a_damaged_file_is_named_and_asked_for_again(copied: Path) -> None:
    """One bit of the weights, which would load and make another picture; a file that is gone; no list."""
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(
        ModelError, match=r"unet/diffusion_pytorch_model\.safetensors is not the one that was published"
    ):
        load(copied)
    weights.unlink()
    with pytest.raises(ModelError, match="cannot be read .*: install diffmorpher again"):
        load(copied)
    weights.write_bytes(data)
    assert load(copied)[0].unet is not None
    check_sums.cache_clear()
    (copied / SUMS).write_text("")
    with pytest.raises(ModelError, match="SHA256SUMS is not the one"):
        load(copied)


def test_it_is_read_once_in_a_process(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []
    real = bundled.file_hash
    monkeypatch.setattr(bundled, "file_hash", lambda file: seen.append(file) or real(file))
    for _ in range(3):
        check_sums(copied)
    assert len(seen) == len((copied / SUMS).read_text().splitlines())
