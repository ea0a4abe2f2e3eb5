"""`landmark plot`: pictures of runs, and of what RULER has found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from landmark_cli.console import info
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.options import Options, check_outputs, option

OUT = "--out"


@dataclass(kw_only=True)
class PlotOptions(Options):
    """Draw the course of runs, or the tables of RULER.

    Of runs: loss, validation loss, learning rate, gradient norm and tokens per second over the steps, several runs in
    one picture, while they go on or afterwards. Of what `landmark eval ruler --json` wrote: heat maps of the scores by
    task and length, and of what was found by depth, one file beside the other. Needs the extra plot.
    """

    what: list[Path] = option(
        positional=True, help="Directories of runs (or their metrics.jsonl), or files that eval ruler --json wrote."
    )
    out: Path = option(is_output=True, saved=False, help="The picture: .png, .pdf, .svg and what else matplotlib has.")


def run(options: PlotOptions) -> Path:
    """Write the picture. Returns its path.

    Raises UsageError for runs and tables in one picture and for a kind of picture that is not drawn, LandmarkError for
    what cannot be read, for files without figures and where matplotlib is missing.
    """
    from landmark_cli.evaluation.pictures import check_picture

    check_outputs(options)
    check_picture(options.out, OUT)
    tables = [path for path in options.what if path.suffix == ".json"]
    if tables and len(tables) < len(options.what):
        other = next(path for path in options.what if path not in tables)
        raise UsageError(f"{tables[0]} is drawn as a table and {other} as a run: draw them into pictures of their own")
    if tables:
        draw_tables(options.out, tables)
    else:
        draw_runs(options.out, options.what)
    info(f"wrote {options.out}")
    return options.out


def draw_tables(out: Path, files: Sequence[Path]) -> None:
    """Draw RULER's tables side by side, a column for each file and way of reading."""
    from landmark_cli.evaluation.ruler.report import draw_ruler, read_ruler

    columns: dict[str, Any] = {}
    tables = [read_ruler(path) for path in files]
    models = {table.model for table in tables}
    names = told_apart([Path(table.model).name for table in tables], files)
    for name, table in zip(names, tables, strict=True):
        for reading, cells in table.by_reading().items():
            # What tells one column from another: nothing but the way of reading where there is one file.
            columns[reading if len(files) == 1 else f"{name}\n{reading}"] = cells
    model = Path(models.pop()).name if len(models) == 1 else ""
    draw_ruler(out, columns, f"RULER, {model}" if model else "RULER", OUT)


def draw_runs(out: Path, runs: Sequence[Path]) -> None:
    """Draw what the runs' metrics.jsonl say."""
    from landmark_cli.evaluation import curves
    from landmark_cli.training.metrics_file import read_metrics

    files = [metrics_of(path) for path in runs]
    found = {}
    for name, file in zip(told_apart([file.absolute().parent.name for file in files], runs), files, strict=True):
        found[name] = read_metrics(file)
        if not any(curves.points(found[name], curve.field)[0] for curve in curves.CURVES):
            raise LandmarkError(f"{file} has no figures yet: a run writes them every --log-every steps")
    curves.draw_runs(out, found, OUT)


def told_apart(names: Sequence[str], paths: Sequence[Path]) -> Sequence[str]:
    """What a picture calls several things: their names, or their paths where one has no name or two have the same."""
    return names if all(names) and len(set(names)) == len(names) else [str(path) for path in paths]


def metrics_of(path: Path) -> Path:
    """The file of metrics that a run's directory, or the file itself, means."""
    from landmark_cli.training.metrics_file import METRICS

    if path.is_dir():
        if not (path / METRICS).is_file():
            raise LandmarkError(f"{path} holds no {METRICS}, so it is no run's directory")
        return path / METRICS
    if not path.exists():
        raise LandmarkError(f"there is no run {path}; name a run's directory, or what eval ruler --json wrote")
    return path
