"""`landmark eval study`: a table of the paper, or a study file of one's own, in one command."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from landmark_cli.commands.measurement import (
    batch_size_option,
    haystack_option,
    json_option,
    sample_tokens_option,
    samples_option,
    text_option,
)
from landmark_cli.commands.models import MachineOptions
from landmark_cli.commands.study_rows import MEASURES, Given, Opened, Rows, check_rows
from landmark_cli.console import info, results
from landmark_cli.errors import UsageError
from landmark_cli.interrupts import interrupts, keeping
from landmark_cli.locks import sole_writer
from landmark_cli.options import LARGEST_SEED, check_outputs, option

STUDY = "Study"
OUTPUT = "Output"


@dataclass(kw_only=True)
class StudyOptions(MachineOptions):
    """Measure a list of settings over one or several models and put them in one table.

    A study measures perplexity, LongPPL, RULER's tasks or pass keys, or several of these. Shipped are table1, table2
    and table3 of the paper, with the paper's figures beside the measured ones. Finished rows are kept in the output
    directory: an interrupted study goes on, and a changed model, setting or text is measured anew.
    """

    study: str = option(help="A shipped study (table1, table2, table3) or a YAML file.", positional=True)
    role: list[str] | None = option(
        None,
        panel=STUDY,
        metavar="<role=model>",
        help="The model for a role of the study, such as landmark=runs/demo. Repeatable.",
    )
    data: Path | None = text_option(STUDY)
    sample_tokens: int | None = sample_tokens_option(STUDY)
    samples: int = samples_option(STUDY)
    haystack: Path | None = haystack_option(
        STUDY,
        "Text in which RULER's tasks with prose hide their needles, and pass keys lie; sample names the shipped novels."
        " [default: these; for pass keys the paper's filler]",
    )
    seed: int = option(
        0,
        panel=STUDY,
        min=0,
        max=LARGEST_SEED,
        help="Seed for choosing the windows of a text; of RULER's tasks and pass keys, what is hidden and where.",
    )
    batch_size: int | None = batch_size_option(
        STUDY, "Windows or prompts read at a time. [default: by their length; of prompts fewer once memory runs out]"
    )
    compare: str | None = option(
        None,
        panel=STUDY,
        help="The corpus whose published figures are shown: pg19 or arxiv-math. [default: both corpora]",
    )
    output: Path | None = option(
        None, panel=OUTPUT, help="Directory of the tables and finished rows. [default: studies/ and the study's name]"
    )
    plot: bool = option(False, panel=OUTPUT, help="Draw the table as a picture too. Needs the extra plot.")
    json: str | None = json_option(OUTPUT)


def run(options: StudyOptions) -> dict[str, Any]:
    """Measure what is not finished, print the table and write it as Markdown, CSV, JSON and, where asked, a picture.
    Returns what --json writes.

    Raises UsageError for an unknown study, role, corpus or task, or where one picture is to show several measurements,
    LandmarkError where model and text do not fit, Stopped where a signal came.
    """
    from landmark_cli.evaluation.pictures import check_picture
    from landmark_cli.evaluation.report import draw_study, study_table, write_tables
    from landmark_cli.evaluation.studies import FinishedRows, check_roles, load_study, run_study

    study = load_study(options.study)
    corpora = sorted({name for row in study.rows for name in row.paper})
    if options.compare is not None and options.compare not in corpora:
        raise UsageError(
            f"--compare {options.compare}: {study.name} has figures of {', '.join(corpora) or 'no corpus'}"
        )
    models = parse_roles(options.role or [])
    check_roles(study, models)
    check_outputs(options)
    output = options.output or Path("studies") / study.name
    picture = output / f"{study.name}.png"
    if options.plot:
        if len(study.kinds) > 1:
            raise UsageError(
                f"--plot: {study.name} measures {', '.join(study.kinds)}, and one picture shows only one of them; "
                "leave --plot out, or give each a study of its own"
            )
        check_picture(picture)
    given = Given(options, study, output, models)
    kinds = {kind: MEASURES[kind](given) for kind in study.kinds}
    check_rows(study, models, kinds, trust_remote_code=options.trust_remote_code)
    opened = Opened(models, options)
    with sole_writer(output):
        finished = FinishedRows(output / "rows.jsonl")
        with keeping(finished.place):
            measured = run_study(
                study,
                models,
                finished,
                lambda row, asked: kinds[row.kind].measure(row, opened, asked),
                lambda row: kinds[row.kind].common | kinds[row.kind].depends_on(row),
            )
        columns, rows = study_table(study, measured, [options.compare] if options.compare else corpora)
        data = {
            "study": study.name,
            "models": {role: str(model) for role, model in models.items()},
            **_about(kinds),
            "rows": [
                {**dataclasses.asdict(row), "result": result} for row, result in zip(study.rows, measured, strict=True)
            ],
        }
        with interrupts("writing the tables") as asked:
            write_tables(output, study, columns, rows, data)
            if options.plot:
                draw_study(picture, study, measured)
        if asked:
            raise asked.stopped(f"tables: {output}/{study.name}.*; nothing is left to measure")
    results(columns, rows, data=data, json_target=options.json, title=study.title)
    info(f"tables: {output}/{study.name}.md, .csv, .json" + (", .png" if options.plot else ""))
    return data


def _about(kinds: dict[str, Rows]) -> dict[str, Any]:
    """What a study's data say of how it was measured; by what was measured, where that is several things."""
    said = {name: {**kind.about, **kind.common} for name, kind in kinds.items()}
    return {"measured": said} if len(said) > 1 else said.popitem()[1]


def parse_roles(pairs: list[str]) -> dict[str, str]:
    """["landmark=runs/a"] -> {"landmark": "runs/a"}. Raises UsageError for anything else, or a role named twice."""
    models: dict[str, str] = {}
    for pair in pairs:
        role, equals, model = pair.partition("=")
        if not (role and equals and model):
            raise UsageError(f"--role {pair}: expected role=model, such as landmark=runs/demo")
        if role in models:
            raise UsageError(f"--role {pair}: {role} is {models[role]} already")
        models[role] = model
    return models
