"""Rows of a study that ask a model prompts: RULER's tasks, and pass keys."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from landmark_cli.commands.evaluate import cell_data, check_retrieves, reading_alone, trials_data
from landmark_cli.commands.models import precision_of
from landmark_cli.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from landmark_cli.commands.study_rows import Given, Opened
    from landmark_cli.evaluation.ruler.haystacks import Prose
    from landmark_cli.evaluation.ruler.task import Task
    from landmark_cli.evaluation.studies import FinishedRows, PassKeyRow, Row, RulerRow
    from landmark_cli.evaluation.ways import Way
    from landmark_cli.interrupts import Interrupts


class RulerRows:
    """Measures the rows of a study of RULER. The answers are kept one by one, so a row that was interrupted goes on.

    common, about: as of PerplexityRows. Raises UsageError for a task that there is not.
    """

    def __init__(self, given: Given):
        from landmark_cli.evaluation.ruler.benchmark import task_names
        from landmark_cli.evaluation.ruler.haystacks import NOVELS, haystack_identity

        options, study = given.options, given.study
        for number, row in enumerate(study.rows, 1):
            if row.kind != "ruler":
                continue
            try:
                task_names(row.settings.get("tasks"), has_documents=False)
            except UsageError as error:
                raise UsageError(f"study {study.name}, row {number}: {error}") from None
        self._given, self._options = given, options
        self.common = {
            "benchmark": "ruler",
            "haystack": haystack_identity(options.haystack),
            "samples": options.samples,
            "seed": options.seed,
            **precision_of(options),
        }
        self.about = {"text": str(options.haystack or NOVELS)}

    @cached_property
    def _answers(self) -> FinishedRows:
        from landmark_cli.evaluation.studies import FinishedRows

        return FinishedRows(self._given.output / "answers.jsonl")

    def check(self, row: Row, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """As of PerplexityRows."""
        from landmark_cli.evaluation.ruler.benchmark import check_lengths
        from landmark_cli.evaluation.ways import beyond_training, check_ways

        asks, reading = row.asks(), reading_alone(row.reading())
        way = _way(asks, name, model)
        check_ways(model, [way], reading)
        tasks = self._tasks(asks, name, tokenizer)
        for task in tasks:
            check_lengths(task, [asks.length], self._options.samples)
        return beyond_training(model, way, reading, asks.length)

    def depends_on(self, row: Row) -> dict[str, Any]:
        """As of PerplexityRows."""
        return {}

    def _tasks(self, asks: RulerRow, name: str, tokenizer: PreTrainedTokenizerBase) -> list[Task]:
        from landmark_cli.evaluation.ruler.benchmark import make_task, task_names

        encoder, prose = self._given.prose(name, tokenizer, chat=asks.chat)
        names = task_names(asks.tasks, has_documents=False)
        return [make_task(one, encoder, prose, self._options.seed) for one in names]

    def measure(self, row: Row, opened: Opened, asked: Interrupts) -> dict[str, Any]:
        """The figures of a row that was checked."""
        from landmark_cli.evaluation.ruler.report import of_tasks
        from landmark_cli.evaluation.ruler.run import measure
        from landmark_cli.evaluation.studies import model_identity

        options, name, asks = self._options, opened.name(row.role), row.asks()
        model, tokenizer = opened(row.role, "sdpa" if asks.full_attention else None)
        way, tasks = _way(asks, name, model), self._tasks(asks, name, tokenizer)
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
                **precision_of(options),
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


class PassKeyRows:
    """Measures the rows of a study of pass keys.

    common, about: as of PerplexityRows.
    """

    def __init__(self, given: Given):
        from landmark_cli.evaluation.ruler.haystacks import haystack_identity

        self._given, self._options = given, given.options
        haystack = given.options.haystack
        self.common = {
            "benchmark": "passkey",
            "haystack": None if haystack is None else haystack_identity(haystack),
            "seed": given.options.seed,
            **precision_of(given.options),
        }
        self.about = {"text": "the paper's filler" if haystack is None else str(haystack)}

    def check(self, row: Row, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """As of PerplexityRows."""
        from landmark_cli.evaluation.passkey import prompt_maker
        from landmark_cli.evaluation.ways import beyond_training, check_ways

        asks, reading = row.asks(), reading_alone(row.reading())
        way = _way(asks, name, model)
        check_ways(model, [way], reading)
        prose = self._prose(name, tokenizer)
        if prose is not None:
            prose.check_tokens(asks.length)
        prompt_maker(tokenizer, prose).make(asks.length, 1, 0.0)
        # Full attention is asked for keys beyond the positions that the model knows too.
        return None if way.full else beyond_training(model, way, reading, asks.length)

    def depends_on(self, row: Row) -> dict[str, Any]:
        """As of PerplexityRows."""
        return {}

    def _prose(self, name: str, tokenizer: PreTrainedTokenizerBase) -> Prose | None:
        """None for the paper's filler."""
        return None if self._options.haystack is None else self._given.prose(name, tokenizer)[1]

    def measure(self, row: Row, opened: Opened, asked: Interrupts) -> dict[str, Any]:
        """The figures of a row that was checked."""
        from landmark_cli.evaluation.passkey import evaluate_passkey

        name, asks = opened.name(row.role), row.asks()
        model, tokenizer = opened(row.role, "sdpa" if asks.full_attention else None)
        result = evaluate_passkey(
            model,
            tokenizer,
            [asks.length],
            prompts=asks.prompts,
            depths=asks.depths,
            reading=row.reading(),
            full_attention=asks.full_attention,
            batch_size=self._options.batch_size,
            seed=self._options.seed,
            prose=self._prose(name, tokenizer),
        )
        return {
            "length": asks.length,
            "reading": _way(asks, name, model).name,
            **cell_data(result.cell(asks.length)),
            "trials": trials_data(result),
        }


def _way(asks: RulerRow | PassKeyRow, name: str, model: PreTrainedModel) -> Way:
    """How a row's model reads. name: the model's. Raises UsageError where it has no blocks to retrieve."""
    from landmark_cli.evaluation.ways import ways_of

    blocks = None if asks.top_k_blocks is None else [asks.top_k_blocks]
    check_retrieves(model, name, blocks, "leave it out of its rows")
    # Where ordinary attention is asked for, it is the last way.
    return ways_of(model, blocks, asks.full_attention)[-1]
