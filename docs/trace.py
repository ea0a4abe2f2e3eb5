"""Takes the pictures of the page of `landmark generate --trace` that docs/trace.md shows.

    python docs/trace.py                # of the first answer of `make demo`
    python docs/trace.py answer.html    # of a page that was written by --trace

Needs Playwright and a Chromium, as `make test-pages` does; see CONTRIBUTING.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.inference.browser import NoChromium, chromium, opened  # noqa: E402

FOLDER = ROOT / "docs"
# The page names the model as it is named here.
DEMO = "landmark_cli/assets/demo"
SIZE = {"width": 1280, "height": 800}


def main(page: Path | None = None) -> None:
    """Write the pictures. page: of what."""
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        take(browser, page.resolve() if page else demo_page(Path(folder)), FOLDER)


def demo_page(folder: Path) -> Path:
    """The page of what `make demo` asks first, written into a folder."""
    script = [sys.executable, "recipes/demo/ask.py", "--brief", "--pages", folder, "--model", DEMO]
    subprocess.run(script, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    return folder / "question-1.html"


def take(browser: Any, page: Path, folder: Path) -> None:
    """Write a picture of each theme into a folder."""
    for theme in ("light", "dark"):
        with opened(browser, page, color_scheme=theme, viewport=SIZE) as shown:
            # As somebody asks: where was the answer's second token read by the head that reads last?
            shown.locator("#token-1").click()
            shown.locator(".cell").last.click()
            shown.locator("#most button").first.click()
            shown.mouse.move(0, 0)
            path = folder / f"trace-{theme}.png"
            shown.screenshot(path=path)
            # A palette takes a third of the bytes; by this method no colour is off by more than 4 of 255.
            drawn = Image.open(path).convert("RGB")
            drawn.quantize(method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    try:
        main(*map(Path, sys.argv[1:2]))
    except NoChromium as missing:
        raise SystemExit(f"error: {missing}") from None
