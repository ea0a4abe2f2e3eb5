"""A headless Chromium, by Playwright."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# As distributions and vendors name it, and where macOS has it; CHROME_BIN names another one.
NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)


class NoChromium(Exception):
    """There is none on this machine, neither the system's nor Playwright's."""


@functools.cache
def missing() -> str:
    """Why no page can be opened here, if none can."""
    if not find_spec("playwright"):
        return "Playwright is not installed: pip install -c constraints.txt playwright"
    if not find_chromium():
        try:
            with chromium():
                pass
        except NoChromium as none:
            return str(none)
    return ""


def find_chromium() -> str | None:
    """The program that CHROME_BIN names, be it there or not, or that of the system, if there is one."""
    return os.environ.get("CHROME_BIN") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser, as Playwright's synchronous Browser: CHROME_BIN's, the system's, or one that Playwright installed.

    Raises NoChromium where there is none of them. One that is there and does not start is Playwright's error.
    """
    from playwright.sync_api import Error, sync_playwright

    program = find_chromium()
    with sync_playwright() as playwright:
        # A container's root cannot have Chromium's sandbox, and its /dev/shm is small; what is opened here are pages of
        # our own.
        arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
        try:
            browser = playwright.chromium.launch(executable_path=program, args=arguments)
        except Error as error:
            if program is None and "Executable doesn't exist" in error.message:
                raise NoChromium("there is no Chromium: install one, or name it by CHROME_BIN") from None
            raise
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
