"""The web page, driven in a real browser as a person would, and through `gradio_client`."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import wave
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.client import IncompleteRead
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import urlopen

import av
import pytest
from PIL import Image
from servers import Server

from diffmorpher import FitConfig, Recipe, SampleConfig, read_settings
from diffmorpher.models.catalog import CATALOG

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")
sync_api.expect.set_options(timeout=30_000)
Browser, Page, expect = sync_api.Browser, sync_api.Page, sync_api.expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
]
DEMO = Path(sys.modules["diffmorpher"].__file__ or "").parent / "assets" / "demo"
TIGER, WOLF, PEAR, APPLE = (str(DEMO / f"{name}.png") for name in ("tiger-face", "wolf-face", "pear", "red-apple"))

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="no chromium (apt-get install chromium)")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("web"))
    yield server
    assert server.stop() == 0
    assert list(server.folder.iterdir()) == [], "temporary files were left behind"
    assert "Traceback" not in server.log, server.log


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


#: What gradio's script says of a connection that it has closed itself, and of one that the leaving of its page has.
ABORTED = ("AbortError: signal is aborted", "AbortError: BodyStreamBuffer was aborted")
LEFT = "Unexpected error Connection errored out"


class Visitor:
    """A person at the page, in a browser of his own. `close` checks that nothing went wrong unseen."""

    def __init__(self, browser: Browser, server: Server, width: int = 1280, dark: bool = False) -> None:
        self.server = server
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", accept_downloads=True
        )
        self.context.grant_permissions(["clipboard-read", "clipboard-write", "camera"])
        self.page: Page = self.context.new_page()
        self.errors: list[str] = []
        self.visits = 0
        self.hosts: set[str] = set()
        self.page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        self.page.set_default_timeout(60_000)
        self.open()

    def open(self) -> None:
        self.visits += 1
        self.page.goto(self.server.url)
        expect(self.page.locator("#morph")).to_be_enabled(timeout=30_000)

    def close(self) -> None:
        said = (*ABORTED, LEFT) if self.visits > 1 else ABORTED
        errors = [error for error in self.errors if not error.startswith(said)]  # before the page is left
        self.context.close()
        assert errors == []
        assert self.hosts <= {urlsplit(self.server.url).netloc, ""}, self.hosts  # "" is data: and blob:

    def upload(self, *files: str) -> None:
        here = self.page.locator("img.thumb").count()
        self.page.set_input_files("#pick input[type=file]", list(files))
        expect(self.page.locator("img.thumb")).to_have_count(here + len(files))

    def unfold(self, title: str) -> None:
        self.page.get_by_role("button", name=title).click()

    def set(self, **settings: object) -> None:
        """Type settings into the page, by their names."""
        for name, value in settings.items():
            box = self.page.locator(f"#{name} input").first
            if not box.is_visible():
                title = "Making the frames" if name == "steps" else "Learning the pictures"
                self.unfold(title)
                expect(box).to_be_visible()
                self.page.wait_for_timeout(300)  # no person types while the fold opens, and gradio does not expect it
            box.fill(str(value))
            box.press("Tab")

    def small(self, **settings: object) -> None:
        """A run of a second or two."""
        self.set(**({"frames": 4, "lora_steps": 2, "steps": 3} | settings))

    def morph(self) -> None:
        self.page.click("#morph")
        expect(self.page.locator("#status")).to_contain_text("Done in", timeout=60_000)
        self.wait_for_film()

    def wait_for_film(self) -> None:
        self.page.wait_for_function("document.querySelector('video.film')?.readyState >= 2")

    def film(self) -> dict[str, float | bool]:
        return self.page.evaluate(
            "(({duration, paused, loop}) => ({duration, paused, loop}))(document.querySelector('video'))"
        )

    def video(self) -> bytes:
        """The film's file."""
        return fetch(self.server.url + (self.page.locator("video.film").get_attribute("src") or "").lstrip("/"))

    def frame(self) -> tuple[str, str]:
        """What the frame says it is, and its bytes."""
        image = self.page.locator("img.frame")
        return image.get_attribute("alt") or "", image.get_attribute("src") or ""

    def slide(self, alpha: float) -> None:
        box = self.page.locator("#alpha input[type=number]")
        box.fill(str(alpha))
        box.press("Tab")


@pytest.fixture
def visitor(browser: Browser, server: Server) -> Iterator[Visitor]:
    visitor = Visitor(browser, server)
    yield visitor
    visitor.close()


def fetch(url: str) -> bytes:
    with urlopen(url, timeout=30) as answer:
        return answer.read()


def test_from_two_pictures_to_a_playing_film_and_all_that_can_be_had_from_it(visitor: Visitor, tmp_path: Path) -> None:
    page = visitor.page
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    assert paint < 3000
    visitor.upload(TIGER, WOLF)
    page.fill("#prompt-1 input", "a tiger face")
    page.fill("#prompt-2 input", "a wolf's face")
    visitor.small(frames=5, fps=4)
    visitor.morph()
    assert visitor.film() == {"duration": 5 / 4, "paused": False, "loop": True}
    expect(page.locator(".strip img")).to_have_count(5)
    expect(page.locator(".chart polyline")).to_have_count(1)

    # Downloads are all there, and are what they say.
    expect(page.locator("a.download")).to_have_count(8)
    found = {}
    for link in page.locator("a.download").all():
        name, data = (
            link.get_attribute("download") or "",
            fetch(visitor.server.url + (link.get_attribute("href") or "")),
        )
        found[name] = data
        (tmp_path / name).write_bytes(data)
    stem = "tiger-face-wolf-face"
    ends = (".mp4", ".gif", ".webp", ".webm", ".mov", "-frames.zip", ".morph", "-loras.zip")
    assert set(found) == {f"{stem}{end}" for end in ends}
    assert found[f"{stem}.gif"][:4] == b"GIF8" and found[f"{stem}.webp"][8:12] == b"WEBP"
    assert len(zipfile.ZipFile(io.BytesIO(found[f"{stem}-frames.zip"])).namelist()) == 5
    settings = read_settings(tmp_path / f"{stem}.mp4") or {}
    assert (settings["prompts"], settings["fps"]) == (["a tiger face", "a wolf's face"], 4)

    # The command line makes the same film.
    visitor.unfold("The same film again")
    page.click("#copy")
    command = page.evaluate("navigator.clipboard.readText()")
    assert command == page.locator("#command textarea").input_value()
    for picture in (TIGER, WOLF):
        shutil.copy(picture, tmp_path)
    arguments = [sys.executable, "-m", *shlex.split(command), "--json"]
    arguments[arguments.index("-o") + 1] = "again.mp4"
    done = subprocess.run(
        arguments, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again.mp4").read_bytes() == found[f"{stem}.mp4"]
    assert json.loads(done.stdout)["settings"] == settings


def test_a_film_made_earlier_fills_the_form_and_is_made_again(
    browser: Browser, server: Server, visitor: Visitor, tmp_path: Path
) -> None:
    visitor.upload(TIGER, WOLF)
    visitor.page.fill("#prompt-1 input", "a tiger face")
    visitor.small(frames=5, fps=4, steps=4)
    visitor.page.locator("#loop input").check()
    visitor.morph()
    film = visitor.video()
    (tmp_path / "film.mp4").write_bytes(film)

    other = Visitor(browser, server)
    other.unfold("Start from saved work")
    other.page.set_input_files("#start input[type=file]", tmp_path / "film.mp4")
    note = other.page.locator("#start-note")
    expect(note).to_have_text("The settings are those of film.mp4. Add its pictures: tiger-face.png and wolf-face.png.")
    expect(other.page.locator("#frames input").first).to_have_value("5")
    expect(other.page.locator("#loop input")).to_be_checked()
    other.upload(TIGER, WOLF)
    expect(other.page.locator("#prompt-1 input")).to_have_value("a tiger face")
    other.morph()
    assert other.video() == film
    # What is no film says so, and the form stays as it was.
    other.page.locator("#start").get_by_label("Clear").click()
    other.page.set_input_files("#start input[type=file]", WOLF)
    expect(note).to_contain_text("holds no recipe: diffmorpher did not make it")
    expect(other.page.locator("#frames input").first).to_have_value("5")
    other.close()


def test_the_presets(visitor: Visitor, tmp_path: Path) -> None:
    made: list[Recipe] = []
    for preset in ("As the model suggests", "Quick", "As the paper"):
        visitor.open()
        visitor.upload(TIGER, WOLF)
        visitor.small()
        visitor.page.get_by_label(preset).check()
        visitor.morph()
        (tmp_path / "film.mp4").write_bytes(visitor.video())
        made.append(Recipe.read(tmp_path / "film.mp4"))
    own, quick, paper = made
    assert own.fit == replace(CATALOG["mini"].fit, steps=2) and own.sample == replace(CATALOG["mini"].sample, steps=3)
    assert quick.fit is None and not quick.schedule.enabled and quick.sample.attention_mode == "outer"
    assert paper.fit == FitConfig(steps=2) and paper.sample == SampleConfig(steps=3)
    assert paper.schedule.method == "two-pass"


def test_the_slider_shows_any_position_at_once_or_soon(visitor: Visitor) -> None:
    visitor.page.get_by_role("button", name="Apple → pear").click()
    expect(visitor.page.locator("img.thumb")).to_have_count(2)
    visitor.small()
    visitor.morph()
    first = visitor.frame()
    assert first[0] == "The frame at 0.00"
    visitor.page.locator(".strip button").nth(3).click()
    expect(visitor.page.locator("img.frame")).to_have_attribute("alt", "The frame at 1.00")
    last = visitor.frame()
    visitor.slide(0.37)
    expect(visitor.page.locator("img.frame")).to_have_attribute("alt", "The frame at 0.37", timeout=20_000)
    assert len({first[1], last[1], visitor.frame()[1]}) == 3
    visitor.slide(1)
    expect(visitor.page.locator("img.frame")).to_have_attribute("alt", "The frame at 1.00")
    # By hand: while it is dragged, the nearest frame; when it is let go, the frame itself.
    slider = visitor.page.locator("#alpha input[type=range]")
    box = slider.bounding_box()
    assert box is not None
    visitor.page.mouse.move(box["x"] + box["width"] - 4, box["y"] + box["height"] / 2)
    visitor.page.mouse.down()
    visitor.page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] / 2, steps=5)
    visitor.page.mouse.up()
    position = float(slider.input_value())
    assert 0.5 < position < 0.7
    expect(visitor.page.locator("img.frame")).to_have_attribute("alt", f"The frame at {position:.2f}", timeout=20_000)


def test_pictures_are_dragged_into_order(visitor: Visitor) -> None:
    visitor.upload(TIGER, WOLF, PEAR)
    visitor.page.fill("#prompt-3 input", "a pear")
    visitor.page.locator("#thumb-3 img").drag_to(visitor.page.locator("#thumb-1 img"))
    expect(visitor.page.locator("#thumb-1 img")).to_have_attribute("alt", "pear.png")
    expect(visitor.page.locator("#thumb-2 img")).to_have_attribute("alt", "tiger-face.png")
    expect(visitor.page.locator("#prompt-1 input")).to_have_value("a pear")


@pytest.fixture
def wide(tmp_path: Path) -> str:
    """A fox on the right of a picture twice as wide as high, and little else on it."""
    picture, fox = Image.new("RGB", (400, 200), "white"), Image.open(DEMO / "fox-face.png").convert("RGBA")
    fox = fox.resize((200, 200))
    picture.paste(fox, (190, 0), fox)
    picture.save(tmp_path / "fox.png")
    return str(tmp_path / "fox.png")


def test_a_crop_is_shown_dragged_and_goes_with_its_picture(visitor: Visitor, wide: str) -> None:
    page = visitor.page
    visitor.upload(TIGER, wide, WOLF)
    visitor.unfold("Model and size")
    crop, focus = page.get_by_role("slider", name="What is kept of fox.png"), page.locator("#focus input")
    expect(page.locator(".crop")).to_have_count(1)  # nothing is cut off square pictures
    expect(crop).to_have_attribute("aria-valuenow", "50")
    crop.scroll_into_view_if_needed()
    box = crop.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 300, box["y"], steps=5)  # beyond the picture: as far as it goes
    page.mouse.up()
    expect(focus).to_have_value("center;0.75,0.50;center")
    crop.press("ArrowLeft")
    expect(focus).to_have_value("center;0.70,0.50;center")
    page.locator("#thumb-2 .grip").drag_to(page.locator("#thumb-1 img"))
    expect(focus).to_have_value("0.70,0.50;center;center")
    expect(page.locator("#thumb-1 .crop")).to_have_attribute("aria-valuenow", "70")

    def type_into(name: str, text: str) -> None:
        page.locator(f"#{name} input").fill(text)
        page.keyboard.press("Tab")

    type_into("size", "large")
    expect(page.locator(".crop")).to_have_count(0)  # nobody knows what that cuts off
    type_into("size", "")
    type_into("focus", "auto")
    expect(page.locator("#thumb-1 .crop")).to_have_attribute("aria-valuenow", re.compile("7[0-5]"))
    type_into("size", "512x256")
    expect(page.locator("#thumb-1 .crop")).to_have_count(0)
    expect(page.locator(".crop")).to_have_count(2)
    page.get_by_label("Pad with blur").check()
    expect(page.locator(".crop")).to_have_count(0)


def test_a_storyboard_of_three_pictures_with_sound_is_made_and_downloaded(
    visitor: Visitor, wide: str, tmp_path: Path
) -> None:
    page = visitor.page
    with wave.open(str(tmp_path / "song.wav"), "wb") as song:
        song.setparams((1, 2, 8000, 0, "NONE", ""))
        song.writeframes(bytes(range(256)) * 250)  # 4 s
    visitor.upload(TIGER, wide, WOLF)
    page.fill("#prompt-2 input", "a fox")
    page.locator("#thumb-2 .crop").press("ArrowRight")
    visitor.small(fps=8, frames=16)
    visitor.unfold("Pacing and file")
    for field, text, setting, whole in (
        ("hold-2", "0.5", "hold", "0,0.5,0"),
        ("stretch-1", "1", "stretch", "1,1"),
        ("stretch-2", "0.5", "stretch", "1,0.5"),
    ):
        page.locator(f"#{field} input").press_sequentially(text)
        page.keyboard.press("Tab")
        expect(page.locator(f"#{setting} input")).to_have_value(whole)
    expect(page.locator("#stretch-3 input")).not_to_be_visible()
    visitor.unfold("Sound")
    page.set_input_files("#audio input[type=file]", tmp_path / "song.wav")
    expect(page.locator("#audio")).to_contain_text("song")
    said = page.locator("#expected").inner_text()
    visitor.morph()
    with page.expect_download() as download:
        page.locator("a.download", has_text="MP4").click()
    assert download.value.suggested_filename == "tiger-face-fox-wolf-face.mp4"
    film = tmp_path / "film.mp4"
    download.value.save_as(film)
    recipe = Recipe.read(film)
    assert recipe.prompts == ("", "a fox", "") and recipe.hold == (0, 0.5, 0) and recipe.audio == "song.wav"
    assert recipe.focus == ("center", "0.55,0.50", "center") and recipe.schedule.stretch == (1, 0.5)
    with av.open(str(film)) as video:
        assert len(video.streams.audio) == 1
        frames = [frame.to_ndarray(format="rgb24").astype(float) for frame in video.decode(video=0)]
    with av.open(str(film)) as video:
        heard = sum(frame.samples / frame.sample_rate for frame in video.decode(audio=0))
    assert heard == pytest.approx(len(frames) / 8, abs=0.15)
    assert f"A film of {len(frames) / 8:.1f} s" in said
    still = [i for i in range(1, len(frames)) if abs(frames[i] - frames[i - 1]).mean() < 0.5]
    assert len(still) == 4 and still[-1] - still[0] == 3, "half a second at 8 frames a second stands still"
    page.get_by_role("button", name="Full screen").click()
    page.wait_for_function("document.fullscreenElement?.matches('video.film')")


def test_a_film_with_transparency_plays_and_keeps_it(visitor: Visitor, tmp_path: Path) -> None:
    for name in ("pear", "red-apple"):
        picture = Image.open(DEMO / f"{name}.png").convert("RGB")
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
        picture.save(tmp_path / f"{name}.png")
    visitor.upload(str(tmp_path / "pear.png"), str(tmp_path / "red-apple.png"))
    visitor.small()
    visitor.unfold("Pacing and file")
    visitor.page.locator("#transparent input").check()
    visitor.morph()
    (tmp_path / "film.webm").write_bytes(visitor.video())
    assert Recipe.read(tmp_path / "film.webm").transparent
    expect(visitor.page.locator("a.download")).to_have_count(8)
    link = visitor.page.locator("a.download", has_text="Frames").get_attribute("href") or ""
    with zipfile.ZipFile(io.BytesIO(fetch(visitor.server.url + link))) as frames:
        frame = Image.open(io.BytesIO(frames.read(frames.namelist()[1])))
        assert frame.mode == "RGBA" and frame.getchannel("A").getextrema()[0] < 60
    visitor.unfold("The same film again")
    command = visitor.page.locator("#command textarea").input_value()
    assert "--transparent" in command and "-o pear-red-apple.webm" in command


def test_the_slider_by_keyboard_makes_the_frame(visitor: Visitor) -> None:
    visitor.page.get_by_role("button", name="Apple → pear").click()
    expect(visitor.page.locator("img.thumb")).to_have_count(2)
    visitor.small()
    visitor.morph()
    slider = visitor.page.locator("#alpha input[type=range]")
    slider.focus()
    for _ in range(23):
        slider.press("ArrowRight")
    expect(slider).to_have_value("0.23")
    expect(visitor.page.locator("img.frame")).to_have_attribute("alt", "The frame at 0.23", timeout=20_000)


def test_loading_the_page_anew_finds_the_visit_again(browser: Browser, tmp_path: Path) -> None:
    server = Server(tmp_path / "web-kept", "--keep", "5")
    visitor = Visitor(browser, server)
    visitor.upload(TIGER, WOLF)
    visitor.page.fill("#prompt-2 input", "a wolf")
    visitor.small(frames=5)
    visitor.morph()
    film = visitor.video()
    visitor.open()
    expect(visitor.page.locator("img.thumb")).to_have_count(2)
    visitor.wait_for_film()
    assert visitor.video() == film
    expect(visitor.page.locator("#prompt-2 input")).to_have_value("a wolf")
    expect(visitor.page.locator("#frames input").first).to_have_value("5")
    # In the middle of a run: it goes on, and its end is shown.
    visitor.set(lora_steps=60)
    visitor.page.click("#morph")
    expect(visitor.page.locator("#status")).to_contain_text("Learn the pictures")
    visitor.open()
    expect(visitor.page.locator("#status")).to_contain_text("Done in", timeout=90_000)
    assert visitor.video() != film
    # Another tab, and another browser, are other visitors.
    other = Visitor(browser, server)
    other.page.wait_for_timeout(1000)
    expect(other.page.locator("img.thumb")).to_have_count(0)
    other.close()
    visitor.close()
    assert server.stop() == 0
    assert list(server.folder.iterdir()) == []


def test_a_path_file_is_shown_and_goes_when_pictures_are_added(visitor: Visitor, tmp_path: Path) -> None:
    file = tmp_path / "old.morph"
    file.write_bytes(b"whatever is in it")
    visitor.unfold("Start from saved work")
    visitor.page.set_input_files("#path input[type=file]", file)
    expect(visitor.page.locator("#path-note")).to_contain_text("made from old.morph")
    visitor.upload(TIGER, WOLF)
    expect(visitor.page.locator("#path-note")).not_to_be_visible()
    expect(visitor.page.locator("#path")).not_to_contain_text("old.morph")


def test_by_keyboard_alone(visitor: Visitor) -> None:
    """Where the focus is after Morph and at the end; names of the buttons; the defaults of the model and preset chosen."""
    page = visitor.page
    visitor.upload(TIGER, WOLF)
    for name in ("Move later: picture 1", "Remove: picture 2"):
        expect(page.get_by_role("button", name=name)).to_be_visible()
    visitor.small(lora_steps=60)
    page.focus("#morph")
    page.keyboard.press("Enter")
    expect(page.get_by_role("progressbar", name="Learn the pictures")).to_be_visible()
    assert page.evaluate("document.activeElement.id") in ("cancel", "morph")
    expect(page.locator("#status")).to_contain_text("Done in", timeout=60_000)
    page.wait_for_function("document.activeElement.id === 'morph'")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.get_by_label("As the paper").check()
    expect(page.locator("#steps input")).to_have_attribute("placeholder", "50")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_no_barrier(browser: Browser, server: Server, dark: bool) -> None:
    """WCAG 2.2 A and AA, before and after a film."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    visitor = Visitor(browser, server, dark=dark)
    rules = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}}

    def barriers() -> list[str]:
        found = axe.run(visitor.page, options=rules).response["violations"]
        return [f"{each['id']}: {node['html'][:160]} {node['any'][:1]}" for each in found for node in each["nodes"]]

    assert barriers() == []
    visitor.upload(TIGER, WOLF)
    visitor.small()
    visitor.morph()
    for title in ("Pacing and file", "Model and size", "The same film again"):
        visitor.unfold(title)
    visitor.page.wait_for_timeout(500)
    assert barriers() == []
    visitor.close()


def test_the_film_comes_into_view_on_a_screen_of_middle_width(browser: Browser, server: Server) -> None:
    visitor = Visitor(browser, server, width=820)
    visitor.upload(TIGER, WOLF)
    visitor.small()
    visitor.morph()
    visitor.page.wait_for_timeout(1200)  # it scrolls smoothly
    box = visitor.page.locator("video.film").bounding_box()
    assert box is not None and 0 <= box["y"] < 700
    visitor.close()


def test_a_second_run_with_other_sampling_settings_learns_nothing_anew(visitor: Visitor) -> None:
    visitor.upload(TIGER, PEAR)
    visitor.small(lora_steps=40)
    visitor.page.click("#morph")
    expect(visitor.page.locator("#status")).to_contain_text("Learn the pictures")
    expect(visitor.page.locator("#status")).to_contain_text("Done in")
    seen: list[str] = []
    visitor.page.expose_function("tell", lambda text: seen.append(text))
    visitor.page.evaluate(
        "new MutationObserver(() => tell(document.querySelector('#status').innerText))"
        ".observe(document.querySelector('#status'), {childList: true, subtree: true, characterData: true})"
    )
    visitor.set(frames=6, steps=4)
    visitor.page.locator("#ping_pong input").check()
    visitor.page.click("#morph")
    visitor.page.wait_for_function("document.querySelectorAll('.strip img').length == 6")
    visitor.wait_for_film()
    assert visitor.film()["duration"] == 10 / 8
    assert not any("Learn the pictures" in text for text in seen)


def test_cancel_in_the_middle_of_a_fit_leaves_nothing_and_the_button_works_again(visitor: Visitor) -> None:
    visitor.upload(TIGER, APPLE)
    visitor.small(lora_steps=2000)
    visitor.page.click("#morph")
    expect(visitor.page.locator("#status")).to_contain_text(re.compile(r"\d+ of 2000"), timeout=60_000)
    expect(visitor.page.locator("#status")).to_contain_text("left")
    visitor.page.click("#cancel")
    expect(visitor.page.locator("#status")).to_contain_text("Cancelled", timeout=5_000)
    expect(visitor.page.locator("#cancel")).to_be_hidden()
    expect(visitor.page.locator("video")).to_have_count(0)
    assert not [file for folder in visitor.server.files("sessions/*") for file in folder.glob("film-*/*")]
    visitor.set(lora_steps=1)
    visitor.morph()


def test_what_is_no_picture_is_refused_in_one_sentence(visitor: Visitor, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not a picture")
    visitor.page.set_input_files("#pick input[type=file]", str(tmp_path / "notes.png"))
    note = visitor.page.locator("#pictures-note")
    expect(note).to_have_text(
        "Picture 'notes.png' is not a picture in a format that can be read: save it as PNG or JPEG."
    )
    (tmp_path / "big.png").write_bytes(Path(PEAR).read_bytes() + bytes(25 * 2**20))
    visitor.page.set_input_files("#pick input[type=file]", str(tmp_path / "big.png"))
    expect(note).to_have_text("'big.png' has 25 MB: at most 25 MB are taken.")
    expect(visitor.page.locator("img.thumb")).to_have_count(0)
    visitor.upload(PEAR)
    expect(note).to_be_hidden()
    visitor.page.click("#morph")
    expect(visitor.page.locator("#status")).to_have_text("A morph needs at least two images: give another one.")
    visitor.upload(PEAR)
    visitor.page.click("#morph")
    expect(visitor.page.locator("#status")).to_have_text(
        "'pear.png' and 'pear-2.png' are the same picture: give two that differ."
    )
    visitor.set(fix_lora="much")
    visitor.page.click("#morph")
    expect(visitor.page.locator("#status")).to_have_text("Fixed LoRA mix is 'much', but must be a number.")


def test_pictures_come_from_the_clipboard_and_the_camera(visitor: Visitor) -> None:
    page = visitor.page
    copy = """async () => {
        const canvas = document.createElement('canvas');
        canvas.getContext('2d').fillRect(0, 0, 30, 30);
        const blob = await new Promise((resolve) => canvas.toBlob(resolve, 'image/png'));
        await navigator.clipboard.write([new ClipboardItem({'image/png': blob})]);
    }"""
    page.locator("#pick input[type=file]").wait_for(state="attached")
    page.wait_for_timeout(500)
    page.locator("h1").click()  # the page must have the focus
    page.evaluate(copy)
    page.keyboard.press("Control+v")
    expect(page.locator("img.thumb")).to_have_count(1)
    page.get_by_label("Paste from clipboard").click()
    expect(page.locator("img.thumb")).to_have_count(2)
    page.get_by_label("Capture from camera").click()
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('#pick video')?.readyState >= 2")
    page.wait_for_timeout(500)
    page.locator("#pick").get_by_label("capture photo").click()
    expect(page.locator("img.thumb")).to_have_count(3)


def test_pictures_are_moved_and_removed_with_their_prompts(visitor: Visitor) -> None:
    page = visitor.page
    visitor.upload(TIGER, PEAR, WOLF)
    for i, text in enumerate(("a tiger", "a pear", "a wolf")):
        page.fill(f"#prompt-{i + 1} input", text)
    page.click("#earlier-3")
    expect(page.locator("#prompt-2 input")).to_have_value("a wolf")
    page.click("#remove-1")
    expect(page.locator("img.thumb")).to_have_count(2)
    assert [image.get_attribute("alt") for image in page.locator("img.thumb").all()] == ["wolf-face.png", "pear.png"]
    assert [page.input_value(f"#prompt-{i} input") for i in (1, 2)] == ["a wolf", "a pear"]


def test_a_reload_during_a_job_ends_it_and_starts_clean(browser: Browser, server: Server) -> None:
    visitor = Visitor(browser, server)
    visitor.upload(PEAR, WOLF)
    before = set(server.files("sessions/*"))
    visitor.small(lora_steps=2000)
    visitor.page.click("#morph")
    expect(visitor.page.locator("#status")).to_contain_text(re.compile(r"\d+ of 2000"), timeout=60_000)
    visitor.open()
    expect(visitor.page.locator("img.thumb")).to_have_count(0)
    visitor.upload(PEAR, WOLF)
    visitor.small()
    visitor.morph()  # within its time, which the other job would have taken many times over
    deadline = time.monotonic() + 10
    while len(before & set(server.files("sessions/*"))) == len(before) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len(before & set(server.files("sessions/*"))) < len(before), (
        "the pictures of the first visit are still there"
    )
    visitor.close()


def test_two_visitors_wait_for_each_other_and_see_only_their_own(browser: Browser, server: Server) -> None:
    ann, bob = Visitor(browser, server), Visitor(browser, server)
    ann.upload(TIGER, WOLF)
    ann.small(lora_steps=2000)
    ann.page.click("#morph")
    expect(ann.page.locator("#status")).to_contain_text(re.compile(r"\d+ of 2000"), timeout=60_000)
    bob.upload(PEAR, APPLE)
    bob.small()
    bob.page.click("#morph")
    expect(bob.page.locator("#status")).to_contain_text("In line: one job is before yours.")
    ann.page.click("#cancel")
    expect(bob.page.locator("#status")).to_contain_text("Done in")
    bob.wait_for_film()
    expect(ann.page.locator("video")).to_have_count(0)
    expect(ann.page.locator("img.thumb").first).to_have_attribute("alt", "tiger-face.png")
    assert "tiger" not in (bob.page.locator("video").get_attribute("src") or "")
    # Nothing but the visitors' own files is served.
    mine = server.url + (bob.page.locator("video").get_attribute("src") or "")
    assert fetch(mine)[4:8] == b"ftyp"
    for secret in ("/etc/passwd", str(Path(__file__)), str(DEMO.parent / "mini" / "model_index.json")):
        with pytest.raises(HTTPError, match="40[34]"):
            fetch(server.url + "gradio_api/file=" + quote(secret))
    with pytest.raises(HTTPError, match="404"):
        fetch(server.url + "gradio_api/file=http://example.com/picture.png")
    bob.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            fetch(mine)
        except (HTTPError, IncompleteRead):  # it may go while it is read
            break
        time.sleep(0.2)
    else:
        pytest.fail("the film is still served after its visitor left")
    ann.close()


def test_saved_work_is_loaded_again(visitor: Visitor, tmp_path: Path) -> None:
    visitor.upload(PEAR, WOLF)
    visitor.small()
    visitor.morph()
    expect(visitor.page.locator("a.download")).to_have_count(8)
    for link in visitor.page.locator("a.download").all():
        (tmp_path / (link.get_attribute("download") or "")).write_bytes(
            fetch(visitor.server.url + (link.get_attribute("href") or ""))
        )
    zipfile.ZipFile(tmp_path / "pear-wolf-face-loras.zip").extractall(tmp_path)
    film = visitor.page.locator("video").get_attribute("src")
    visitor.open()
    visitor.unfold("Start from saved work")
    visitor.page.set_input_files("#path input[type=file]", str(tmp_path / "pear-wolf-face.morph"))
    expect(visitor.page.locator("#path")).to_contain_text("pear-wolf-face")
    visitor.set(frames=3, steps=3)
    visitor.morph()
    assert visitor.page.locator("video").get_attribute("src") != film
    expect(visitor.page.locator(".strip img")).to_have_count(3)
    visitor.open()
    visitor.upload(PEAR, WOLF)
    visitor.unfold("Start from saved work")
    loras = sorted(map(str, tmp_path.glob("*.safetensors")))
    visitor.page.set_input_files("#loras input[type=file]", loras)
    expect(visitor.page.locator("#loras")).to_contain_text("lora-2")
    visitor.set(frames=3, steps=3)
    visitor.morph()
    visitor.unfold("The same film again")
    assert "--lora pear-wolf-face-lora-1.safetensors" in visitor.page.locator("#command textarea").input_value()


@pytest.mark.parametrize("dark", [False, True])
def test_on_a_phone_nothing_stands_over_and_the_film_comes_first(browser: Browser, server: Server, dark: bool) -> None:
    visitor = Visitor(browser, server, width=390, dark=dark)
    visitor.page.get_by_role("button", name="Tiger → wolf").click()
    expect(visitor.page.locator("img.thumb")).to_have_count(2)
    visitor.small()
    visitor.morph()
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390
    boxes = [visitor.page.locator(part).bounding_box() for part in ("#morph", "video", "#more")]
    assert all(boxes) and [box["y"] for box in boxes if box] == sorted(box["y"] for box in boxes if box)
    assert all(box["width"] >= 330 for box in boxes if box)
    background = visitor.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background)[:3])) < 80) is dark
    visitor.close()


def test_a_program_calls_the_same_function(server: Server, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    client = Client(server.url, verbose=False, download_files=str(tmp_path))
    film, facts = client.predict(
        [handle_file(TIGER), handle_file(WOLF)],
        ["a tiger", "a wolf"],
        frames=4,
        steps=3,
        lora_steps=2,
        api_name="/morph",
    )
    assert (read_settings(film) or {}) == facts["settings"]
    assert facts["settings"]["prompts"] == ["a tiger", "a wolf"] and facts["frames"] == len(facts["alphas"]) == 4
    with pytest.raises(Exception, match="LoRA steps is 5000, but can be at most 2000 on this page"):
        client.predict([handle_file(TIGER), handle_file(WOLF)], None, lora_steps=5000, api_name="/morph")
    public = [name for name in client.view_api(return_format="dict")["named_endpoints"]]
    assert public == ["/morph"]
    client.close()


def test_the_example_in_the_documentation(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs/web.md").read_text("utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for name, picture in (("cat", TIGER), ("dog", WOLF)):
        shutil.copy(picture, f"{name}.png")
    code = code.replace("http://127.0.0.1:7860/", server.url).replace("frames=24,", "frames=4, steps=2, lora_steps=1,")
    exec(compile(code, "docs/web.md", "exec"), {})
    assert ".mp4" in capsys.readouterr().out


def test_a_password_is_asked_for_and_a_taken_port_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    locked = Server(tmp_path / "temporary", "--auth", "ann:secret", "--host", "0.0.0.0")
    assert "everyone who can reach this machine can open it with the name and password" in locked.log
    with pytest.raises(HTTPError, match="401"):
        fetch(locked.url + "gradio_api/info")
    port = str(urlsplit(locked.url).port)
    second = subprocess.run(
        [sys.executable, "-m", "diffmorpher", "web", "--port", port], capture_output=True, text=True, timeout=60
    )
    assert second.returncode == 2 and f"port {port} cannot be used" in second.stderr
    assert locked.stop(signal.SIGINT) == 0
