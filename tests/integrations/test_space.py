"""The Space, started as a Space starts it, and asked over loopback."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import yaml

from conftest import ASSETS, tiny_pipeline
from diffmorpher import Recipe

SPACE = Path(__file__).parents[2] / "integrations" / "space"
SOURCE = Path(sys.modules["diffmorpher"].__file__ or "").parents[1]
#: Hugging Face's package, as far as a Space needs it: what is decorated leaves a trace when it runs.
BORROWED = """
import functools, pathlib, sys
assert "torch" not in sys.modules, "spaces must come before torch"
def GPU(duration=60):
    def decorate(function):
        @functools.wraps(function)
        def run(*args, **kwargs):
            pathlib.Path({trace!r}).write_text(f"{{function.__name__}} for {{duration}} s")
            return function(*args, **kwargs)
        return run
    return decorate
"""


@pytest.mark.parametrize("zero_gpu", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "zero-gpu"])
def test_the_space_makes_a_film(tmp_path: Path, zero_gpu: bool) -> None:
    from gradio_client import Client, handle_file

    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    trace, packages = tmp_path / "borrowed", tmp_path / "packages"
    packages.mkdir()
    (tmp_path / "tmp").mkdir()
    if zero_gpu:
        (packages / "spaces.py").write_text(BORROWED.format(trace=str(trace)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        "GRADIO_SERVER_NAME": "127.0.0.1",  # a Space says 0.0.0.0
        "GRADIO_SERVER_PORT": str(port),
        "DIFFMORPHER_MODEL": str(tmp_path / "tiny"),
        "PYTHONPATH": os.pathsep.join([str(packages), str(SOURCE)]),
        "TMPDIR": str(tmp_path / "tmp"),
    }
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, "app.py"], cwd=SPACE, env=os.environ | environment, stdout=log, stderr=log
    )
    try:
        url = wait_for(process, port, tmp_path / "log")
        client = Client(url, verbose=False, download_files=str(tmp_path))
        pictures = [handle_file(str(ASSETS / "demo" / f"{name}.png")) for name in ("pear", "rose")]

        def ask(files: list[Any], frames: int = 3) -> Any:
            return client.predict(files, "a pear\na rose", frames, 8, False, True, 5, api_name="/morph")

        made = ask(pictures)
        recipe = Recipe.read(made["video"] if isinstance(made, dict) else made)
        assert (recipe.frames, recipe.seed, recipe.prompts, recipe.fit) == (3, 5, ("a pear", "a rose"), None)
        assert trace.exists() == zero_gpu
        if zero_gpu:
            assert trace.read_text() == "film for 120 s"
        with pytest.raises(Exception, match="at least two images"):
            ask(pictures[:1])
        with pytest.raises(Exception, match="9 pictures are too many"):
            ask(pictures[:1] * 9)
    finally:
        process.terminate()
        process.wait(timeout=30)
        log.close()
    assert "Traceback" not in (tmp_path / "log").read_text()


def wait_for(process: subprocess.Popen[bytes], port: int, log: Path) -> str:
    url, deadline = f"http://127.0.0.1:{port}/", time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urlopen(url, timeout=5):
                return url
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())


def test_the_front_matter_is_what_hugging_face_reads() -> None:
    match = re.match(r"---\n(.*?)\n---\n", (SPACE / "README.md").read_text(), re.DOTALL)
    assert match
    said = yaml.safe_load(match[1])
    import gradio

    assert said["sdk"] == "gradio" and said["sdk_version"].split(".")[0] == gradio.__version__.split(".")[0]
    assert (SPACE / said["app_file"]).exists() and said["license"] == "apache-2.0"
    assert {said["colorFrom"], said["colorTo"]} <= {
        "red",
        "yellow",
        "green",
        "blue",
        "indigo",
        "purple",
        "pink",
        "gray",
    }
    assert len(said["short_description"]) <= 60 and said["title"] and said["emoji"]


@pytest.mark.parametrize(
    "page", [SPACE / "README.md", SPACE.parents[1] / "docs" / "integrations.md"], ids=lambda page: page.name
)
def test_what_is_to_be_typed_is_known_to_hugging_face_s_program(page: Path) -> None:
    """Read by it, not done: it looks at its options before it shows its help."""
    lines = re.findall(r"^\$ (hf .*)$", page.read_text("utf-8"), re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        command = [Path(sys.executable).with_name("hf"), *line.split()[1:], "--help"]
        read = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
        assert read.returncode == 0, f"{line}: {read.stderr}"
