"""Questions about documents, from the files of SQuAD or HotpotQA that the user gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from landmark_cli.console import counted
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.file_errors import reading
from landmark_cli.file_reading import read_bytes

from .encoding import LINE, PromptEncoder
from .haystacks import Prompt, TooShort
from .task import Task
from .wording import DOCUMENT_LABEL, QUESTION

QUESTION_TOKENS = 32
# HotpotQA's file of questions to test with has 46 MB.
MAX_BYTES = 512 << 20
FORMATS = "expected SQuAD's JSON (an object with data) or HotpotQA's (a list)"


@dataclass(frozen=True)
class DocumentQuestion:
    """A question. answers: spellings of its answer. needed: the documents that it is about, by number. near: further
    ones of the same subject, which come first among the others."""

    text: str
    answers: list[str]
    needed: list[int]
    near: list[int]


def read_questions(path: Path) -> tuple[list[DocumentQuestion], list[str]]:
    """The questions of a file of SQuAD (1.1 or 2.0, those that have an answer) or HotpotQA, and all its documents.

    Raises LandmarkError where the file cannot be read, UsageError where it is another kind of file.
    """
    data = read_bytes(path, "--qa", max_bytes=MAX_BYTES)
    with reading(path, "--qa", kind=UsageError):
        content = json.loads(data.decode("utf-8"))
        try:
            questions, documents = _squad(content) if isinstance(content, dict) else _hotpot(content)
        except (KeyError, TypeError, ValueError, IndexError):
            raise ValueError(FORMATS) from None
        if not questions:
            raise ValueError(f"it has no question that has an answer; {FORMATS}")
    return questions, documents


def _squad(content: dict[str, Any]) -> tuple[list[DocumentQuestion], list[str]]:
    articles = [article["paragraphs"] for article in content["data"]]
    numbers = _numbered(paragraph["context"] for article in articles for paragraph in article)
    questions = []
    for article in articles:
        same = list(dict.fromkeys(numbers[paragraph["context"]] for paragraph in article))
        for paragraph in article:
            here = numbers[paragraph["context"]]
            near = [number for number in same if number != here]
            questions += [
                DocumentQuestion(asked["question"], [answer["text"] for answer in asked["answers"]], [here], near)
                for asked in paragraph["qas"]
                if asked["answers"] and not asked.get("is_impossible", False)
            ]
    return questions, list(numbers)


def _hotpot(content: list[dict[str, Any]]) -> tuple[list[DocumentQuestion], list[str]]:
    texts = [[f"{title}\n{''.join(sentences)}" for title, sentences in asked["context"]] for asked in content]
    numbers = _numbered(text for one in texts for text in one)
    questions = [
        DocumentQuestion(asked["question"], [asked["answer"]], list(dict.fromkeys(map(numbers.__getitem__, one))), [])
        for asked, one in zip(content, texts, strict=True)
    ]
    return questions, list(numbers)


def _numbered(texts: Iterator[str]) -> dict[str, int]:
    return {text: number for number, text in enumerate(sorted(set(texts)))}


class DocumentQuestions(Task):
    """The documents that a question is about, hidden among others. One of the answers' spellings is enough.

    The last document, which is never one of those needed, is cut.
    """

    any_of = True

    def __init__(self, name: str, encoder: PromptEncoder, seed: int, path: Path):
        super().__init__(name, QUESTION_TOKENS, encoder, seed)
        self.questions, self._documents = read_questions(path)
        self._order = np.random.default_rng(self._seed).permutation(len(self.questions))
        self._ids: dict[int, np.ndarray] = {}
        self._labels: list[np.ndarray] = []
        about = path.stat()
        self.identity = [str(path), about.st_size, about.st_mtime_ns]

    def make(self, sample: int, length: int) -> Prompt:
        if sample >= len(self.questions):
            raise UsageError(
                f"--samples: the file of --qa has {counted(len(self.questions), 'question')}; ask for no more samples "
                "than that"
            )
        question, generator = self.questions[self._order[sample]], self.generator(sample)
        head = self.encoder.head(QUESTION.head, before="Document")
        tail = self.encoder.tail(QUESTION.tail.format(query=question.text), QUESTION.answer)
        room = length - self.new_tokens - len(head) - len(tail)
        shares = generator.random(len(question.needed))
        others = self._others(question, generator)
        needed = sum(len(self._document(number)) for number in question.needed)
        listed: list[int] = []
        tokens = needed + self._label_tokens(len(question.needed))
        if tokens > room:
            raise TooShort(length + tokens - room)
        last = next(others)
        while True:
            label = self._label(len(question.needed) + len(listed))
            if tokens + len(label) + len(self._document(last)) > room:
                break
            tokens += len(label) + len(self._document(last))
            listed.append(last)
            last = next(others)
        # From the last place on, so that the places of those still to come stay what they are.
        order = listed
        for share, number in sorted(zip(shares, question.needed, strict=True), reverse=True):
            place = int(share * (len(listed) + 1))
            order = [*order[:place], number, *order[place:]]
        parts = [part for place, number in enumerate(order) for part in (self._label(place), self._document(number))]
        cut = np.concatenate([self._label(len(order)), self._document(last)])[: room - tokens]
        return Prompt(np.concatenate([head, *parts, cut, tail]), question.answers)

    def _others(self, question: DocumentQuestion, generator: np.random.Generator) -> Iterator[int]:
        """Documents that the question is not about, those of its subject first, without end."""
        known = {*question.needed, *question.near}
        near = generator.permutation(question.near).astype(int).tolist()
        others = [
            *near,
            *(number for number in generator.permutation(len(self._documents)).tolist() if number not in known),
        ]
        if not others:
            raise LandmarkError("the file of --qa has no document besides those that its question is about")
        while True:
            yield from others
            self.repeated = True

    def _document(self, number: int) -> np.ndarray:
        if number not in self._ids:
            text = f"{self._documents[number]}\n\n"
            self._ids[number] = self.encoder.text(text, after=LINE, before="Document")
        return self._ids[number]

    def _label(self, place: int) -> np.ndarray:
        while place >= len(self._labels):
            self._labels.append(self.encoder.text(DOCUMENT_LABEL.format(number=len(self._labels) + 1), after=LINE))
        return self._labels[place]

    def _label_tokens(self, count: int) -> int:
        return sum(len(self._label(place)) for place in range(count))
