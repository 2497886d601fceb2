"""The study by eye: the page, in a real browser, and the tally of what it saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from diffmorpher.cli.app import app
from diffmorpher.errors import DataError
from diffmorpher.evaluation.study import tally, write_study
from diffmorpher.files.films import save_film

PAIRS = [f"pair{i}" for i in range(8)]
COLOURS = {"good": (40, 180, 60), "bad": (200, 40, 40)}


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A benchmark's folder with films that a test can tell apart: those of "good" are green."""
    results = [{"pair": pair, "method": method} for pair in PAIRS for method in COLOURS]
    for result in results:
        frames = [Image.new("RGB", (32, 32), COLOURS[result["method"]])] * 3
        (tmp_path / result["pair"] / result["method"]).mkdir(parents=True)
        save_film(frames, tmp_path / result["pair"] / result["method"] / "film.mp4", fps=8)
    about = {"results": results, "protocol": {}, "dataset": {"pairs": {}}}
    (tmp_path / "results.json").write_text(json.dumps(about))
    return tmp_path


def study_in(page: Path) -> dict[str, Any]:
    text = page.read_text()
    start = text.index('type="application/json">') + len('type="application/json">')
    return json.loads(text[start : text.index("</script>", start)])


def test_the_page_is_blind_shuffled_and_whole(bench: Path) -> None:
    page = write_study(bench, ("good", "bad"), bench / "study.html", seed=1)
    text = page.read_text()
    assert '"good"' not in text and '"bad"' not in text and "pair3" not in text
    assert "src=" not in text.replace("at(side).src =", "") and "http" not in text
    study = study_in(page)
    assert len(study["trials"]) == 8 and len(study["films"]) == 16
    again = study_in(write_study(bench, ("good", "bad"), bench / "again.html", seed=1))
    other = study_in(write_study(bench, ("good", "bad"), bench / "other.html", seed=2))
    assert again == study and other["key"] != study["key"]


def votes(bench: Path, seed: int, choices: list[str], name: str) -> Path:
    study = study_in(write_study(bench, ("good", "bad"), bench / "page.html", seed))
    record = {
        "study": study["id"],
        "key": study["key"],
        "votes": [{"trial": i, "choice": choice, "seconds": 1.0} for i, choice in enumerate(choices)],
    }
    file = bench / name
    file.write_text(json.dumps(record))
    return file


def test_tally_maps_sides_to_methods(bench: Path) -> None:
    import base64

    files = []
    for seed in (1, 2):
        study = study_in(write_study(bench, ("good", "bad"), bench / "page.html", seed))
        key = json.loads(base64.b64decode(study["key"]))
        choices = ["left" if sides["left"] == "good" else "right" for sides in key]
        choices[0] = "equal"
        files.append(votes(bench, seed, choices, f"votes{seed}.json"))
    (found,) = tally(files).values()
    assert (found["good"], found["bad"], found["equal"], found["votes"]) == (14, 0, 2, 16)
    assert found["share"] == 0.0 and found["high"] < 0.25  # of "bad", the first by name
    with pytest.raises(DataError, match="the same votes"):
        tally([files[0], files[0]])
    done = CliRunner().invoke(app, ["study", "--tally", str(files[0]), "--tally", str(files[1]), "--json"])
    assert json.loads(done.stdout.splitlines()[0]) == tally(files)


def test_what_cannot_be_studied_is_said(bench: Path, tmp_path: Path) -> None:
    for methods, message in ((("good", "best"), "no films of the method 'best'"), (("good", "good"), "both 'good'")):
        with pytest.raises(DataError, match=message):
            write_study(bench, methods, bench / "x.html")
    with pytest.raises(DataError, match="no file of votes"):
        tally([bench / "results.json"])
    broken = votes(bench, 1, ["sideways"], "broken.json")
    with pytest.raises(DataError, match="no file of votes"):
        tally([broken])
    twice = votes(bench, 1, ["left"], "twice.json")
    record = json.loads(twice.read_text())
    for trials in ((0, 0), (-1,), (8,)):
        record["votes"] = [{"trial": trial, "choice": "left"} for trial in trials]
        twice.write_text(json.dumps(record))
        with pytest.raises(DataError, match="no file of votes"):
            tally([twice])
    (bench / "pair3" / "good" / "film.mp4").unlink()
    with pytest.raises(DataError, match="film.mp4.* cannot be read: remove its folder"):
        write_study(bench, ("good", "bad"), bench / "x.html")


@pytest.mark.browser
def test_voting_in_a_browser(bench: Path) -> None:
    """Someone votes for the green film each time, by button and by key, goes back once, and saves."""
    sync_api = pytest.importorskip("playwright.sync_api")
    page_file = write_study(bench, ("good", "bad"), bench / "study.html", seed=3)
    with sync_api.sync_playwright() as playwright:
        chromium = Path("/usr/bin/chromium")
        if not chromium.exists():
            pytest.skip("Debian's chromium is not installed")
        browser = playwright.chromium.launch(executable_path=str(chromium), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url.split(":")[0]))
        page.goto(page_file.as_uri())

        def greener() -> str:
            """Which side's picture is green, read from the video's pixels."""
            page.wait_for_function("['left','right'].every(s => document.getElementById(s).readyState >= 2)")
            return page.evaluate(
                """() => {
                    const green = (id) => {
                        const canvas = new OffscreenCanvas(4, 4), context = canvas.getContext("2d");
                        context.drawImage(document.getElementById(id), 0, 0, 4, 4);
                        const pixel = context.getImageData(2, 2, 1, 1).data;
                        return pixel[1] - pixel[0];
                    };
                    return green("left") > green("right") ? "left" : "right";
                }"""
            )

        assert page.inner_text("#count") == "1 of 8"
        page.click("#choose-equal")
        assert page.inner_text("#count") == "2 of 8"
        page.click("#back")
        page.keyboard.down("ArrowLeft")
        page.keyboard.down("ArrowLeft")  # held down: it repeats, and is one vote all the same
        page.keyboard.up("ArrowLeft")
        page.keyboard.press("Alt+ArrowUp")
        assert page.inner_text("#count") == "2 of 8"
        page.click("#back")
        for i in range(8):
            assert page.inner_text("#count") == f"{i + 1} of 8"
            side = greener()
            if i % 2:
                page.keyboard.press("ArrowLeft" if side == "left" else "ArrowRight")
            else:
                page.click(f"#choose-{side}")
            if i == 3:
                page.reload()  # votes survive
        with page.expect_download() as waiting:
            page.click("#save")
        waiting.value.save_as(bench / "votes.json")
        browser.close()
    assert not problems and set(asked) <= {"file", "data", "blob"}
    (found,) = tally([bench / "votes.json"]).values()
    assert (found["good"], found["bad"], found["equal"]) == (8, 0, 0)
