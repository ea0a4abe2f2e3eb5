"""Draws the figures of docs/method.md, with numbers that the definitions of attention/ give.

    python docs/figures.py

Run it after one of them has been changed here; a test fails while the files are not what it draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import torch

from landmark_cli.attention.reference import landmark_attention
from landmark_cli.attention.retrieval import bounded_distance
from landmark_cli.data.landmarks import insert_landmarks

DOCS = Path(__file__).resolve().parent
WIDTH = 760
INK, QUIET, PAPER, LINE = "#1b1f24", "#57606a", "#ffffff", "#8c959f"
TEXT, LANDMARK, QUERY, FAR = "#dbe9f9", "#e69f00", "#009e73", "#f2f4f6"
WORDS = "It was the best of times , it was the".split()
FREQ = 3
# The logits of the example's query with every position of its stream: text, text, text, landmark, ...
LOGITS = [0.2, 1.1, 0.4, 1.4, 0.9, 0.1, 2.2, 2.6, 0.3, 1.2, 0.5, 0.0]


class Drawing:
    """A figure in SVG, as wide as the page and as high as it has become."""

    def __init__(self, title: str):
        self.title = title
        self.parts: list[str] = []
        self.height = 0.0

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, edge: str = LINE, thick: float = 1
    ) -> None:
        """A rectangle."""
        self.height = max(self.height, y + height)
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="3" fill="{fill}" '
            f'stroke="{edge}" stroke-width="{thick}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        said: str,
        size: int = 13,
        color: str = INK,
        anchor: str = "middle",
        bold: bool = False,
    ) -> None:
        """A line of words; y is where it stands on."""
        self.height = max(self.height, y + size / 3)
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}" text-anchor="{anchor}"{weight}>'
            f"{escape(said)}</text>"
        )

    def line(self, points: Sequence[tuple[float, float]], color: str = LINE, arrow: bool = False) -> None:
        """A line through points, perhaps with a head at its end."""
        head = ' marker-end="url(#head)"' if arrow else ""
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{drawn}" fill="none" stroke="{color}" stroke-width="1.3"{head}/>')

    def brace(self, x: float, y: float, width: float, said: str) -> None:
        """A bracket under something, and what it is."""
        self.line([(x, y), (x, y + 5), (x + width, y + 5), (x + width, y)])
        self.text(x + width / 2, y + 19, said, 12, QUIET)

    def svg(self) -> str:
        """The file."""
        height = math.ceil(self.height + 12)
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
                f'height="{height}" role="img" font-family="system-ui, sans-serif">',
                f"<title>{escape(self.title)}</title>",
                '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
                f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{LINE}"/></marker></defs>',
                f'<rect width="{WIDTH}" height="{height}" fill="{PAPER}"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


def main() -> None:
    """Write all figures."""
    for name, draw in FIGURES.items():
        (DOCS / name).write_text(draw(), encoding="utf-8")


def stream() -> list[str | None]:
    """The example's text with landmarks, None, where they stand."""
    ids = insert_landmarks(torch.arange(len(WORDS)), FREQ, len(WORDS)).tolist()
    return [None if index == len(WORDS) else WORDS[index] for index in ids]


def blocks_figure() -> str:
    """A text, and the stream that it becomes."""
    drawing = Drawing("A text of ten tokens; the stream of blocks of three tokens and a landmark each that it becomes")
    size, left = 50.0, 88.0
    drawing.text(left - 12, 46, "text", anchor="end", bold=True)
    for index, word in enumerate(WORDS):
        drawing.box(left + index * size, 26, size - 4, 32, TEXT)
        drawing.text(left + index * size + size / 2 - 2, 46, word)
    drawing.text(left - 12, 112, "stream", anchor="end", bold=True)
    for index, word in enumerate(stream()):
        x = left + index * size
        _token(drawing, x, 92, size - 4, word)
        drawing.text(x + size / 2 - 2, 140, str(index), 11, QUIET)
    drawing.text(left - 12, 140, "position", 11, QUIET, "end")
    for block in range(len(WORDS) // FREQ):
        drawing.brace(left + block * (FREQ + 1) * size, 148, (FREQ + 1) * size - 4, f"block {block}")
    drawing.brace(left + len(WORDS) // FREQ * (FREQ + 1) * size, 148, size - 4, "incomplete")
    drawing.text(
        left, 192, "L is the landmark: one token of the vocabulary, the same in every block.", 12, QUIET, "start"
    )
    return drawing.svg()


def attention_figure() -> str:
    """How the last token of the stream shares its attention out."""
    words = stream()[: len(LOGITS) - 1]
    weights = attention_weights(LOGITS[: len(words)])
    size = FREQ + 1
    drawing = Drawing(
        "One query's attention: an outer softmax over landmarks and its own block, an inner one in each block"
    )
    left, cell = 88.0, 56.0
    own = len(words) // size * size
    outer = {index: weights[index] for index in range(own, len(words))}
    outer |= {index: sum(weights[index - FREQ : index]) for index in range(FREQ, own, size)}
    for index, word in enumerate(words):
        x = left + index * cell
        last = index == len(words) - 1
        _token(drawing, x, 96, cell - 4, word, QUERY if last else None)
        if index in outer:
            drawing.text(x + cell / 2 - 2, 78, f"{outer[index]:.2f}", 13, bold=True)
            _bar(drawing, x + 8, 62, cell - 20, outer[index], LANDMARK if word is None else QUERY)
        if word is not None and index < own:
            inner = weights[index] / outer[index // size * size + FREQ]
            drawing.text(x + cell / 2 - 2, 166, f"{inner:.2f}", 13)
            drawing.text(x + cell / 2 - 2, 202, f"{weights[index]:.3f}", 13, bold=True)
        elif word is None:
            drawing.text(x + cell / 2 - 2, 202, "0", 13, QUIET)
            drawing.line([(x + cell / 2 - 2, 128), (x + cell / 2 - 2, 146), (x - (FREQ - 0.5) * cell, 146)], arrow=True)
        else:
            drawing.text(x + cell / 2 - 2, 202, f"{weights[index]:.3f}", 13, bold=True)
    for y, said in ((78, "outer"), (116, "stream"), (166, "inner"), (202, "weight")):
        drawing.text(left - 12, y, said, anchor="end", bold=True)
    for block in range(own // size):
        drawing.brace(left + block * size * cell, 212, size * cell - 4, f"block {block}")
    drawing.brace(left + own * cell, 212, (len(words) - own) * cell - 4, "own block")
    total = sum(outer.values())
    for y, said in (
        (
            254,
            f"The query stands at the last token. Outer shares add up to {total:.2f}, inner shares to 1 in each block.",
        ),
        (272, "A weight is outer times inner; in the own block it is the outer share. A landmark has no weight."),
    ):
        drawing.text(left, y, said, 12, QUIET, "start")
    return drawing.svg()


def slots_figure(cached: int = 9, top_k: int = 3, chosen: Sequence[int] = (2, 5, 8)) -> str:
    """Where the blocks that a query retrieves stand when a chunk is read."""
    drawing = Drawing("Reading a chunk: the blocks that a query chooses stand in slots right before the chunk")
    ages = torch.tensor([cached - block for block in chosen])
    distance = bounded_distance(ages.view(1, 1, 1, -1), torch.tensor([cached]), top_k).flatten().tolist()
    slots = [top_k + 1 - d for d in distance]
    left, cell = 88.0, 62.0
    drawing.text(left - 12, 46, "cache", anchor="end", bold=True)
    for block in range(cached):
        taken = block in chosen
        x = left + block * cell
        drawing.box(x, 26, cell - 6, 32, LANDMARK if taken else FAR, INK if taken else LINE, 1.6 if taken else 1)
        drawing.text(x + cell / 2 - 3, 46, f"block {block}", 12, bold=taken)
    drawing.text(left + cached * cell + 8, 46, "then the chunk", 12, QUIET, "start")
    drawing.brace(left + (cached - top_k) * cell, 60, top_k * cell - 6, f"the last k = {top_k}, scored where they are")
    drawing.brace(left, 60, (cached - top_k) * cell - 6, "older ones, all scored as if in slot 0")
    top = 150.0
    drawing.text(left - 12, top + 20, "window", anchor="end", bold=True)
    wide = 96.0
    for slot in range(top_k + 1):
        x = left + slot * wide
        held = [block for block, at in zip(chosen, slots, strict=True) if at == slot]
        drawing.box(x, top, wide - 6, 32, LANDMARK if held else PAPER, INK if held else LINE, 1.6 if held else 1)
        drawing.text(
            x + wide / 2 - 3,
            top + 20,
            f"block {held[0]}" if held else "empty",
            12,
            INK if held else QUIET,
            bold=bool(held),
        )
        drawing.text(x + wide / 2 - 3, top + 48, f"slot {slot}", 12, QUIET)
        for block in held:
            middle = left + block * cell + cell / 2 - 3
            drawing.line(
                [(middle, 84), (middle, 104), (x + wide / 2 - 3, 132), (x + wide / 2 - 3, top - 3)], arrow=True
            )
    x = left + (top_k + 1) * wide
    drawing.box(x, top, 74, 32, TEXT)
    drawing.text(x + 37, top + 20, "incomplete", 12)
    drawing.box(x + 80, top, WIDTH - x - 92, 32, QUERY, INK, 1.6)
    drawing.text(x + 80 + (WIDTH - x - 92) / 2, top + 20, "chunk", 12, PAPER, bold=True)
    drawing.line([(left, top + 62), (WIDTH - 14, top + 62)], arrow=True)
    drawing.text(left, top + 80, "position 0", 12, QUIET, "start")
    drawing.text(WIDTH - 14, top + 80, "at most the trained length, however long the text is", 12, QUIET, "end")
    return drawing.svg()


def attention_weights(logits: Sequence[float]) -> list[float]:
    """The weights that the definition gives the last position of a stream whose logits these are."""
    length = len(logits)
    keys = torch.eye(length, dtype=torch.float64)[None, None]
    query = torch.tensor(logits, dtype=torch.float64).view(1, 1, 1, length)
    return landmark_attention(query, keys, keys, block_size=FREQ + 1, scale=1.0).flatten().tolist()


def _token(drawing: Drawing, x: float, y: float, width: float, word: str | None, edge: str | None = None) -> None:
    """A token of a stream; a landmark is told by its letter and its edge, not by its colour alone."""
    is_landmark = word is None
    drawing.box(
        x,
        y,
        width,
        32,
        LANDMARK if is_landmark else TEXT,
        edge or (INK if is_landmark else LINE),
        2 if is_landmark or edge else 1,
    )
    drawing.text(x + width / 2, y + 20, "L" if word is None else word, bold=is_landmark)


def _bar(drawing: Drawing, x: float, bottom: float, width: float, share: float, color: str) -> None:
    """A bar as high as a share; 60 points are all."""
    drawing.box(x, bottom - 60 * share, width, 60 * share, color)


FIGURES = {
    "method-blocks.svg": blocks_figure,
    "method-attention.svg": attention_figure,
    "method-slots.svg": slots_figure,
}

if __name__ == "__main__":
    main()
