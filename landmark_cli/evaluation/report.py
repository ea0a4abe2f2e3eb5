"""A study's results as a table (terminal, Markdown, CSV, JSON) and as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from landmark_cli.console import figure, finite
from landmark_cli.evaluation.pictures import check_picture, save_picture
from landmark_cli.files import write_json, write_whole, writing

from .score import perplexity_of
from .studies import Study, describe


def study_table(
    study: Study, results: list[dict[str, Any] | None], corpora: Sequence[str]
) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: role, settings, what was measured, and the paper's figures for `corpora`."""
    with_dropped = any(result and result["dropped_retrievals"] is not None for result in results)
    columns = ["model", *study.columns, "perplexity", "accuracy"]
    columns += ["dropped"] * with_dropped + [f"paper: {corpus}" for corpus in corpora]
    rows = []
    for row, result in zip(study.rows, results, strict=True):
        result = result or {}
        cells = [row.role, *(row.settings.get(key) for key in study.columns)]
        cells += [_perplexity(result), result.get("accuracy")]
        cells += [result.get("dropped_retrievals")] * with_dropped + [row.paper.get(corpus) for corpus in corpora]
        rows.append(cells)
    return columns, rows


def write_tables(folder: Path, study: Study, columns: list[str], rows: list[list[Any]], data: dict[str, Any]) -> None:
    """Write NAME.md, NAME.csv and NAME.json into a folder."""
    lines = [f"# {study.title}", "", _markdown_row(columns), "|" + " --- |" * len(columns), *map(_markdown_row, rows)]
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(columns)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
    with writing(folder, "--output"):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{study.name}.md", "\n".join(lines) + "\n")
        write_whole(folder / f"{study.name}.csv", table.getvalue())
        write_json(folder / f"{study.name}.json", finite(data))


def draw_study(path: Path, study: Study, results: list[dict[str, Any] | None]) -> None:
    """Perplexity against evaluation length, one line for each model and way of reading. Needs the extra `plot`."""
    check_picture(path)
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[int, float]]] = {}
    for row, result in zip(study.rows, results, strict=True):
        if result is None:
            continue
        others = {key: value for key, value in row.settings.items() if key != "eval-length"}
        label = f"{row.role} {describe(others)}".strip()
        lines.setdefault(label, []).append((result["eval_length"], _perplexity(result)))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, points in enumerate(lines.values()):
        lengths, perplexities = zip(*sorted(points), strict=True)
        axes.plot(lengths, perplexities, marker="o", label=str(number))
    axes.set_xscale("log", base=2)
    axes.set_xlabel("text tokens of a window")
    axes.set_ylabel("perplexity")
    axes.set_title(study.title, parse_math=False)
    # The lines' names are put in afterwards: a legend leaves out names that begin with an underscore, and reads $ as
    # mathematics.
    for text, label in zip(axes.legend(fontsize="x-small").get_texts(), lines, strict=True):
        text.set_parse_math(False)
        text.set_text(label)
    save_picture(figure, path, dpi=150)


def _markdown_row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(_cell(cell).replace("|", "\\|") for cell in cells) + " |"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return figure(value, ".2f") if isinstance(value, float) else str(value)


def _perplexity(result: dict[str, Any]) -> float | None:
    """The perplexity of a stored result, in which an infinite one is None."""
    return None if result.get("loss") is None else perplexity_of(result["loss"])
