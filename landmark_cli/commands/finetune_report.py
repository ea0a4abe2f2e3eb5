"""The report of a fine-tuning run: a small RULER of its model beside the untouched one, in the log, in metrics.jsonl
and in the model card."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from landmark_cli.commands.courses import earlier_courses
from landmark_cli.console import counted, figure, info, table, warn
from landmark_cli.errors import LandmarkError, Stopped, UsageError, import_extra

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from landmark_cli.commands.finetune import FinetuneOptions
    from landmark_cli.evaluation.ruler.brief import Brief, Figures
    from landmark_cli.evaluation.ruler.run import Cell
    from landmark_cli.interrupts import Interrupts
    from landmark_cli.models.card import Trained
    from landmark_cli.training.loop import Loop
    from landmark_cli.training.publish import Publication

ANSWERS, COPY = "ruler.jsonl", "ruler.partial"
AUTO, NONE = "auto", "none"
LANDMARKS_DO = {
    "joint": "choose blocks and do no more: all text that is read shares one softmax",
    "grouped": "choose blocks, and share attention out among them",
}
DOING = "finishing the prompts under way"


def asked_samples(value: str) -> int | None:
    """--eval-ruler as a number of samples, 0 for none; None where it is left to the device.

    Raises UsageError for what is neither.
    """
    if value == AUTO:
        return None
    if value == NONE:
        return 0
    if not value.isascii() or not value.isdigit() or int(value) > 10_000:
        raise UsageError(f"--eval-ruler {value}: give a number of samples up to 10000, {AUTO}, or {NONE}")
    return int(value)


def check_report(options: FinetuneOptions) -> None:
    """Raise UsageError for what cannot be asked, LandmarkError where a package is missing for what is asked for."""
    samples = asked_samples(options.eval_ruler)
    if samples:
        import_extra("wonderwords", "ruler")
    if samples == 0 and options.eval_ruler_every:
        raise UsageError("--eval-ruler-every asks what --eval-ruler leaves out: leave one of the two out")


def card_of(options: FinetuneOptions, run: Path, processes: int, figures: str = "") -> Trained:
    """What the model card says of how the model was made, by a run of so many processes in the directory `run`.

    figures: what was measured of it, in Markdown.
    """
    from landmark_cli.launch import again
    from landmark_cli.models.card import Trained

    windows = options.batch_size * options.accumulation * processes
    tokens = windows * options.sequence_length
    what = "all weights" if options.train == "all" else "the landmark's row, queries and keys"
    if options.lora_rank is not None:
        what = f"adapters of rank {options.lora_rank}, embeddings and head"
    facts = [
        ("data", ", ".join(options.data or ["the novels of Jane Austen that are part of landmark-cli"])),
        ("of the windows, tasks", f"{figure(options.tasks_share or 0.0, '.0%')}"),
        (
            "steps",
            f"{options.steps:,}, each {windows} x {options.sequence_length} = {counted(tokens, 'token', ',')}, "
            "landmarks among them",
        ),
        (
            "teacher",
            {"self": "the base itself, with full attention", "none": "none"}.get(options.teacher, options.teacher),
        ),
        ("trained", f"{what}, highest learning rate {options.lr:g}"),
        *((f"to step {step:,}", said) for step, said in earlier_courses(run, options, "finetune")),
        ("landmarks", LANDMARKS_DO[options.softmax]),
    ]
    if options.read_chunk is not None:
        facts.append(("windows", f"read in chunks of {counted(options.read_chunk, 'token')}"))
    adapters = options.lora_rank is not None and not options.merge
    return Trained(options.model, not Path(options.model).is_dir(), adapters, again(), facts, figures)


class Report:
    """Asks a run's model in the middle of the run and at its end. Every process has one.

    options: of the run, nothing left to be chosen. model: the decoder that is trained, adapters aside.
    """

    def __init__(
        self,
        options: FinetuneOptions,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        publication: Publication,
        loop: Loop,
    ) -> None:
        self._options, self._model, self._tokenizer = options, model, tokenizer
        self._publication, self._loop, self._output = publication, loop, loop.settings.output
        self._brief: Brief | None = None
        self._untouched: Figures | None = None

    def in_the_middle(self) -> int | None:
        """Ask the model as it is now, and write what it knows to metrics and log. Returns the signal that came
        meanwhile, which ends the asking, if one did."""
        copy = self._output / COPY
        self._publication.copy(self._loop, copy)
        try:
            self._ask(copy, f"step {self._loop.step}")
        except Stopped as stopped:
            return stopped.exit_code - 128
        finally:
            if self._loop.accelerator.is_main_process:
                shutil.rmtree(copy, ignore_errors=True)
        return None

    def at_the_end(self) -> None:
        """Ask the model that is published, and write what it knows to metrics, log and model card.

        Where it cannot be asked, the user is warned: the model is there. Raises Stopped where a signal came.
        """
        self._loop.release()
        try:
            figures = self._ask(self._output, "the trained model")
        except Stopped as stopped:
            words = f"trained model: {self._output}; of its report the rest is left out: `landmark eval ruler` asks it"
            raise Stopped(words, stopped.exit_code - 128) from None
        if figures:
            from landmark_cli.models.card import write_card

            processes = self._loop.accelerator.num_processes
            write_card(self._model, self._output, card_of(self._options, self._output, processes, figures))

    def _ask(self, directory: Path, who: str) -> str:
        """Ask the model of a directory; the untouched one too, the first time. Returns the figures in Markdown, in the
        main process, or nothing where none are measured. Every process calls it."""
        from landmark_cli.interrupts import interrupts
        from landmark_cli.memory import is_out_of_memory
        from landmark_cli.training.parts import in_parts

        found: list[Figures] = []
        try:
            with interrupts(DOING) as asked:
                in_parts(lambda: self._parts(directory, found, asked))
            if asked:
                raise asked.stopped("the report is measured")
        except Stopped:
            raise
        except (LandmarkError, RuntimeError) as error:
            if not isinstance(error, LandmarkError) and not is_out_of_memory(error):
                raise
            warn(f"the report of {who} is left out: {error}")
        if not found:
            return ""
        (figures,), untouched, brief = found, self._untouched, self._brief
        self._loop.write({"step": self._loop.step} | fields("ruler", figures) | fields("untouched_ruler", untouched))
        columns, rows = rows_of(figures, untouched, brief.lengths)
        title = f"RULER, {who} and the untouched one by full attention, {counted(brief.samples, 'sample')} each"
        table(columns, rows, title=title, stderr=True)
        return markdown(columns, rows, brief.samples)

    def _parts(self, directory: Path, found: list[Figures], asked: Interrupts) -> Iterator[Any]:
        """Ask what is to be asked, a length at a time; leaves the figures in `found`."""
        from landmark_cli.evaluation.ruler.brief import Figures
        from landmark_cli.evaluation.ways import Way
        from landmark_cli.training.setup import quiet_transformers

        brief = self._opened()
        if brief is None:
            return
        if self._untouched is None:
            with quiet_transformers():
                opened = self._load(self._options.model, "sdpa")
            cells: list[Cell] = []
            for some in brief.ask(*opened, Way(None, full=True), self._options.model, asked):
                cells += some
                yield
            self._untouched = Figures.of(cells)
            del opened
        with quiet_transformers():
            model, tokenizer = self._load(directory)
        cells, which = [], [self._loop.checkpoints.identity, self._loop.step]
        for some in brief.ask(model, tokenizer, Way(model.config.top_k_blocks), which, asked):
            cells += some
            yield
        found.append(Figures.of(cells))

    def _load(self, name: str | Path, attention: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        from landmark_cli.models.store import load
        from landmark_cli.training.finetuning import dtype_of

        return load(
            name,
            attention=attention,
            dtype=dtype_of(self._loop.settings.precision),
            device=self._loop.accelerator.device,
            trust_remote_code=self._options.trust_remote_code,
        )

    def _opened(self) -> Brief | None:
        """The benchmark as this run asks it; None, which is said, where there is nothing that it can ask."""
        from landmark_cli.evaluation.ruler.brief import Brief, affordable_samples, lengths_of
        from landmark_cli.evaluation.studies import FinishedRows

        if self._brief is not None:
            return self._brief
        samples, length = asked_samples(self._options.eval_ruler), self._model.config.trained_length
        on_gpu = self._loop.accelerator.device.type == "cuda"
        if samples is None:
            samples = affordable_samples(self._model, lengths_of(length), on_gpu)
            if samples == 0 and lengths_of(length):
                info("no report by RULER: it would take this device long; --eval-ruler 2 asks all the same")
        if samples == 0 or not lengths_of(length):
            return None
        finished = FinishedRows(self._output / ANSWERS)
        brief = Brief(self._tokenizer, length, samples, finished, self._options.seed)
        if not brief.lengths:
            info(f"no report by RULER: its tasks take more than 8 times the trained length, {counted(length, 'token')}")
            return None
        self._brief = brief
        return brief


def fields(name: str, figures: Figures) -> dict[str, float]:
    """What metrics.jsonl has of the figures: each by task and length, and the mean of each length."""
    lengths = sorted({length for _, length in figures.scores})
    means = zip(lengths, figures.row(None, lengths), strict=True)
    return {f"{name}_{task}_{length}": score for (task, length), score in figures.scores.items()} | {
        f"{name}_mean_{length}": mean for length, mean in means
    }


def rows_of(figures: Figures, untouched: Figures, lengths: Sequence[int]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a table: of each task and of their mean, what the model has, and the untouched one."""
    tasks = list(dict.fromkeys(task for task, _ in figures.scores))
    rows = [
        [task or "mean", name, *some.row(task, lengths)]
        for task in [*tasks, None]
        for name, some in (("trained", figures), ("untouched", untouched))
    ]
    return ["task", "model", *map(str, lengths)], rows


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]], samples: int) -> str:
    """A table for a model card."""
    cells = [
        ["-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value) for value in row]
        for row in rows
    ]
    lines = [list(columns), ["---"] * len(columns), *cells]
    about = (
        f"Three of RULER's tasks in the shipped novels (arXiv 2404.06654), {counted(samples, 'sample')} each: the "
        "share of what was hidden that the answer holds, by the tokens of prompt and answer. Untouched is the base "
        "with full attention, as far as its positions reach."
    )
    return f"{about}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
