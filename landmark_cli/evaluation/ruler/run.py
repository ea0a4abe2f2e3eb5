"""Asks a model every sample of every task at every length, one way of reading after the other; what was answered is
kept, so that an interrupted run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from landmark_cli.console import info, progress, warn_once
from landmark_cli.data.prefetch import prefetched
from landmark_cli.evaluation.prompts import PromptReaders
from landmark_cli.evaluation.studies import FinishedRows
from landmark_cli.evaluation.ways import Way, fits_positions, not_asked
from landmark_cli.inference.generation import generate
from landmark_cli.inference.readers import BaseReader
from landmark_cli.inference.settings import ReadingSettings, SamplingSettings
from landmark_cli.interrupts import Interrupts
from landmark_cli.launch import again

from .haystacks import Prompt
from .score import bootstrap_interval, found_in, score
from .task import Task

# Answers have at most 128 tokens; what is kept of one is cut where these are long.
LONGEST_ANSWER = 2000


@dataclass(frozen=True)
class Answer:
    """What a model said to one sample. found: whether each reference stands in it. depths, begin: as in Prompt."""

    references: list[str]
    found: list[bool]
    depths: list[float] | None
    answer: str
    score: float
    begin: int | None = None


@dataclass(frozen=True)
class Cell:
    """The answers to a task at a length, read in one way."""

    way: Way
    task: str
    length: int
    answers: list[Answer]

    @property
    def scores(self) -> list[float]:
        return [answer.score for answer in self.answers]

    @property
    def mean(self) -> float:
        return sum(self.scores) / len(self.answers)

    @property
    def interval(self) -> tuple[float, float]:
        return bootstrap_interval(self.scores)


Show = Callable[[Task, int, int, Prompt, Answer], None]
"""Called with task, length, sample, its prompt and what was answered."""


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    lengths: Sequence[int],
    way: Way,
    finished: FinishedRows,
    asked: Interrupts,
    *,
    samples: int,
    depends_on: dict[str, Any],
    reading: ReadingSettings | None = None,
    batch_size: int | None = None,
    show: Show | None = None,
    shown: int = 0,
) -> list[Cell]:
    """The cells of one way of reading, task by task; they are asked length by length, so that readers serve all tasks.
    Lengths (tokens, the answer's room included) must be possible.

    finished: where answers are kept and found again. asked: whether to stop. depends_on: what an answer depends on
    beside task, length, sample and way of reading (JSON). reading: how blocks are read, but for their number.
    batch_size: prompts read at a time; by default as many as fit, and fewer once memory runs out. show: called for the
    first `shown` samples of each cell.

    Full attention is not asked at lengths beyond the positions that the model knows; the user is told. Raises Stopped
    after the batch under way where a signal came, LandmarkError where the model's logits are not finite.
    """
    reading = replace(reading or ReadingSettings(), top_k_blocks=way.top_k_blocks)
    how = {"full": True} if way.full else asdict(reading)
    lengths = _possible(model, lengths, way)
    plan = [(task, length) for task in tasks for length in lengths]

    def key(task: Task, length: int, sample: int) -> str:
        about = {"task": task.name, "length": length, "sample": sample, "prompts": task.identity, "reading": how}
        return finished.key({"benchmark": "ruler", **about, **depends_on})

    waiting = {
        (task.name, length): [s for s in range(samples) if finished.get(key(task, length, s)) is None]
        for task, length in plan
    }
    kept = samples * len(plan) - sum(map(len, waiting.values()))
    if kept:
        info(f"{way.name}: {kept} of {samples * len(plan)} answers are kept from an earlier run")
    readers = PromptReaders(model, reading, way.full, batch_size)

    def made(length: int) -> Iterator[tuple[Task, int, Prompt]]:
        for task in tasks:
            for sample in waiting[task.name, length]:
                yield task, sample, task.make(sample, length)

    def answers_to(batch: list[tuple[Task, int, Prompt]], reader: BaseReader) -> list[Answer]:
        if asked:
            raise asked.stopped(f"what was answered is kept; go on with\n{again()}")
        task = batch[0][0]
        return _ask(model, tokenizer, task, [prompt for *_, prompt in batch], reader)

    tokens = sum(length * len(left) for (_, length), left in waiting.items())
    with progress(f"ruler, {way.name}", tokens, "tokens") as bar:
        for length in lengths:
            if not any(waiting[task.name, length] for task in tasks):
                continue
            # The next prompts are made while the model reads; of long ones the making would take as long.
            with closing(prefetched(made(length), 2 * readers.at_a_time(length))) as prompts:
                for task, of_task in groupby(prompts, itemgetter(0)):
                    for batch, answers in readers.ask(of_task, length, answers_to):
                        for (_, sample, _), answer in zip(batch, answers, strict=True):
                            finished.add(key(task, length, sample), asdict(answer))
                        bar.advance(length * len(batch), task=task.name, length=length)
    cells = []
    for task, length in plan:
        answers = [Answer(**finished.get(key(task, length, sample))) for sample in range(samples)]
        cells.append(Cell(way, task.name, length, answers))
        for sample in range(min(shown, samples) if show else 0):
            show(task, length, sample, task.make(sample, length), answers[sample])
    return cells


def _possible(model: PreTrainedModel, lengths: Sequence[int], way: Way) -> list[int]:
    """The lengths that a way of reading can have, the user told of others."""
    possible = [length for length in lengths if fits_positions(model, way, length)]
    if len(possible) < len(lengths):
        warn_once(not_asked(model, [length for length in lengths if length not in possible]))
    return possible


def _ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    prompts: list[Prompt],
    reader: BaseReader,
) -> list[Answer]:
    greedy = SamplingSettings(max_new_tokens=task.new_tokens, temperature=0.0)
    said = generate(model, tokenizer, [prompt.tokens for prompt in prompts], greedy, reader=reader)
    return [judge(task, prompt, one.text) for prompt, one in zip(prompts, said, strict=True)]


def judge(task: Task, prompt: Prompt, answer: str) -> Answer:
    """An answer and what it is worth."""
    found = found_in(answer, prompt.references)
    worth = score(found, task.any_of)
    return Answer(prompt.references, found, prompt.depths, answer[:LONGEST_ANSWER], worth, prompt.begin)
