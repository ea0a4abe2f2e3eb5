"""Takes the pictures of the page of `landmark generate --trace` that docs/trace.md shows.

    python docs/trace.py                # of a made-up trace of 100 thousand tokens
    python docs/trace.py answer.html    # of a page that was written by --trace

Needs Playwright and a Chromium, as `make test-pages` does; see CONTRIBUTING.md.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from landmark_cli.inference.trace import write_trace  # noqa: E402
from tests.inference.browser import chromium, opened  # noqa: E402
from tests.inference.traces import made_trace  # noqa: E402

FOLDER = ROOT / "docs"
SIZE = {"width": 1280, "height": 800}


def main(page: Path | None = None) -> None:
    """Write the pictures. page: of what; by default of a made-up trace."""
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        if page is None:
            page = Path(folder) / "trace.html"
            write_trace(page, made_trace())
        take(browser, page, FOLDER)


def take(browser: Any, page: Path, folder: Path) -> None:
    """Write a picture of each theme into a folder."""
    for theme in ("light", "dark"):
        with opened(browser, page, color_scheme=theme, viewport=SIZE) as shown:
            # As somebody asks: where was the answer's second token read, and by which heads?
            shown.locator("#token-1").click()
            shown.locator("#most button").first.click()
            shown.mouse.move(0, 0)
            path = folder / f"trace-{theme}.png"
            shown.screenshot(path=path)
            # A palette takes a third of the bytes; by this method no colour is off by more than 4 of 255.
            drawn = Image.open(path).convert("RGB")
            drawn.quantize(method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
