"""Make the screenshots of docs/web.md anew: `python scripts/make_screenshots.py`. Needs chromium and the extra `dev`."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

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
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
