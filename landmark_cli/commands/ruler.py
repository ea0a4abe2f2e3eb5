"""`landmark eval ruler`: RULER's synthetic tasks, read in one or several ways."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from landmark_cli.commands.evaluate import (
    EvaluationOptions,
    by_text,
    check_retrieves,
    reading_alone,
    reading_alone_data,
)
from landmark_cli.commands.measurement import (
    file_option,
    haystack_option,
    json_option,
    prompts_at_a_time,
    samples_option,
    several_top_k_blocks_option,
)
from landmark_cli.commands.models import name_model, open_model, precision_of
from landmark_cli.console import counted, info, results, show
from landmark_cli.interrupts import interrupts, keeping
from landmark_cli.locks import sole_writer
from landmark_cli.options import LARGEST_SEED, LONGEST, check_outputs, option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from landmark_cli.evaluation.ruler.run import Cell, Show
    from landmark_cli.evaluation.ruler.task import Task
    from landmark_cli.evaluation.studies import FinishedRows

MEASUREMENT = "Measurement"
OUTPUT = "Output"


@dataclass
class RulerOptions(EvaluationOptions):
    """Ask a model RULER's synthetic tasks at several lengths, in several ways of reading.

    Needles in filler, in prose and among each other, chains of variables, most frequent words and, where their files
    are given, questions about documents (arXiv 2404.06654). Lengths count tokens exactly, the answer's room included; a
    sample asks the same question at every length. A score is the share of the reference strings that the answer
    contains. Every answer is kept in the output directory: an interrupted run goes on.
    """

    tasks: list[str] | None = option(
        None,
        panel=MEASUREMENT,
        metavar="<name>...",
        help="Tasks to measure, with commas between or repeated: niah_single_1 to _3, niah_multikey_1 to _3, "
        "niah_multivalue, niah_multiquery, vt, cwe, fwe, qa. [default: all; qa where --qa is given]",
    )
    lengths: list[int] = option(
        [4096, 8192, 16384],
        panel=MEASUREMENT,
        min=1,
        max=LONGEST,
        help="Tokens of prompt and answer, with commas between.",
        saves_memory="shorter --lengths",
    )
    samples: int = samples_option(MEASUREMENT)
    top_k_blocks: list[int] | None = several_top_k_blocks_option()
    full_attention: bool = option(
        False,
        panel=MEASUREMENT,
        help="Measure reading with ordinary attention too, up to the positions that the model knows.",
    )
    chat: bool = option(
        False, panel=MEASUREMENT, help="Ask in the tokenizer's chat template, as a user whose answer has begun."
    )
    haystack: Path | None = haystack_option(MEASUREMENT)
    qa: Path | None = option(
        None, panel=MEASUREMENT, help="SQuAD's or HotpotQA's JSON file, whose questions the task qa asks."
    )
    batch_size: int | None = prompts_at_a_time(MEASUREMENT)
    seed: int = option(0, panel=MEASUREMENT, min=0, max=LARGEST_SEED, help="Seed for drawing what is hidden and where.")
    output: Path = option(
        Path("studies/ruler"), panel=OUTPUT, help="Directory of the answers, from which an interrupted run goes on."
    )
    show: int = option(
        0,
        panel=OUTPUT,
        min=0,
        saved=False,
        help="Show so many samples of each task and length: the prompt's end, what is expected, what was answered.",
    )
    json: str | None = json_option(OUTPUT)
    plot: Path | None = file_option(OUTPUT, "Write scores by task and by depth as a picture. Needs the extra plot.")


def run(options: RulerOptions) -> dict[str, Any]:
    """Ask what is not answered yet, print the table and the heat maps and, where asked, write data and a picture.
    Returns what --json writes.

    Raises UsageError for an unknown task, a length that is too short or a tokenizer without a chat template,
    LandmarkError where a package or a file is missing, Stopped where a signal came.
    """
    check_outputs(options)
    if options.plot is not None:
        from landmark_cli.evaluation.pictures import check_picture

        check_picture(options.plot)
    from landmark_cli.evaluation.heat_map import terminal_heat_map
    from landmark_cli.evaluation.ruler.benchmark import task_names
    from landmark_cli.evaluation.ruler.haystacks import NOVELS
    from landmark_cli.evaluation.ruler.report import (
        FoundByDepth,
        by_way,
        draw_ruler,
        mean_data,
        ruler_data,
        ruler_table,
    )
    from landmark_cli.evaluation.studies import FinishedRows

    asked_for = [name.strip() for part in options.tasks or () for name in part.split(",") if name.strip()]
    names = task_names(asked_for, options.qa is not None)
    lengths = sorted(set(options.lengths))
    model = name_model(options)
    with sole_writer(options.output):
        finished = FinishedRows(options.output / "answers.jsonl")
        with keeping(finished.place):
            cells = _measure(options, model, names, lengths, finished)
    columns, rows = ruler_table(cells, lengths)
    data = {
        "model": model,
        "samples": options.samples,
        "seed": options.seed,
        "chat": options.chat,
        "haystack": str(options.haystack or NOVELS),
        "reading": reading_alone_data(options),
        "means": mean_data(cells),
        "cells": ruler_data(cells),
    }
    title = f"RULER, {model}, {counted(options.samples, 'sample')} each{by_text(data['reading'])}"
    results(columns, rows, data=data, json_target=options.json, title=title)
    for way, of_way in by_way(cells).items():
        if found := FoundByDepth(of_way):
            drawn = terminal_heat_map(found, f"{way.name}: found, by depth and length")
            show(drawn, stderr=options.json == "-")
    if options.plot is not None:
        columns = {way.name: of_way for way, of_way in by_way(cells).items()}
        draw_ruler(options.plot, columns, f"RULER, {Path(model).name}")
        info(f"wrote {options.plot}")
    return data


def _measure(
    options: RulerOptions, name: str, names: list[str], lengths: list[int], finished: FinishedRows
) -> list[Cell]:
    """The cells of all ways of reading."""
    from landmark_cli.evaluation.ruler.run import measure
    from landmark_cli.evaluation.studies import model_identity
    from landmark_cli.evaluation.ways import check_ways, ways_of
    from landmark_cli.inference.readers import has_landmarks

    model, tokenizer = open_model(name, options)
    check_retrieves(model, name, options.top_k_blocks, "measure it with --full-attention")
    ways = ways_of(model, options.top_k_blocks, options.full_attention)
    check_ways(model, ways, reading_alone(options))
    tasks, show_sample = _tasks(options, tokenizer, names, lengths)
    depends_on = {
        "model": model_identity(name),
        "seed": options.seed,
        "chat": options.chat,
        **precision_of(options),
    }
    cells: list[Cell] = []
    with interrupts("finishing the prompts under way") as asked:
        for way in ways:
            if way.full and has_landmarks(model):
                # The same weights by ordinary attention, with which a model has to be opened.
                model, tokenizer = open_model(name, options, attention="sdpa")
            cells += measure(
                model,
                tokenizer,
                tasks,
                lengths,
                way,
                finished,
                asked,
                samples=options.samples,
                depends_on=depends_on,
                reading=reading_alone(options),
                batch_size=options.batch_size,
                show=show_sample,
                shown=options.show,
            )
    if any(task.repeated for task in tasks):
        info(f"{options.qa} has too few documents for the longest prompts: some stand there several times")
    return cells


def _tasks(
    options: RulerOptions, tokenizer: PreTrainedTokenizerBase, names: list[str], lengths: list[int]
) -> tuple[list[Task], Show]:
    """The tasks, all of which can have these lengths, and what shows one of their samples."""
    from landmark_cli.evaluation.ruler.benchmark import check_lengths, make_task
    from landmark_cli.evaluation.ruler.encoding import PromptEncoder
    from landmark_cli.evaluation.ruler.haystacks import Prose
    from landmark_cli.evaluation.ruler.report import show_sample

    encoder = PromptEncoder(tokenizer, chat=options.chat)
    prose = Prose(encoder, options.haystack)
    tasks = [make_task(name, encoder, prose, options.seed, options.qa) for name in names]
    for task in tasks:
        check_lengths(task, lengths, options.samples)
    if prose.is_read:
        info(f"prose: {prose.name}, not RULER's essays: figures of tasks with prose are near published ones, no more")
        prose.check_tokens(lengths[-1])
    return tasks, partial(show_sample, tokenizer, encoder)
