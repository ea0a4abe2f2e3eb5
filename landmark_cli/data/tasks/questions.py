"""How questions and answers stand at the end of a document."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from landmark_cli.data.tasks.formats import capital
from landmark_cli.data.tasks.vocabulary import pick

INTRODUCTIONS = (
    "", "", "", "***", "----", "Test of attention.", "So much for the text.", "To be filled in by the reader.",
    "Exercises", "Here the pages end. What was in them?", "For the catalogue:", "Comprehension, with solutions",
    "[end of document]", "Enquiries", "Some things were asked of the archive.", "Quiz", "## Review",
    "A reader has written in.",
)  # fmt: skip
"""What stands between a text and what is asked about it; an empty one is no line at all."""

FRAMES = (
    "{q}", "Q: {q}\nA:", "{q}\nReply:", "{q} -", '"{q}"\nIt was answered:', "Asked: {q}\nFound:", "({i}) {q}\n->",
    "{i}. {q}\nSolution:", "Reader: {q}\nArchivist:", "{q}\nAccording to these pages:", "User: {q}\nAssistant:",
    "Please look it up. {q}\nResult:", "# {q}\n#", "query> {q}\nresponse>", "{q} Check.\nChecked:", "- {q}\n -",
    "{q} (as told here):", "Student: {q}\nTeacher:",
)  # fmt: skip
"""How a question stands in front of its answer: {q} is the question, {i} its number."""

CLOZE = ("{q}", "Complete: {q}", "{i}) {q}", "To complete from the text: {q}", "Fill in. {q}")
"""How an unfinished sentence stands in front of its end."""

NOT_THERE = (
    "It does not say.", "Nothing here tells.", "That is not stated.", "No mention of it.", "Not given.", "Unknown from "
    "these pages.", "One cannot tell from this.", "There is nothing about that.", "The text is silent on it.",
    "This is told nowhere.",
)  # fmt: skip
"""Answers where what is asked is not in the text."""


@dataclass(frozen=True)
class Asked:
    """A question with its answer. cloze: whether the question is a sentence that the answer ends. begun: a sentence
    that stands behind the question and that the answer ends; none where the answer stands alone."""

    question: str
    answer: str
    cloze: bool = False
    begun: str = ""


@dataclass(frozen=True)
class Ending:
    """What stands behind a text: pairs of what is asked, which ends with a visible character, and its answer, which
    begins with a space. (A tokenizer starts a new word there, so that the ids of both are those of the whole.)"""

    pairs: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return "".join(asked + answer for asked, answer in self.pairs)


def ending(asked: list[Asked], generator: np.random.Generator) -> Ending:
    """Questions and answers, in this order and in one frame."""
    frame, cloze = pick(generator, FRAMES), pick(generator, CLOZE)
    introduction = pick(generator, INTRODUCTIONS)
    first = int(generator.integers(1, 40))
    pairs = []
    for number, one in enumerate(asked):
        question = (cloze if one.cloze else frame).format(q=capital(one.question), i=first + number)
        if one.begun:
            question += f" {capital(one.begun)}"
        if number == 0:
            question = f"\n\n{introduction}\n{question}" if introduction else f"\n\n{question}"
        last = "" if number == len(asked) - 1 else "\n"
        pairs.append((question, f" {one.answer}{last}"))
    return Ending(tuple(pairs))


def sentence(answer: str) -> str:
    """An answer with a full stop, where it has none."""
    return answer if answer.endswith((".", "!", "?")) else f"{answer}."


def enumeration(values: list[str]) -> str:
    """Several values in words."""
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} and {values[-1]}"
