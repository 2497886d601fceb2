"""README and docs/: every example is run, every link leads somewhere."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import wave
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from conftest import tiny_pipeline
from diffmorpher import Lora, Morpher, Recipe, save_lora
from diffmorpher.cli import app
from diffmorpher.cli.options import complete
from diffmorpher.config import FitConfig, SampleConfig
from diffmorpher.errors import DiffMorpherError
from diffmorpher.models.catalog import ASSETS, CATALOG

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Pictures that examples speak of, and what they are here.
PICTURES = {"a": "pear", "b": "rose", "c": "tulip", "cat": "cat-face", "dog": "dog-face", "fox": "fox-face"}
#: Folders with a page of their own.
OTHERS = ("benchmarks", "training", "integrations/comfyui", "integrations/space")
#: What else a line of an example may begin with: nothing of ours.
NOT_OURS = ("pip install", "make ", "hf ")
#: Commands that take long, and have tests of their own: here only their options are read.
READ_ONLY = ("bench", "compare", "study", "web", "serve")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def with_blocks(*languages: str) -> list[Any]:
    return [pytest.param(page, id=page.name) for page in PAGES if any(blocks(page, language) for language in languages)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with all the pictures, in a world where the bundled model is a tiny one that needs little work."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name, file in PICTURES.items():
        shutil.copy(ASSETS / "demo" / f"{file}.png", f"{name}.png")
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    with wave.open("song.wav", "wb") as song:
        song.setparams((1, 2, 8000, 0, "NONE", ""))
        song.writeframes((bytes(4000) + bytes(range(256))) * 20)
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, "my-model.safetensors")  # for 'info': it reads no weights
    unet = tiny_pipeline().unet
    layers = {name: layer.in_features for name, layer in unet.named_modules() if name.endswith("attn1.to_q")}
    down = {name: torch.ones(1, width) for name, width in layers.items()}
    up = {name: torch.ones(width, 1) for name, width in layers.items()}
    for name in ("ink", "both"):
        save_lora(Lora(down, up, {}), f"{name}.safetensors")
    quick = {"fit": FitConfig(steps=1), "sample": SampleConfig(steps=2, exact_ends=True)}
    monkeypatch.setitem(CATALOG, "mini", replace(CATALOG["mini"], source=str(tmp_path / "tiny"), **quick))
    return tmp_path / "here"


@pytest.mark.parametrize("page", with_blocks("python"))
def test_examples_in_python(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(CATALOG["mini"].source, "my-model")
    shutil.copytree(ROOT / "integrations" / "diffusers", "integrations/diffusers")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(folder / "modules"))
    for code in blocks(page, "python"):
        if "gradio_client" not in code:  # that one speaks to a page: tests/web/test_page.py
            exec(compile(code, str(page), "exec"), {"__name__": "example"})


@pytest.mark.parametrize("page", with_blocks("console"))
def test_examples_in_a_terminal(
    page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for number, text in enumerate(blocks(page, "toml")):
        Path("batch.toml" if "[[film]]" in text else f"by-hand-{number}.toml").write_text(text)
        Recipe.read(f"by-hand-{number}.toml") if "[[film]]" not in text else None
    for text in blocks(page, "csv"):
        Path("pairs.csv").write_text(text)

    morpher = Morpher.from_pretrained("mini")

    def load(recipe: Recipe, typed: object = (), no_cache: bool = False) -> Morpher:
        if recipe.model != "mini" or (recipe.fit is not None and recipe.fit.steps > 100):
            raise DiffMorpherError("far enough")
        return morpher

    monkeypatch.setattr(app, "_load", load)
    commands = [line[2:] for block in blocks(page, "console") for line in block.splitlines() if line.startswith("$ ")]
    assert commands
    for line in commands:
        for part in line.removeprefix(".venv/bin/").split(" && "):
            if part.startswith(NOT_OURS):
                continue
            words = shlex.split(part, comments=True)
            assert words[0] == "diffmorpher", f"{page.name}: {line}"
            if len(words) > 1 and (words[1] in READ_ONLY or "--ray" in words):
                understood(words[1:])
                continue
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit) as end:
                app.main()
            err = capfd.readouterr().err
            assert end.value.code in (0, None) or "far enough" in err, f"{page.name}: {line}\n{err}"


def understood(words: list[str]) -> None:
    """Whether the command line knows the command with these options; raises where it does not."""
    import typer

    from diffmorpher.evaluation.methods import resolve_methods

    name, *arguments = complete(words)
    command = typer.main.get_command(app.app).commands[name]  # type: ignore[attr-defined]
    with command.make_context(name, arguments) as context:
        if name == "bench":
            resolve_methods(context.params["methods"])


@pytest.mark.parametrize("page", [*PAGES, *(ROOT / p / "README.md" for p in OTHERS)], ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        place = page.parent / file if file else page
        assert place.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", place.read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


def test_the_readme_can_be_read_in_half_a_minute() -> None:
    """Measured figures belong to docs/results.md and benchmarks/."""
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.split()) < 700
    assert not re.search(r"PDV|PPL|e-4", text)


def test_the_tests_that_reliability_names_are_there() -> None:
    """Each `-k` expression of a row selects a test of the file last named."""
    file = ""
    rows = [line for line in (ROOT / "docs" / "reliability.md").read_text("utf-8").splitlines() if "-k `" in line]
    for row in rows:
        for place, expression in re.findall(r"(?:`(tests/[\w/]+\.py)` )?-k `([^`]+)`", row):
            file = place or file
            names = re.findall(r"def (test_\w+)", (ROOT / file).read_text("utf-8"))
            for word in expression.split(" or "):
                assert any(word in name for name in names), f"{file} has no test {word!r}: {row}"
    assert len(rows) > 20
