"""A headless Chromium, by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# As distributions and vendors name it; CHROME_BIN names another one.
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_chromium() -> str | None:
    """The program, if there is one."""
    return os.environ.get("CHROME_BIN") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser, as Playwright's synchronous Browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # A container's root cannot have Chromium's sandbox; what is opened here are pages of our own.
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Any, path: Path, **context: Any) -> Iterator[Any]:
    """A page of a file, as Playwright's Page; AssertionError where it complained or asked the network for something.

    context: as Browser.new_context takes it.
    """
    with browser.new_context(reduced_motion="reduce", **context) as made:
        page = made.new_page()
        complaints, asked = [], []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        yield page
        assert not complaints, complaints
        assert asked == [path.as_uri()], asked
