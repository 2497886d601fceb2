"""The cache of fitted LoRAs: keyed by content, shared by processes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from torch.testing import assert_close

from conftest import tiny_pipeline
from diffmorpher import FitConfig, Morpher
from diffmorpher.evaluation.lora_cache import cached_loras

FIT = FitConfig(rank=2, steps=3)

#: Asks for one fit and prints how many training steps it saw.
SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conftest import tiny_pipeline
from PIL import Image
from diffmorpher import FitConfig, Morpher
from diffmorpher.evaluation.lora_cache import cached_loras
morpher = Morpher(tiny_pipeline())
ready, start = Path(sys.argv[2]), Path(sys.argv[3])
ready.touch()
while not start.exists():
    time.sleep(0.01)
seen = []
images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
cached_loras(morpher, images, ["a", "b"], FitConfig(rank=2, steps=60), 0, lambda *step: seen.append(step))
print(len([step for step in seen if step[0] == "fit"]))
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFMORPHER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "loras"


@pytest.fixture
def images() -> list[Image.Image]:
    return [Image.effect_noise((32, 32), 50 + 50 * i).convert("RGB") for i in range(2)]


def fits(morpher: Morpher, images: list[Image.Image], prompts: list[str], fit: FitConfig = FIT, seed: int = 0) -> int:
    """How many images had to be fitted, by the files that came."""
    from diffmorpher.evaluation.lora_cache import cache_folder

    folder = cache_folder() / "loras"
    before = {file: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
    cached_loras(morpher, images, prompts, fit, seed)
    return sum(before.get(file) != file.stat().st_mtime_ns for file in folder.glob("*.safetensors"))


def test_what_is_known_is_not_fitted_again(images: list[Image.Image]) -> None:
    morpher = Morpher(tiny_pipeline())
    assert fits(morpher, images, ["a", "b"]) == 2
    assert fits(morpher, images, ["a", "b"]) == 0
    assert fits(morpher, images[::-1], ["b", "a"]) == 0  # an image's LoRA does not depend on its place
    assert fits(Morpher(tiny_pipeline()), images, ["a", "b"]) == 0
    # Everything that matters makes another.
    assert fits(morpher, images, ["a", "c"]) == 1
    assert fits(morpher, images, ["a", "b"], seed=1) == 2
    assert fits(morpher, images, ["a", "b"], replace(FIT, steps=4)) == 2
    assert fits(morpher, [images[0], images[0].rotate(90)], ["a", "b"]) == 1
    assert fits(Morpher(tiny_pipeline(seed=1)), images, ["a", "b"]) == 2


def test_from_the_cache_it_is_the_same(images: list[Image.Image], own_cache: Path) -> None:
    morpher = Morpher(tiny_pipeline())
    fitted = cached_loras(morpher, images, ["a", "b"], FIT)
    again = cached_loras(morpher, images, ["a", "b"], FIT)
    for new, kept in zip(fitted, again, strict=True):
        assert new.metadata["start"] == kept.metadata["start"]  # so that factors may be blended
        for name, up in new.up.items():
            assert_close(kept.up[name], up, rtol=0, atol=0)
    file = next(own_cache.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])  # damaged: fitted anew
    mended = cached_loras(morpher, images, ["a", "b"], FIT)
    assert len(mended) == 2 and file.stat().st_size > 1000


def test_two_processes_want_the_same_fit(tmp_path: Path) -> None:
    """Both ask at the same moment: one fits, the other waits for it and takes it."""
    start = tmp_path / "start"
    processes = []
    for i in range(2):
        command = [
            sys.executable,
            "-c",
            SCRIPT,
            str(Path(__file__).parents[1]),
            str(tmp_path / f"ready{i}"),
            str(start),
        ]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    while not all((tmp_path / f"ready{i}").exists() for i in range(2)):
        assert all(process.poll() is None for process in processes), processes[0].communicate()[1]
    start.touch()
    outputs = [process.communicate(timeout=120) for process in processes]
    assert sorted(int(out) for out, _ in outputs) == [0, 60], outputs
