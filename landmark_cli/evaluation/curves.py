"""The course of runs as a picture: what their metrics.jsonl says, step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from landmark_cli.evaluation.pictures import check_picture, name_lines, save_picture

COLUMNS = 2
# Curves of fewer points than this show them.
FEW_POINTS = 40
DASHES = ("-", "--", "-.", ":")


class Curve(NamedTuple):
    """What one panel shows: a field of the records, its name, and whether its powers of ten are evenly spaced."""

    field: str
    name: str
    logarithmic: bool = False


CURVES = (
    Curve("loss", "loss"),
    Curve("validation_loss", "validation loss"),
    Curve("learning_rate", "learning rate"),
    Curve("gradient_norm", "gradient norm", logarithmic=True),
    Curve("tokens_per_second", "tokens/s"),
)


def draw_runs(path: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]], what: str = "--out") -> None:
    """Write a picture of runs: a panel for each of `CURVES` that any of them has, over the steps.

    runs: the records of each, by its name. what: the option that names the picture. Needs the extra `plot`. Raises
    ValueError where there is nothing to draw.
    """
    check_picture(path, what)
    from matplotlib.figure import Figure

    panels = [(curve, {name: points(records, curve.field) for name, records in runs.items()}) for curve in CURVES]
    panels = [(curve, of_runs) for curve, of_runs in panels if any(steps for steps, _ in of_runs.values())]
    if not panels:
        raise ValueError("no record has a figure that is drawn")
    rows = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(5.5 * COLUMNS, 2.8 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for axes, (curve, of_runs) in zip(grid, panels, strict=False):
        lines = []
        for number, (steps, values) in enumerate(of_runs.values()):
            marker = "." if len(steps) < FEW_POINTS else ""
            # Told apart without colours too.
            lines += axes.plot(steps, values, DASHES[number % len(DASHES)], marker=marker, linewidth=1.2)
        if curve.logarithmic and all(value > 0 for _, values in of_runs.values() for value in values if value == value):
            axes.set_yscale("log")
        axes.set_title(curve.name, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    if len(runs) == 1:
        figure.suptitle(next(iter(runs)), fontsize=11, parse_math=False)
    else:
        # Names that matplotlib would read something into are put in by `name_lines`.
        numbers = [str(number) for number in range(len(runs))]
        name_lines(figure.legend(lines, numbers, loc="outside lower center", ncols=min(3, len(runs)), fontsize=9), runs)
    save_picture(figure, path, dpi=110, what=what)


def points(records: Sequence[Mapping[str, Any]], field: str) -> tuple[list[int], list[float]]:
    """The steps at which a field was recorded, and its values: nan where one was not finite, which leaves a gap."""
    found = [(record["step"], record[field]) for record in records if field in record]
    kept = [(step, math.nan if value is None else float(value)) for step, value in found if is_number(value)]
    return [step for step, _ in kept], [value for _, value in kept]


def is_number(value: Any) -> bool:
    """Whether a value of a record is a number, or stands for one that was not finite."""
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
