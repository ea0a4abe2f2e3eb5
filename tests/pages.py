"""The pages that are shown (README, CONTRIBUTING, docs/), and what stands in them as code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHOWN = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
# What may stand in front of `landmark` where it is a command, and its words.
CALL = re.compile(
    r"^\s*(?:\$ |\d+ s +|cat .* \| |until )?(?:\w+=\w+ )?(?:(?:accelerate launch|torchrun|\$here)\b.*? )?"
    r"(?:landmark|(?:python )?-m landmark_cli) ([a-z].*)"
)
FENCED = re.compile(r"^```.*?\n(.*?)^```", re.DOTALL | re.MULTILINE)


def text_of(path: Path) -> str:
    """A page; of a script its docstring, of a recipe its comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return ast.get_docstring(ast.parse(text)) or ""
    if path.suffix == ".yaml":
        return "\n".join(line.lstrip()[1:].removeprefix(" ") for line in text.splitlines() if line.lstrip()[:1] == "#")
    return text


TEXTS = {
    path.relative_to(ROOT).as_posix(): (path, text_of(path))
    for path in [*SHOWN, *SCRIPTS, *sorted((ROOT / "recipes").rglob("*.yaml"))]
}


def lines_of(text: str) -> list[str]:
    """The lines of a text's blocks of code, fenced or indented, each with those it goes on in."""
    text = re.sub(r"\\\n\s*", "", text)
    plain = FENCED.sub("", text)
    fenced = [line for block in FENCED.findall(text) for line in block.splitlines()]
    return fenced + [line for line in plain.splitlines() if line.startswith("    ")]


def spans_of(text: str) -> list[str]:
    """What stands between backticks in a text's sentences."""
    plain = FENCED.sub("", re.sub(r"\\\n\s*", "", text))
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", plain)]


def calls_in(code: list[str]) -> list[str]:
    """What stands behind `landmark` in every piece of code that is such a command, comments left out."""
    found = (CALL.match(re.sub(r"\s#.*", "", line)) for line in code)
    return [match[1].strip() for match in found if match]


def calls_of(text: str) -> list[list[str]]:
    """The words of every `landmark ...` in a text."""
    return [call.split() for call in calls_in(lines_of(text) + spans_of(text))]


def headings_of(text: str) -> list[str]:
    """The anchors of a page's headings, as GitHub names them."""
    words = [
        re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        for heading in re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)
    ]
    plain = [re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in words]
    before = [plain[:index].count(anchor) for index, anchor in enumerate(plain)]
    return [f"{anchor}-{count}" if count else anchor for anchor, count in zip(plain, before, strict=True)]
