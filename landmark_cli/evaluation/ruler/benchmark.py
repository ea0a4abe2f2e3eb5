"""The benchmark's tasks by name, and those of them that a run asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from landmark_cli.console import counted
from landmark_cli.errors import UsageError
from landmark_cli.options import nearest

from .documents import DocumentQuestions
from .encoding import PromptEncoder
from .haystacks import Prose, TooShort
from .lists import CommonWords, FrequentWords
from .needles import NEEDLE_TASKS, NeedleTask, VariableTracking
from .task import Task

TRACKING, COMMON, FREQUENT, DOCUMENTS = "vt", "cwe", "fwe", "qa"
# Those that need no file; the benchmark's own order.
GENERATED = (*NEEDLE_TASKS, TRACKING, COMMON, FREQUENT)
ALL = (*GENERATED, DOCUMENTS)


def task_names(asked: Sequence[str] | None, has_documents: bool) -> list[str]:
    """The tasks' names: those asked for, or all that can be made. has_documents: whether there is a file for qa.

    Raises UsageError for a name that no task has, and for qa without a file.
    """
    if not asked:
        return list(ALL if has_documents else GENERATED)
    for name in asked:
        if name not in ALL:
            raise UsageError(f"--tasks {name}: there is no such task{nearest(name, ALL)}")
    if DOCUMENTS in asked and not has_documents:
        raise UsageError("--tasks qa: give the file of SQuAD's or HotpotQA's questions with --qa FILE")
    return [name for name in ALL if name in asked]


def make_task(name: str, encoder: PromptEncoder, prose: Prose, seed: int = 0, documents: Path | None = None) -> Task:
    """A task by its name. documents: the file of qa."""
    if name in NEEDLE_TASKS:
        return NeedleTask(name, encoder, seed, prose)
    if name == DOCUMENTS:
        return DocumentQuestions(name, encoder, seed, documents)
    return {TRACKING: VariableTracking, COMMON: CommonWords, FREQUENT: FrequentWords}[name](name, encoder, seed)


def check_lengths(task: Task, lengths: Sequence[int], samples: int) -> None:
    """Raise UsageError, naming the least, where not every sample of a task can have so few tokens."""
    least = {start: _least(task, start, samples) for start in {_rule(task, length) for length in lengths}}
    for length in lengths:
        if least[_rule(task, length)] > length:
            raise UsageError(
                f"--lengths {length}: too short for {task.name}, whose prompts and answers take at least "
                f"{counted(least[_rule(task, length)], 'token')}; give longer lengths, or other --tasks"
            )


def has_room(task: Task, length: int, samples: int) -> bool:
    """Whether every sample of a task can have so few tokens."""
    return _least(task, _rule(task, length), samples) <= length


def _rule(task: Task, length: int) -> int:
    """Where the rules begin by which a task's prompts of this length are made."""
    return max(start for start in task.rules_from if start <= length)


def _least(task: Task, start: int, samples: int) -> int:
    """The least length that all samples can have by the rules that begin at this length."""
    least = start
    for sample in range(samples):
        try:
            task.make(sample, start)
        except TooShort as short:
            least = max(least, short.least)
    return least
