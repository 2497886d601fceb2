"""A disk that is full, files that may not grow, a folder that is read-only: real ones, in a mount namespace of its own."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

FULL, LARGE = "No space left on device", "File too large"
OUTPUTS = ["film.mp4", "film.webm", "film.gif", "film.webp", "film.png", "frames"]
#: What is asked for in a place of that kind, and the reason that must be given.
CASES: dict[str, tuple[list[str], str]] = {
    **{f"full {out}": (["morph", "-o", out], FULL) for out in OUTPUTS},
    **{f"limit {out}": (["morph", "-o", out], LARGE) for out in OUTPUTS},
    **{f"read-only {out}": (["morph", "-o", out], "is read-only") for out in OUTPUTS},
    "full path": (["morph", "-o", "../film.mp4", "--save-path", "film.morph"], FULL),
    "full frames beside a film": (["morph", "-o", "../film.mp4", "--save-frames", "frames"], FULL),
    "full recipe": (["morph", "-o", "../film.mp4", "--save-recipe", "film.toml"], FULL),
    "full LoRA": (["fit", "-o", "film.safetensors"], FULL),
    "limit LoRA": (["fit", "-o", "film.safetensors"], LARGE),
    "read-only LoRA": (["fit", "-o", "film.safetensors"], "is read-only"),
    "full cache": (["morph", "-o", "../film.mp4"], ""),
    "read-only cache": (["morph", "-o", "../film.mp4"], ""),
}
QUICK = ["full film.mp4", "full cache"]


def test_some_places(tmp_path: Path) -> None:
    whatever_happens_it_is_said_and_nothing_is_lost(tmp_path, QUICK)


@pytest.mark.slow
def test_every_place(tmp_path: Path) -> None:
    whatever_happens_it_is_said_and_nothing_is_lost(tmp_path, list(CASES))


def whatever_happens_it_is_said_and_nothing_is_lost(folder: Path, cases: list[str]) -> None:
    from conftest import tiny_pipeline  # which the script does without

    mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    if not shutil.which("unshare") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs mount namespaces for every user")
    tiny_pipeline().save_pretrained(folder / "model")
    for i in range(2):
        Image.effect_noise((32, 32), 50 + 50 * i).convert("RGB").save(folder / f"{i}.png")
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, __file__, str(folder), *cases], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for case in cases:
        status, said, same = found[case]
        reason, last = CASES[case][1], said.splitlines()[-1]
        assert "Traceback" not in said and same, f"{case}: {said}"
        if reason:  # one sentence: before the work where that can be known
            assert status == (2 if "read-only" in case else 1), f"{case}: {said}"
            assert last.startswith("diffmorpher: error: ") and "cannot be written" in last and reason in last, said
            assert ("Wrote ../film.mp4" in said) == ("path" in case or "beside" in case), said
        else:
            assert status == 0 and said.count("is not used") == 1, f"{case}: {said}"


# ---- within the namespace, where this file runs as a script


def run_all(folder: Path, cases: list[str]) -> dict[str, Any]:
    import diffmorpher.files.films
    import diffmorpher.models.loading
    import diffmorpher.morpher  # noqa: F401  # once for all cases, each of which is a fork
    from diffmorpher.cli import app

    place, found = folder / "place", {}
    place.mkdir()
    for case in cases:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], check=True)
        prepare(place, case)
        os.chdir(place)
        before = contents(place)
        with open(folder / "said", "wb") as said:
            child = os.fork()
            if not child:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                command = [*CASES[case][0], *(str(folder / f"{i}.png") for i in range(2))]
                if command[0] == "fit":
                    command = command[:-1]
                small = ["--device", "cpu", "--size", "32x32", "--lora-steps", "2", "--lora-rank", "2", "-p", "a"]
                small += [] if command[0] == "fit" else ["--steps", "2", "--frames", "9"]
                sys.argv = ["diffmorpher", *command, "--model", str(folder / "model"), *small]
                os.environ |= {"DIFFMORPHER_CACHE": "cache", "DIFFMORPHER_CACHE_GB": str(int("cache" in case))}
                if case.startswith("limit"):
                    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
                status: Any = 99
                try:
                    app.main()
                except SystemExit as end:
                    status = end.code
                finally:
                    os._exit(status or 0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found[case] = status, (folder / "said").read_text(), contents(place) == before
        os.chdir(folder)
        subprocess.run(["umount", "--lazy", str(place)], check=True)
    return found


def prepare(place: Path, case: str) -> None:
    """Older files under the names that will be written to, and then no more room than one page, or none to write at all.

    A recipe is smaller than a page, so that there is none for it.
    """
    kind = case.split()[0]
    for suffix in ("mp4", "webm", "gif", "webp", "png", "morph", "safetensors"):
        (place / f"film.{suffix}").write_bytes(b"older")
    if kind == "full":
        with open(place / "filler", "wb", buffering=0) as filler:
            try:
                while filler.write(bytes(4096)):
                    pass
            except OSError:
                filler.truncate(filler.tell() - (0 if "recipe" in case else 4096))
    elif kind == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)


def contents(place: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in place.rglob("*") if file.is_file()}


if __name__ == "__main__":
    print(json.dumps(run_all(Path(sys.argv[1]), sys.argv[2:])))
