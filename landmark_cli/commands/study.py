"""`landmark eval study`: a table of the paper, or a study file of one's own, in one command."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from landmark_cli.commands.evaluate import check_retrieves, open_text, perplexity_data, reading_alone
from landmark_cli.commands.measurement import (
    batch_size_option,
    haystack_option,
    json_option,
    sample_tokens_option,
    samples_option,
    text_option,
)
from landmark_cli.commands.models import MachineOptions, open_model
from landmark_cli.console import info, results
from landmark_cli.errors import UsageError
from landmark_cli.interrupts import interrupts
from landmark_cli.locks import sole_writer
from landmark_cli.options import LARGEST_SEED, check_outputs, option

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from landmark_cli.evaluation.studies import FinishedRows, Row, Study
    from landmark_cli.interrupts import Interrupts

STUDY = "Study"
OUTPUT = "Output"


@dataclass(kw_only=True)
class StudyOptions(MachineOptions):
    """Measure a list of settings over one or several models and put them in one table.

    A study measures perplexity or RULER's tasks. Shipped are table1, table2 and table3 of the paper, with the paper's
    figures beside the measured ones. Finished rows are kept in the output directory: an interrupted study goes on, and
    a changed model, setting or text is measured anew.
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
    haystack: Path | None = haystack_option(STUDY)
    seed: int = option(
        0,
        panel=STUDY,
        min=0,
        max=LARGEST_SEED,
        help="Seed for choosing the windows of a text; in a study of RULER, what is hidden and where.",
    )
    batch_size: int | None = batch_size_option(STUDY, "Windows or prompts read at a time. [default: by their length]")
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


class PerplexityRows:
    """Measures the rows of a study of perplexity.

    common: what every row's result depends on. about: what the study's data say of it besides.
    """

    def __init__(self, options: StudyOptions, study: Study):
        self._options = options
        self._file = open_text(options.data)
        self.common = {
            "data": self._file.metadata.sha256,
            "sample_tokens": options.sample_tokens,
            "seed": options.seed,
            "dtype": options.dtype,
        }
        self.about = {"text": str(self._file.path)}

    def measure(self, row: Row, opened: Opened, asked: Interrupts) -> dict[str, Any]:
        """The figures of a row."""
        from landmark_cli.data.checks import check_token_files
        from landmark_cli.data.pretrained_tokenizers import text_ids
        from landmark_cli.evaluation.perplexity import evaluate_perplexity

        options, (model, tokenizer) = self._options, opened(row.role)
        check_token_files([self._file], partial(text_ids, tokenizer), model.config.vocab_size, opened.name(row.role))
        reading = row.reading()
        result = evaluate_perplexity(
            model,
            self._file.tokens,
            eot_id=self._file.metadata.eot_id,
            eval_length=row.settings.get("eval-length"),
            memory=row.settings.get("memory", True),
            reading=reading,
            batch_size=options.batch_size,
            sample_tokens=options.sample_tokens,
            seed=options.seed,
        )
        return perplexity_data(result, model, reading)


class RulerRows:
    """Measures the rows of a study of RULER. The answers are kept one by one, so a row that was interrupted goes on.

    common, about: as of PerplexityRows. Raises UsageError for a task that there is not.
    """

    def __init__(self, options: StudyOptions, study: Study):
        from landmark_cli.evaluation.ruler.benchmark import task_names
        from landmark_cli.evaluation.ruler.haystacks import NOVELS, haystack_identity

        for number, row in enumerate(study.rows, 1):
            try:
                task_names(row.settings.get("tasks"), has_documents=False)
            except UsageError as error:
                raise UsageError(f"study {study.name}, row {number}: {error}") from None
        self._options = options
        self._answers: FinishedRows | None = None
        self.common = {
            "benchmark": "ruler",
            "haystack": haystack_identity(options.haystack),
            "samples": options.samples,
            "seed": options.seed,
            "dtype": options.dtype,
        }
        self.about = {"text": str(options.haystack or NOVELS)}

    def measure(self, row: Row, opened: Opened, asked: Interrupts) -> dict[str, Any]:
        """The figures of a row."""
        from landmark_cli.evaluation.ruler.benchmark import check_lengths, make_task, task_names
        from landmark_cli.evaluation.ruler.encoding import PromptEncoder
        from landmark_cli.evaluation.ruler.haystacks import Prose
        from landmark_cli.evaluation.ruler.report import of_tasks
        from landmark_cli.evaluation.ruler.run import measure
        from landmark_cli.evaluation.studies import FinishedRows, RulerRow, model_identity
        from landmark_cli.evaluation.ways import ways_of

        options, name = self._options, opened.name(row.role)
        asks = RulerRow(**{key.replace("-", "_"): value for key, value in row.settings.items()})
        model, tokenizer = opened(row.role, "sdpa" if asks.full_attention else None)
        blocks = None if asks.top_k_blocks is None else [asks.top_k_blocks]
        check_retrieves(model, name, blocks, "leave it out of its rows")
        # Where ordinary attention is asked for, it is the last way.
        way = ways_of(model, blocks, asks.full_attention)[-1]
        encoder = PromptEncoder(tokenizer, chat=asks.chat)
        prose = Prose(encoder, options.haystack)
        names = task_names(asks.tasks, has_documents=False)
        tasks = [make_task(one, encoder, prose, options.seed) for one in names]
        for task in tasks:
            check_lengths(task, [asks.length], options.samples)
        if self._answers is None:
            self._answers = FinishedRows(study_folder(options) / "answers.jsonl")
        cells = measure(
            model,
            tokenizer,
            tasks,
            [asks.length],
            way,
            self._answers,
            asked,
            samples=options.samples,
            depends_on={
                "model": model_identity(name),
                "seed": options.seed,
                "chat": asks.chat,
                "dtype": options.dtype,
            },
            reading=reading_alone(row.reading()),
            batch_size=options.batch_size,
        )
        # None where ordinary attention is asked for more positions than the model knows.
        score, interval = of_tasks(cells) if cells else (None, None)
        return {
            "length": asks.length,
            "reading": way.name,
            "answers": sum(len(cell.answers) for cell in cells),
            "score": score,
            "interval": interval,
            "tasks": {cell.task: cell.mean for cell in cells},
        }


MEASURES = {"perplexity": PerplexityRows, "ruler": RulerRows}


class Opened:
    """Models by role, one open at a time."""

    def __init__(self, models: dict[str, str], options: StudyOptions):
        self._models, self._options = models, options
        self._open: tuple[tuple[str, str | None], Any] | None = None

    def name(self, role: str) -> str:
        """What the user calls the role's model."""
        return self._models[role]

    def __call__(self, role: str, attention: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The role's model and its tokenizer. attention: as of `open_model`."""
        if self._open is None or self._open[0] != (role, attention):
            # The memory of the last model is given back before the next is opened.
            self._open = None
            self._open = (role, attention), open_model(self._models[role], self._options, attention=attention)
        return self._open[1]


def run(options: StudyOptions) -> dict[str, Any]:
    """Measure what is not finished, print the table and write it as Markdown, CSV, JSON and, where asked, a picture.
    Returns what --json writes.

    Raises UsageError for an unknown study, role, corpus or task, LandmarkError where model and text do not fit, Stopped
    where a signal came.
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
    output = study_folder(options)
    picture = output / f"{study.name}.png"
    if options.plot:
        check_picture(picture)
    kind = MEASURES[study.kind](options, study)
    opened = Opened(models, options)
    with sole_writer(output):
        finished = FinishedRows(output / "rows.jsonl")
        measured = run_study(study, models, kind.common, finished, lambda row, asked: kind.measure(row, opened, asked))
        columns, rows = study_table(study, measured, [options.compare] if options.compare else corpora)
        data = {
            "study": study.name,
            "models": {role: str(model) for role, model in models.items()},
            **kind.about,
            **kind.common,
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


def study_folder(options: StudyOptions) -> Path:
    """Where a study's tables and finished rows lie."""
    return options.output or Path("studies") / Path(options.study).stem


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
