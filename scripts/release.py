"""Build wheel and sdist into dist/, check both, and run the demo from the wheel in a clean environment for each Python.

`make release` runs it. It publishes nothing: what it leaves in dist/ is ready for `twine upload`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: What the first run needs, and what a licence asks for, as they lie in the wheel.
NEEDED = (
    "diffmorpher/assets/mini/model_index.json",
    "diffmorpher/assets/demo/tiger-face.png",
    "diffmorpher/web/page.css",
    "diffmorpher/py.typed",
    "licenses/LICENSE",
    "licenses/NOTICE",
)
MAX_WHEEL_BYTES = 60_000_000


def version(root: Path = ROOT) -> str:
    """The version, whose one source is pyproject.toml."""
    return tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["version"]


def faults(root: Path = ROOT, trial: bool = False) -> list[str]:
    """What stands in the way of a release: other versions elsewhere, no dated section of the change log (but for a trial)."""
    number = version(root)
    pack = root / "integrations/comfyui/pyproject.toml"
    cited = re.search(r"^version: (.*)$", (root / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    said = {"CITATION.cff": cited[1] if cited else None, str(pack.relative_to(root)): version(pack.parent)}
    found = [
        f"{file} says version {other}, where pyproject.toml says {number}."
        for file, other in said.items()
        if other != number
    ]
    log = (root / "CHANGELOG.md").read_text("utf-8")
    if not trial and not re.search(rf"^## \[{re.escape(number)}\] - \d{{4}}-\d\d-\d\d$", log, re.MULTILINE):
        found.append(f"CHANGELOG.md has no section '## [{number}] - YYYY-MM-DD': turn [Unreleased] into it.")
    return found


def build(out: Path) -> tuple[Path, Path]:
    """The wheel and the sdist. The wheel is built from the sdist, so both hold all that it takes."""
    run([sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)])
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def wheel_faults(wheel: Path) -> list[str]:
    """What a wheel lacks, or has too much of."""
    names = zipfile.ZipFile(wheel).namelist()
    found = [f"{wheel.name} lacks {need}." for need in NEEDED if not any(name.endswith(need) for name in names)]
    found += [
        f"{wheel.name} holds {name}." for name in names if not re.match(r"diffmorpher(-[^/]*\.dist-info)?/", name)
    ]
    if wheel.stat().st_size > MAX_WHEEL_BYTES:
        found.append(
            f"{wheel.name} has {wheel.stat().st_size / 1e6:.0f} MB, but must have at most {MAX_WHEEL_BYTES / 1e6:.0f}."
        )
    return found


def sdist_faults(sdist: Path) -> list[str]:
    """What an sdist lacks of that with which its tests run."""
    with tarfile.open(sdist) as pack:
        names = {name.partition("/")[2] for name in pack.getnames()}
    needed = (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "NOTICE",
        "CHANGELOG.md",
        "constraints.txt",
        "tests/conftest.py",
        "Makefile",
    )
    return [f"{sdist.name} lacks {need}." for need in needed if need not in names]


def pythons(names: Sequence[str]) -> list[str]:
    """Those that are there, are new enough and can make environments; one of each version."""
    code = "import sys, venv, ensurepip; print(*sys.version_info[:2]); sys.exit(sys.version_info < (3, 11))"
    found: dict[str, str] = {}
    for name in names:
        path = shutil.which(name)
        asked = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False) if path else None
        if path and asked and asked.returncode == 0:
            found.setdefault(asked.stdout.strip(), path)
    return list(found.values())


def try_out(wheel: Path, python: str) -> None:
    """Install the wheel into a new environment, with what is pinned, and run the demo there."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        run([python, "-m", "venv", str(place / "env")])
        own = str(place / "env/bin/python")
        pip = [own, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        run([*pip, "-c", str(ROOT / "constraints.txt"), str(wheel)])
        run([own, "-c", "import diffmorpher; assert 'site-packages' in diffmorpher.__file__"], place)
        run([str(place / "env/bin/diffmorpher"), "demo", "--out", "films"], place)
        films = sorted(file.suffix for file in (place / "films").iterdir())
        if films != [".gif", ".mp4", ".png"]:
            raise SystemExit(f"the demo under {python} left {films}, where a gif, an mp4 and a png were due.")


def run(command: Sequence[str], folder: Path | None = None) -> None:
    """As in a shell that knows nothing of this checkout, nor of films made before: the demo is to be made, not found."""
    print("$", *command, flush=True)
    elsewhere = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    subprocess.run(command, cwd=folder, check=True, env=elsewhere | {"DIFFMORPHER_CACHE_GB": "0"})


def stop(found: Sequence[str]) -> None:
    """End here where there is something to mend."""
    if found:
        raise SystemExit("\n".join(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trial", action="store_true", help="do not ask for a dated section of the change log")
    parser.add_argument(
        "--python", nargs="*", default=["python3"], help="run the demo under each of these that is there"
    )
    args = parser.parse_args()

    stop(faults(trial=args.trial))
    out = ROOT / "dist"
    shutil.rmtree(out, ignore_errors=True)
    wheel, sdist = build(out)
    run([sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)])
    stop(wheel_faults(wheel) + sdist_faults(sdist))
    chosen = pythons(args.python)
    stop([] if chosen else [f"no Python 3.11 or newer is among {', '.join(args.python)}."])
    for python in chosen:
        try_out(wheel, python)
    print(f"{wheel.name} and {sdist.name} are in dist/; the demo ran under {', '.join(chosen)}.")


if __name__ == "__main__":
    main()
