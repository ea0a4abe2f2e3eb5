"""A small RULER that fits into the end of a training run: three tasks, four lengths, few samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from landmark_cli.evaluation.studies import FinishedRows
from landmark_cli.evaluation.ways import Way
from landmark_cli.interrupts import Interrupts

from .benchmark import has_room, make_task
from .encoding import PromptEncoder
from .haystacks import Prose
from .run import Cell, measure
from .task import Task

TASKS = ("niah_single_2", "niah_multikey_1", "vt")
# Of the trained length.
FACTORS = (0.5, 1, 4, 8)
MOST_SAMPLES = 10
# What is spent on it where nobody says how many samples: operations of about a minute of an H200, seconds of a CPU, and
# of a CPU, which small models keep busy with other things, tokens.
GPU_OPERATIONS, CPU_OPERATIONS, CPU_TOKENS = 2e16, 1e11, 16_384
# Below this no tokenizer has room for any of the tasks.
LEAST = 128


def lengths_of(trained_length: int) -> list[int]:
    """Tokens of prompts and answers that a model is asked at."""
    return [length for length in (int(factor * trained_length) for factor in FACTORS) if length >= LEAST]


def affordable_samples(model: PreTrainedModel, lengths: Sequence[int], on_gpu: bool) -> int:
    """How many samples of each task and length a model is asked in good time; 0 where not even one is.

    model: on any device. lengths: see `lengths_of`.
    """
    config = model.config
    matrices = sum(parameter.numel() for parameter in model.parameters())
    attention = 2 * config.num_hidden_layers * config.hidden_size * config.max_position_embeddings
    tokens = max(1, len(TASKS) * sum(lengths))
    operations = 2 * (matrices + attention) * tokens
    if on_gpu:
        return min(MOST_SAMPLES, int(GPU_OPERATIONS / operations))
    return min(MOST_SAMPLES, int(CPU_OPERATIONS / operations), CPU_TOKENS // tokens)


@dataclass(frozen=True)
class Figures:
    """Mean scores, by task and length."""

    scores: dict[tuple[str, int], float]

    @classmethod
    def of(cls, cells: Sequence[Cell]) -> Figures:
        return cls({(cell.task, cell.length): cell.mean for cell in cells})

    def row(self, task: str | None, lengths: Sequence[int]) -> list[float | None]:
        """Of a task, or of the mean of all, at each length; None where it was not asked."""
        found = [
            [score for (name, at), score in self.scores.items() if at == n and task in (None, name)] for n in lengths
        ]
        return [sum(scores) / len(scores) if scores else None for scores in found]


class Brief:
    """The benchmark for the models of one tokenizer.

    lengths: those of `trained_length` in which some task has room; the others are not asked there.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        trained_length: int,
        samples: int,
        finished: FinishedRows,
        seed: int = 0,
    ) -> None:
        encoder = PromptEncoder(tokenizer)
        prose = Prose(encoder)
        self.samples, self._finished = samples, finished
        self._about = {"seed": seed, "chat": False}
        tasks = [make_task(name, encoder, prose, seed) for name in TASKS]
        possible = {n: [task for task in tasks if has_room(task, n, samples)] for n in lengths_of(trained_length)}
        self._tasks: dict[int, list[Task]] = {length: some for length, some in possible.items() if some}
        self.lengths = list(self._tasks)

    def ask(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        way: Way,
        which: Any,
        asked: Interrupts,
    ) -> Iterator[list[Cell]]:
        """The cells of each length, one length after the other. which: what the model is (JSON): its answers are kept
        under it.

        By full attention, lengths beyond the model's positions are left out. Raises as `measure` does.
        """
        known = model.config.max_position_embeddings
        for length, tasks in self._tasks.items():
            if not way.full or length <= known:
                yield measure(
                    model,
                    tokenizer,
                    tasks,
                    [length],
                    way,
                    self._finished,
                    asked,
                    samples=self.samples,
                    depends_on={"model": which, **self._about},
                )
