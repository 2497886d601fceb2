"""Make the screenshots of docs/web.md anew: `python scripts/make_screenshots.py`. Needs chromium and the extra `dev`."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from diffmorpher.models.catalog import ASSETS

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = "/usr/bin/chromium"
#: Name, width, height and whether it is dark.
SHOTS = (
    ("web-1280", 1280, 900, False),
    ("web-1280-dark", 1280, 900, True),
    ("web-390", 390, 844, False),
    ("web-390-dark", 390, 844, True),
)


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "diffmorpher", "web", "--port", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    while "Open http" not in server.stderr.readline():
        assert server.poll() is None, "the page did not start"
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            for name, width, height, dark in SHOTS:
                page = browser.new_page(
                    viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
                )
                page.goto(f"http://127.0.0.1:{port}/")
                page.get_by_role("button", name="Tiger → wolf").click()
                page.locator("img.thumb").nth(1).wait_for()
                page.click("#morph")
                page.get_by_text("Done in").wait_for(timeout=300_000)
                page.locator("a.download").nth(5).wait_for(timeout=60_000)
                page.locator(".strip button").nth(8).click()
                page.wait_for_timeout(1500)  # the film is a few frames on
                page.screenshot(path=ROOT / f"docs/{name}.png", full_page=True)
                with Image.open(ROOT / f"docs/{name}.png") as shot:
                    shot.convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(
                        ROOT / f"docs/{name}.png", optimize=True
                    )
                print(f"docs/{name}.png", flush=True)
                page.close()
            storyboard(browser, f"http://127.0.0.1:{port}/")
            browser.close()
    finally:
        server.terminate()
        server.wait()


def storyboard(browser: Browser, url: str) -> None:
    """Three pictures, of which one is wide, is held, and has had its crop moved."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(url)
    wide, fox = (
        Image.new("RGB", (400, 200), (236, 240, 245)),
        Image.open(ASSETS / "demo" / "fox-face.png").convert("RGB"),
    )
    fox = fox.resize((170, 170))
    wide.paste(fox, (200, 15), fox.convert("L").point(lambda level: 255 * (level < 248)))
    with tempfile.TemporaryDirectory() as folder:
        wide.save(Path(folder) / "fox.png")
        files = [ASSETS / "demo" / "tiger-face.png", Path(folder) / "fox.png", ASSETS / "demo" / "wolf-face.png"]
        page.set_input_files("#pick input[type=file]", files)
        page.locator("img.thumb").nth(2).wait_for()
    for i, text in enumerate(("a tiger face", "a fox face", "a wolf face")):
        page.fill(f"#prompt-{i + 1} input", text)
    for _ in range(4):
        page.locator(".crop").press("ArrowRight")
    for field, text in (("hold-2", "0.5"), ("stretch-1", "2"), ("stretch-2", "1")):
        page.locator(f"#{field} input").press_sequentially(text)
        page.keyboard.press("Tab")
    page.wait_for_timeout(1000)
    first, last = (page.locator(".picture").nth(i).bounding_box() for i in (0, 2))
    assert first is not None and last is not None
    clip = {
        "x": first["x"],
        "y": first["y"],
        "width": first["width"],
        "height": last["y"] + last["height"] - first["y"],
    }
    page.screenshot(path=ROOT / "docs/storyboard.png", clip=clip)  # type: ignore[arg-type]
    print("docs/storyboard.png", flush=True)


if __name__ == "__main__":
    main()
