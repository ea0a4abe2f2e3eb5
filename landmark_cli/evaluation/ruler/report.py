"""What was answered, as a table, as data, by depth in the terminal and as a picture; and single samples, to be read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from landmark_cli.console import info
from landmark_cli.errors import LandmarkError
from landmark_cli.evaluation import passkey
from landmark_cli.evaluation.heat_map import depth_name, depth_shares, draw_cells
from landmark_cli.evaluation.passkey import DEPTH_BINS
from landmark_cli.evaluation.pictures import check_picture, save_picture
from landmark_cli.evaluation.ways import Way
from landmark_cli.file_reading import read_record

from .encoding import PromptEncoder
from .haystacks import Prompt
from .run import Answer, Cell
from .score import bootstrap_interval
from .task import Task

# How much of a prompt's end and of an answer is shown.
END_TOKENS = 80
ANSWER_SHOWN = 300
MEAN = "mean"


def ruler_table(cells: Sequence[Cell], lengths: Sequence[int]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: a row for each way of reading and task, and one for the mean of the way's tasks; in a cell the
    mean score and its 95 % bootstrap interval."""
    rows = []
    for way, of_way in by_way(cells).items():
        tasks = list(dict.fromkeys(cell.task for cell in of_way))
        found = {(cell.task, cell.length): cell for cell in of_way}
        for task in tasks:
            row = [found.get((task, length)) for length in lengths]
            rows.append([way.name, task, *(_figure(one.mean, one.interval) if one else "-" for one in row)])
        if len(tasks) > 1:
            of_lengths = [[cell for cell in of_way if cell.length == length] for length in lengths]
            rows.append([way.name, MEAN, *(_figure(*of_tasks(one)) if one else "-" for one in of_lengths)])
    return ["reading", "task", *map(str, lengths)], rows


def ruler_data(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Every cell with every answer, as plain data. "begins": the tokens of the prose at which the samples' stretches
    begin; None where there is none."""
    return [
        {
            "reading": cell.way.name,
            "top_k_blocks": cell.way.top_k_blocks,
            "full_attention": cell.way.full,
            "task": cell.task,
            "tokens": cell.length,
            "samples": len(cell.answers),
            "score": cell.mean,
            "interval": cell.interval,
            "begins": begins if None not in (begins := [answer.begin for answer in cell.answers]) else None,
            "answers": [asdict(answer) for answer in cell.answers],
        }
        for cell in cells
    ]


def of_tasks(cells: Sequence[Cell]) -> tuple[float, tuple[float, float]]:
    """The mean of the cells' means, and its 95 % bootstrap interval."""
    return sum(cell.mean for cell in cells) / len(cells), bootstrap_interval(*(cell.scores for cell in cells))


def mean_data(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The mean of each way's tasks at every length, as plain data."""
    data = []
    for way, of_way in by_way(cells).items():
        for length in dict.fromkeys(cell.length for cell in of_way):
            some = [cell for cell in of_way if cell.length == length]
            mean, interval = of_tasks(some)
            data.append(
                {"reading": way.name, "tokens": length, "tasks": len(some), "score": mean, "interval": interval}
            )
    return data


def by_way(cells: Sequence[Cell]) -> dict[Way, list[Cell]]:
    """The cells of each way of reading, in the order they come."""
    return {way: [cell for cell in cells if cell.way == way] for way in dict.fromkeys(cell.way for cell in cells)}


@dataclass(frozen=True)
class FoundByDepth:
    """The references of cells that stand at one place each, and how many of them were found, by depth and length."""

    cells: Sequence[Cell | SavedCell]

    @property
    def lengths(self) -> list[int]:
        return sorted({cell.length for cell in self.cells})

    @property
    def depths(self) -> list[tuple[float, float]]:
        return [(row / DEPTH_BINS, (row + 1) / DEPTH_BINS) for row in range(DEPTH_BINS)]

    def cell(self, length: int, depths: tuple[float, float]) -> passkey.Cell:
        """The references of a length in a range of depths, whose end is part of it where it is 1."""
        low, high = depths
        inside = [
            found
            for cell in self.cells
            for answer in cell.answers
            for found, depth in zip(answer.found, answer.depths or (), strict=bool(answer.depths))
            if cell.length == length and (low <= depth < high or depth == high == 1.0)
        ]
        return passkey.Cell(len(inside), sum(inside))

    def __bool__(self) -> bool:
        return any(answer.depths for cell in self.cells for answer in cell.answers)


def draw_ruler(path: Path, columns: Mapping[str, Sequence[Cell | SavedCell]], title: str, what: str = "--plot") -> None:
    """Write a picture: for each model and way of reading, by its name, the scores by task and, beneath, what was found
    by depth. what: the option that names the picture. Needs the extra `plot`."""
    check_picture(path, what)
    from matplotlib.figure import Figure

    cells = [cell for column in columns.values() for cell in column]
    lengths = sorted({cell.length for cell in cells})
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    heights = [max(len(tasks), 2), DEPTH_BINS] if FoundByDepth(cells) else [max(len(tasks), 2)]
    width = len(columns) * (2.2 + 0.8 * len(lengths))
    figure = Figure(figsize=(width, 1.6 * len(heights) + 0.34 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), len(columns), squeeze=False, height_ratios=heights)
    for column, (name, of_column) in enumerate(columns.items()):
        means = {(cell.task, cell.length): cell.mean for cell in of_column}
        shares = [[means.get((task, length), math.nan) for length in lengths] for task in tasks]
        draw_cells(axes[0, column], shares, tasks, lengths)
        axes[0, column].set_title(name, fontsize=10, parse_math=False)
        if len(heights) > 1:
            found = FoundByDepth(of_column)
            draw_cells(axes[1, column], depth_shares(found), [depth_name(one) for one in found.depths], found.lengths)
            axes[1, column].set_title("found, by depth", fontsize=10)
    figure.suptitle(title, fontsize=10, parse_math=False)
    save_picture(figure, path, dpi=100, what=what)


@dataclass(frozen=True)
class SavedCell:
    """A cell as `ruler_data` writes it, as far as it is drawn. answers: empty where these were not kept."""

    reading: str
    task: str
    tokens: int
    score: float
    answers: list[Answer] = field(default_factory=list)

    @property
    def length(self) -> int:
        return self.tokens

    @property
    def mean(self) -> float:
        return self.score


@dataclass(frozen=True)
class SavedRuler:
    """What `landmark eval ruler --json` writes, as far as it is drawn."""

    cells: list[SavedCell]
    model: str = ""

    def by_reading(self) -> dict[str, list[SavedCell]]:
        """The cells of each way of reading, by its name."""
        ways = dict.fromkeys(cell.reading for cell in self.cells)
        return {way: [cell for cell in self.cells if cell.reading == way] for way in ways}


def read_ruler(path: Path) -> SavedRuler:
    """What `landmark eval ruler --json` wrote. Raises LandmarkError where the file holds something else."""
    saved = read_record(SavedRuler, path, to_do="name a file that eval ruler --json wrote")
    if not saved.cells:
        raise LandmarkError(f"{path} holds no scores")
    return saved


def show_sample(
    tokenizer: PreTrainedTokenizerBase,
    encoder: PromptEncoder,
    task: Task,
    length: int,
    sample: int,
    prompt: Prompt,
    answer: Answer,
) -> None:
    """Tell the user what one sample was: how its prompt begins and ends, what was expected, what was answered."""
    tokens = prompt.tokens.tolist()
    begin = encoder.begin[:1]
    begins = (
        f"begins with {tokenizer.decode(begin)!r} ({tokens.count(begin[0])} of it)" if begin else "nothing begins it"
    )
    info(
        f"{task.name}, {length} tokens, sample {sample}: a prompt of {len(tokens)}, {task.new_tokens} for the answer; "
        f"{begins}\n"
        f"  ... {tokenizer.decode(tokens[-END_TOKENS:])!r}\n"
        f"  expected {', '.join(prompt.references)}\n"
        f"  answered {answer.answer[:ANSWER_SHOWN]!r}: {answer.score:.2f}"
    )


def _figure(mean: float, interval: tuple[float, float]) -> str:
    return "{:.3f} ({:.2f}-{:.2f})".format(mean, *interval)
