"""A study's results as a table (terminal, Markdown, CSV, JSON) and as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from landmark_cli.console import figure, finite
from landmark_cli.evaluation.pictures import check_picture, name_lines, save_picture
from landmark_cli.file_errors import writing
from landmark_cli.file_writing import write_json, write_whole

from .score import perplexity_of
from .studies import Study, describe


class Drawn(NamedTuple):
    """What a study's picture shows: a figure of the results against one of the rows' settings."""

    setting: str
    length: str
    figure: str
    x: str
    y: str


def _perplexity(result: dict[str, Any]) -> float | None:
    """The perplexity of a stored result, in which an infinite one is None."""
    return None if result.get("loss") is None else perplexity_of(result["loss"])


def _interval(result: dict[str, Any]) -> str | None:
    return "{:.2f}-{:.2f}".format(*result["interval"]) if result.get("interval") else None


# What a study measures -> its tables' columns and what each holds of a stored result, and its picture.
Figures = dict[str, Callable[[dict[str, Any]], Any]]
FIGURES: dict[str, Figures] = {
    "perplexity": {
        "perplexity": _perplexity,
        "accuracy": lambda result: result.get("accuracy"),
        "dropped": lambda result: result.get("dropped_retrievals"),
    },
    "longppl": {
        "key perplexity": lambda result: _perplexity(result["key_tokens"]),
        "perplexity": lambda result: _perplexity(result["all_tokens"]),
        "key tokens": lambda result: result["key_tokens"]["tokens"],
    },
    "ruler": {
        "score": lambda result: result.get("score"),
        "95 % interval": _interval,
        "answers": lambda result: result.get("answers"),
    },
    "passkey": {
        "keys found": lambda result: result.get("accuracy"),
        "95 % interval": _interval,
        "keys asked for": lambda result: result.get("prompts"),
    },
}
# Columns that are left out where no row has such a figure.
SELDOM = ("dropped",)
PICTURES = {
    "perplexity": Drawn("eval-length", "eval_length", "perplexity", "text tokens of a window", "perplexity"),
    "longppl": Drawn(
        "eval-length", "eval_length", "key perplexity", "text tokens of a window", "perplexity of key tokens"
    ),
    "ruler": Drawn("length", "length", "score", "tokens of prompt and answer", "score"),
    "passkey": Drawn("length", "length", "keys found", "text tokens of a prompt", "share of keys found"),
}


def study_table(
    study: Study, results: list[dict[str, Any] | None], corpora: Sequence[str]
) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: role, what it measured where rows differ in that, settings, what was measured, and the paper's
    figures for `corpora`."""
    figures = {
        name: [
            result and FIGURES[row.kind].get(name, _none)(result)
            for row, result in zip(study.rows, results, strict=True)
        ]
        for name in dict.fromkeys(name for kind in study.kinds for name in FIGURES[kind])
    }
    for name in SELDOM:
        if all(found is None for found in figures.get(name, ())):
            figures.pop(name, None)
    several = len(study.kinds) > 1
    measured = ["study"] if several else []
    columns = ["model", *measured, *study.columns, *figures, *(f"paper: {corpus}" for corpus in corpora)]
    rows = [
        [
            row.role,
            *([row.kind] if several else []),
            *(_setting(row.settings.get(key)) for key in study.columns),
            *(found[number] for found in figures.values()),
            *(row.paper.get(corpus) for corpus in corpora),
        ]
        for number, row in enumerate(study.rows)
    ]
    return columns, rows


def _none(result: dict[str, Any]) -> None:
    return None


def _setting(value: Any) -> Any:
    return ", ".join(value) if isinstance(value, list) else value


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
    """Perplexity against evaluation length, or RULER's score or the share of keys against the prompts', one line for
    each model and way of reading, of a study whose rows all measure the same. Needs the extra `plot`."""
    check_picture(path)
    (kind,) = study.kinds
    drawn = PICTURES[kind]
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[int, float]]] = {}
    for row, result in zip(study.rows, results, strict=True):
        found = result and FIGURES[kind][drawn.figure](result)
        if found is None:
            continue
        others = {key: value for key, value in row.settings.items() if key != drawn.setting}
        label = f"{row.role} {describe(others)}".strip()
        lines.setdefault(label, []).append((result[drawn.length], found))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, points in enumerate(lines.values()):
        lengths, perplexities = zip(*sorted(points), strict=True)
        axes.plot(lengths, perplexities, marker="o", label=str(number))
    axes.set_xscale("log", base=2)
    axes.set_xlabel(drawn.x)
    axes.set_ylabel(drawn.y)
    axes.set_title(study.title, parse_math=False)
    name_lines(axes.legend(fontsize="x-small"), lines)
    save_picture(figure, path, dpi=150)


def _markdown_row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(_cell(cell).replace("|", "\\|") for cell in cells) + " |"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return figure(value, ".2f") if isinstance(value, float) else str(value)
