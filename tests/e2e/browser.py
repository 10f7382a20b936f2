"""What a person sees: pages of the servers in headless Chromium."""

from __future__ import annotations

import os
from pathlib import Path

from tests.chromium import CHROMIUM, FLAGS


def look(url: str, name: str, texts: list[str]) -> None:
    """A page in a browser says all this and asks no other machine. `DEEPSPEC_SCREENSHOTS` keeps the picture."""
    if CHROMIUM is None:
        assert os.environ.get("DEEPSPEC_BROWSER") != "required", "no Chromium; apt-get install chromium"
        return
    from playwright.sync_api import sync_playwright

    elsewhere: list[str] = []
    here = (url.split("/", 3)[2], "data:", "blob:")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on(
            "request",
            lambda asked: asked.url.removeprefix("http://").startswith(here) or elsewhere.append(asked.url),
        )
        page.goto(url)
        for text in texts:
            page.get_by_text(text).first.wait_for(timeout=60_000)
        page.wait_for_timeout(1000)
        if folder := os.environ.get("DEEPSPEC_SCREENSHOTS"):
            page.screenshot(path=Path(folder) / f"{name}.png")
        browser.close()
    assert not elsewhere
