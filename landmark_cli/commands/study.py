"""`landmark eval study`: a table of the paper, or a study file of one's own, in one command."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from landmark_cli.commands.evaluate import open_text, perplexity_data
from landmark_cli.commands.measurement import (
    json_option,
    sample_tokens_option,
    text_option,
    window_seed_option,
    windows_at_a_time,
)
from landmark_cli.commands.models import MachineOptions, open_model
from landmark_cli.console import info, results
from landmark_cli.errors import UsageError
from landmark_cli.interrupts import interrupts
from landmark_cli.locks import sole_writer
from landmark_cli.options import check_outputs, option

STUDY = "Study"
OUTPUT = "Output"


@dataclass(kw_only=True)
class StudyOptions(MachineOptions):
    """Measure a list of settings over one or several models and put them in one table.

    Shipped are table1, table2 and table3 of the paper, with the paper's figures beside the measured ones. Finished rows
    are kept in the output directory: an interrupted study goes on, and a changed model, setting or text is measured
    anew.
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
    seed: int = window_seed_option(STUDY)
    batch_size: int | None = windows_at_a_time(STUDY)
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

    Raises UsageError for an unknown study, role or corpus, LandmarkError where model and text do not fit.
    """
    from landmark_cli.data.checks import check_token_files
    from landmark_cli.data.pretrained_tokenizers import text_ids
    from landmark_cli.evaluation.perplexity import evaluate_perplexity
    from landmark_cli.evaluation.pictures import check_picture
    from landmark_cli.evaluation.report import draw_study, study_table, write_tables
    from landmark_cli.evaluation.studies import FinishedRows, Row, check_roles, load_study, run_study

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
        check_picture(picture)
    file = open_text(options.data)
    opened: dict[str, Any] = {}

    def measure(row: Row) -> dict[str, Any]:
        if row.role not in opened:
            opened.clear()
            name = models[row.role]
            model, tokenizer = open_model(name, options)
            check_token_files([file], partial(text_ids, tokenizer), model.config.vocab_size, name)
            opened[row.role] = model
        reading = row.reading()
        result = evaluate_perplexity(
            opened[row.role],
            file.tokens,
            eot_id=file.metadata.eot_id,
            eval_length=row.settings.get("eval-length"),
            memory=row.settings.get("memory", True),
            reading=reading,
            batch_size=options.batch_size,
            sample_tokens=options.sample_tokens,
            seed=options.seed,
        )
        return perplexity_data(result, opened[row.role], reading)

    common = {
        "data": file.metadata.sha256,
        "sample_tokens": options.sample_tokens,
        "seed": options.seed,
        "dtype": options.dtype,
    }
    with sole_writer(output):
        measured = run_study(study, models, common, FinishedRows(output / "rows.jsonl"), measure)
        columns, rows = study_table(study, measured, [options.compare] if options.compare else corpora)
        data = {
            "study": study.name,
            "models": {role: str(model) for role, model in models.items()},
            "text": str(file.path),
            **common,
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
