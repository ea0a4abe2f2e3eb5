"""Shares by two things, such as depth and length, as coloured cells in the terminal and in a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from landmark_cli.evaluation.pictures import check_picture, save_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

    from landmark_cli.evaluation.passkey import Cell, PassKeyResult

# Red, green and blue for no key found, half of them, and all.
COLOURS = ((215, 48, 39), (254, 224, 139), (26, 152, 80))


def colour(share: float) -> tuple[int, int, int]:
    """The colour of a share from 0 to 1."""
    place = min(max(share, 0.0), 1.0) * (len(COLOURS) - 1)
    first = min(int(place), len(COLOURS) - 2)
    return tuple(round(a + (b - a) * (place - first)) for a, b in zip(COLOURS[first], COLOURS[first + 1], strict=True))


class ByDepth(Protocol):
    """What was found by depth, (from, to) a share of the text, and by length in tokens."""

    @property
    def lengths(self) -> list[int]: ...

    @property
    def depths(self) -> list[tuple[float, float]]: ...

    def cell(self, length: int, depths: tuple[float, float]) -> Cell: ...


def terminal_heat_map(result: ByDepth, title: str = "keys found, by depth and length") -> Table:
    """A row for each depth, a column for each length; a cell says the share found and has its colour."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("depth", no_wrap=True)
    for length in result.lengths:
        table.add_column(f"{length}", justify="center", no_wrap=True)
    for depths in result.depths:
        cells = [result.cell(length, depths) for length in result.lengths]
        shown = [
            Text(f" {cell.accuracy:4.0%} ", style="black on rgb({},{},{})".format(*colour(cell.accuracy)))
            if cell.prompts
            else Text("  -  ")
            for cell in cells
        ]
        table.add_row(depth_name(depths), *shown)
    return table


def draw_heat_map(result: PassKeyResult, path: Path, title: str) -> None:
    """Write the heat map as a picture. Needs the extra `plot`."""
    check_picture(path)
    from matplotlib.figure import Figure

    lengths, rows = result.lengths, result.depths
    figure = Figure(figsize=(1.6 + 0.9 * len(lengths), 1.3 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    draw_cells(axes, depth_shares(result), [depth_name(depths) for depths in rows], lengths)
    axes.set_ylabel("depth of the key")
    axes.set_title(title, fontsize=10, parse_math=False)
    save_picture(figure, path, dpi=100)


def depth_shares(result: ByDepth) -> list[list[float]]:
    """The shares found, a row for each depth and a column for each length; nan where nothing was asked."""
    return [[result.cell(length, depths).accuracy for length in result.lengths] for depths in result.depths]


def draw_cells(axes: Axes, shares: list[list[float]], rows: Sequence[str], lengths: Sequence[int]) -> None:
    """Draw shares as coloured cells, a row for each of `rows` and a column for each length; none where one is nan."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("found", [[c / 255 for c in one] for one in COLOURS])
    axes.imshow(shares, cmap=colours, vmin=0, vmax=1, aspect="auto")
    for row, values in enumerate(shares):
        for column, share in enumerate(values):
            axes.text(column, row, "" if share != share else f"{share:.0%}", ha="center", va="center", fontsize=9)
    axes.set_xticks(range(len(lengths)), [f"{length}" for length in lengths])
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("tokens of the prompt")


def depth_name(depths: Sequence[float]) -> str:
    """A depth, or a range of depths, in per cent."""
    low, high = depths
    return f"{low:.0%}" if low == high else f"{low:.0%}-{high:.0%}"
