"""Five hundred films in one process, some of which are stopped or fail: nothing grows."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from conftest import tiny_pipeline
from diffmorpher import Cancelled, FitConfig, Morpher, SampleConfig
from diffmorpher.files.cache import Cache
from diffmorpher.files.films import save_film

FILMS, AFTER = 500, 10  # nothing grows after so many
CACHE_LIMIT = 2_000_000


def test_films_one_after_the_other(tmp_path: Path) -> None:
    """Some of them, for what is counted exactly: files, threads and hooks."""
    seen = run(tmp_path, 12)
    assert all(count["files"] == seen[0]["files"] and count["threads"] == seen[0]["threads"] for count in seen[2:])
    assert {count["hooks"] for count in seen} == {0}


@pytest.mark.slow
@pytest.mark.timeout(3600)  # four minutes of computing, on machines that may be busy
def test_five_hundred_films_in_one_process(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, __file__, str(tmp_path), str(FILMS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps([seen[i] for i in (0, AFTER - 1, FILMS // 2, FILMS - 1)]))
    tenth, later = seen[AFTER - 1], seen[AFTER:]
    assert max(count["megabytes"] for count in later) <= 1.02 * tenth["megabytes"]
    assert max(count["files"] for count in later) <= tenth["files"]
    assert max(count["threads"] for count in later) <= tenth["threads"]
    assert {count["hooks"] for count in seen} == {0}
    assert max(count["cache"] for count in seen) <= CACHE_LIMIT and len(list(tmp_path.iterdir())) == 2


def run(folder: Path, films: int) -> list[dict[str, float]]:
    """What this process holds after each film: every third is one that was made before, every seventh is stopped, every
    eleventh fails while it is written."""
    pipe, cache = tiny_pipeline(), Cache(folder / "cache", CACHE_LIMIT)
    morpher, seen = Morpher(pipe, cache=cache), []
    pictures = [Image.effect_noise((32, 32), s).convert("RGB") for s in (20, 60)]
    for n in range(films):

        def progress(stage: str, done: int, total: int, n: int = n) -> None:
            if n % 7 == 6 and stage == ("fit", "invert", "sample")[n // 7 % 3]:
                raise Cancelled("enough")

        def write(frames: Any, settings: dict[str, Any], n: int = n) -> None:
            if n % 11 == 10:
                next(iter(frames))
                raise OSError("no space")
            save_film(frames, folder / f"film{('.mp4', '.gif')[n % 2]}", metadata=settings)

        seed = 0 if n % 3 == 2 else n
        fit, sample = FitConfig(rank=2, steps=1), SampleConfig(steps=1 + n % 2)
        with suppress(Cancelled, OSError):
            morpher(pictures, "a film", 3, fit=fit, sample=sample, seed=seed, progress=progress, write=write)
        (folder / "film.gif").unlink(missing_ok=True)
        gc.collect()
        seen.append(
            {
                "megabytes": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6,
                "files": len(os.listdir("/proc/self/fd")),
                "threads": threading.active_count() + len(os.listdir("/proc/self/task")),
                "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules()),
                "cache": sum(size for _, size, _ in cache.entries()),
            }
        )
    return seen


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]))))
