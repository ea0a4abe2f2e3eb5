"""Pictures of results, drawn with matplotlib, which the extra `plot` brings."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from landmark_cli.errors import UsageError, import_extra
from landmark_cli.file_errors import writing
from landmark_cli.file_writing import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend


def check_picture(path: Path, what: str = "--plot") -> str:
    """The format that a picture's name ends with, PNG where the name has no ending.

    Raises UsageError for a format that is not drawn, LandmarkError where matplotlib is missing.
    """
    import_extra("matplotlib", "plot")
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    kind = path.suffix[1:].lower() or "png"
    if kind not in known:
        raise UsageError(f"{what} {path}: .{kind} is no kind of picture that is drawn: there are {', '.join(known)}")
    return kind


def name_lines(legend: Legend, names: Iterable[str]) -> None:
    """Give a legend's lines their names. They are put in afterwards: a legend leaves out names that begin with an
    underscore, and reads $ as mathematics."""
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)


def save_picture(figure: Figure, path: Path, dpi: int, what: str = "--plot") -> None:
    """Write a figure to a file. Raises as `check_picture` does, and LandmarkError where it cannot be written."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=check_picture(path, what), dpi=dpi)
    with writing(path, what):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, drawn.getvalue())
