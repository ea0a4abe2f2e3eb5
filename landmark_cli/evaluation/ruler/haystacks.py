"""Haystacks, and how prompts of an exact number of tokens are put together of them.

One rule for every task: a haystack is a stream of units (sentences, lines, documents) that is cut at the very token
where the prompt has its length. What is hidden in it is never cut. Of prose every prompt has a stretch of its own: were
all prompts of a length its beginning, they would end in the same words, and be one sample however many they are.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from landmark_cli.console import counted, info
from landmark_cli.data.assets import SAMPLE
from landmark_cli.data.corpora import SAMPLE_HELD_OUT, novels
from landmark_cli.data.documents import BadText, Document, text_document
from landmark_cli.data.passkey import FILLER
from landmark_cli.data.readers import ENDINGS, read_documents
from landmark_cli.data.sentences import ENDS, FIRST_LETTER, FULL_WIDTH_ENDS
from landmark_cli.data.sources import find_sources
from landmark_cli.errors import LandmarkError

from .encoding import LINE, PromptEncoder

# A sentence ends behind these, where a capital follows; not behind the usual titles. Full-width ones need none.
_END = re.compile(
    rf"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)[{ENDS}]+[\"'”’»)\]_]*\s+(?=[\"'“‘«(\[_¿¡]*{FIRST_LETTER})"
    rf"|[{FULL_WIDTH_ENDS}]+[”’」』）]*\s*"
)
# Text whose sentences end otherwise is cut after so many characters, or there would be one place in it alone.
LONGEST_SENTENCE = 1500
ENCODED_AT_ONCE = 1000
PIECE_BYTES = 1 << 20
# Stretches begin among so many tokens of a text: of one without end no more has to be encoded before the first prompt.
DRAWN_FROM = 1 << 22
NOVELS = "the shipped novels"


@dataclass(frozen=True)
class Needle:
    """Something hidden. share: of the haystack's units that stand in front of it. ids: inside of the text, (n,).
    opening: its ids where the text begins with it."""

    share: float
    ids: np.ndarray
    opening: np.ndarray


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    tokens: (n,) int64, ends where the answer begins. references: what the answer should say. depths: for each of them,
    the share of the haystack's tokens in front of it, 0 to 1; None where it stands at no one place. begin: the token of
    the prose at which the haystack begins; None where it is made of something else.
    """

    tokens: np.ndarray
    references: list[str]
    depths: list[float] | None = None
    begin: int | None = None


class TooShort(LandmarkError):
    """A length that a task's prompt cannot have. least: the least that it can have, its answer's room included."""

    def __init__(self, least: int):
        super().__init__(f"too short: the least is {least}")
        self.least = least


class Units:
    """A haystack: units of token ids without end, (n,) int64 each. opening: the first unit where the text begins with
    it."""

    def __init__(self, units: Iterable[np.ndarray], opening: np.ndarray | None = None):
        self._units = iter(units)
        self._opening = opening

    def take(self, tokens: int, opens: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """The first tokens, (tokens,) int64, and where among them units begin, (m,). opens: whether the text begins
        with them."""
        parts, starts, got = [], [], 0
        while got < tokens:
            unit = next(self._units)
            if not parts and opens and self._opening is not None:
                unit = self._opening
            starts.append(got)
            parts.append(unit)
            got += len(unit)
        taken = np.concatenate(parts)[:tokens] if parts else np.zeros(0, dtype=np.int64)
        return taken, np.asarray(starts, dtype=np.int64)


def hide(
    head: np.ndarray, units: Units, needles: Sequence[Needle], tail: np.ndarray, length: int, answer: int
) -> tuple[np.ndarray, list[float]]:
    """A prompt that leaves of `length` tokens exactly `answer` for the answer, and the depth of every needle.

    A needle stands in front of a unit; only one of share 0 in front of the first. Needles that share a place keep their
    order. Raises TooShort.
    """
    first = next((number for number, needle in enumerate(needles) if needle.share == 0), None)
    ids = [needle.opening if number == first else needle.ids for number, needle in enumerate(needles)]
    room = length - answer - len(head) - len(tail) - sum(map(len, ids))
    if room < 0:
        raise TooShort(length - room)
    hay, starts = units.take(room, opens=first is None)
    stops = np.append(starts, room)
    numbers = [max(int(len(starts) * needle.share), int(needle.share > 0)) for needle in needles]
    places = [int(stops[min(number, len(starts))]) for number in numbers]
    parts, done = [head], 0
    for number in sorted(range(len(needles)), key=lambda number: places[number]):
        parts += [hay[done : places[number]], ids[number]]
        done = places[number]
    return np.concatenate([*parts, hay[done:], tail]), [place / max(room, 1) for place in places]


def filler_lines(encoder: PromptEncoder) -> Units:
    """The pass key's filler, a line each."""
    return Units(repeat(encoder.text(f"{FILLER}\n", after=LINE)))


class Sentence(NamedTuple):
    """A sentence of prose. ids: inside of a text, (n,) int64. start: tokens in front of it. document: its number."""

    text: str
    ids: np.ndarray
    start: int
    document: int


class Prose:
    """Sentences of documents, encoded once, as far as they are needed; after the last document the first one comes
    again.

    source: a file or folder of text; None, or the word that names them, for the shipped novels. name: of the source,
    for messages. identity: what has to be the same for its stretches to be the same (JSON).

    Raises LandmarkError for a source that is not there and, when it is read, one that holds no text or cannot be read.
    """

    def __init__(self, encoder: PromptEncoder, source: Path | None = None):
        source = _source(source)
        self._encoder, self._is_novels = encoder, source is None
        self.name = str(source or NOVELS)
        self.identity = haystack_identity(source)
        self._new = self._encoded(_novels() if source is None else _documents(source))
        self._sentences: list[Sentence] = []

    @property
    def is_read(self) -> bool:
        """Whether any of it has been read."""
        return bool(self._sentences)

    def tokens(self, most: int) -> int:
        """How many tokens it has, if it has fewer than `most`; else some number not below it."""
        while self._held() < most and self._more():
            pass
        return self._held()

    def check_tokens(self, longest: int) -> None:
        """Tell the user where it is repeated in a prompt of so many tokens. Raises LandmarkError where it holds no
        text."""
        self._check_text()
        held = self.tokens(longest)
        if held < longest:
            info(f"{self.name} has {counted(held, 'token')}, fewer than the longest prompt: it is repeated")

    def draw(self, generator: np.random.Generator) -> int:
        """The token at which a stretch begins: one of the sentences' beginnings among the first DRAWN_FROM tokens, all
        alike likely; of the shipped novels those of the one that is held out, as a model may know the others.

        It depends on the generator and the text alone, not on how much of the text was read before.
        """
        self._check_text()
        while self._may_begin(self._sentences[-1]) and self._more():
            pass
        beginnings = bisect_left(self._sentences, True, key=lambda sentence: not self._may_begin(sentence))
        return self._sentences[int(generator.integers(beginnings))].start

    def units(self, begin: int = 0) -> Units:
        """The haystack from one of its sentences on. begin: the token at which that begins, as `draw` has it."""
        self._check_text()
        self.tokens(begin + 1)
        first = bisect_left(self._sentences, begin, key=lambda sentence: sentence.start)
        return Units(self._repeated(first), self._encoder.text(self._sentences[first].text, after=LINE))

    def _may_begin(self, sentence: Sentence) -> bool:
        return sentence.start < DRAWN_FROM and (sentence.document == 0 or not self._is_novels)

    def _check_text(self) -> None:
        if not self._sentences and not self._more():
            raise LandmarkError(f"--haystack {self.name} holds no text to hide anything in; name another")

    def _held(self) -> int:
        """Tokens that are encoded."""
        return self._sentences[-1].start + len(self._sentences[-1].ids) if self._sentences else 0

    def _repeated(self, first: int) -> Iterator[np.ndarray]:
        number = first
        while True:
            if number == len(self._sentences) and not self._more():
                number = 0
            yield self._sentences[number].ids
            number += 1

    def _more(self) -> bool:
        """Whether there were further sentences, which are among those that are encoded from now on."""
        before = len(self._sentences)
        self._sentences += islice(self._new, ENCODED_AT_ONCE)
        return len(self._sentences) > before

    def _encoded(self, documents: Iterator[Document]) -> Iterator[Sentence]:
        sentences = (
            (number, sentence)
            for number, document in enumerate(documents)
            for sentence in sentences_of(_text(document))
        )
        start = 0
        while batch := list(islice(sentences, ENCODED_AT_ONCE)):
            encoded = self._encoder.inner([f" {sentence}" for _, sentence in batch])
            for (number, sentence), ids in zip(batch, encoded, strict=True):
                if len(ids):
                    yield Sentence(sentence, ids, start, number)
                    start += len(ids)


def sentences_of(text: str) -> Iterator[str]:
    """The sentences of a text, whose white space is made single spaces; parts of one, at a space where there is one,
    that has more than LONGEST_SENTENCE characters."""
    text = " ".join(text.split())
    start = 0
    for match in _END.finditer(text):
        yield from _parts(text[start : match.end()].rstrip())
        start = match.end()
    if start < len(text):
        yield from _parts(text[start:])


def _parts(sentence: str) -> Iterator[str]:
    start = 0
    while len(sentence) - start > LONGEST_SENTENCE:
        space = sentence.rfind(" ", start + 1, start + LONGEST_SENTENCE + 1)
        stop = space if space > 0 else start + LONGEST_SENTENCE
        yield sentence[start:stop]
        start = stop + (space > 0)
    yield sentence[start:]


def _source(source: Path | None) -> Path | None:
    """The file or folder, None for the shipped novels. Raises LandmarkError for one that is not there."""
    if source is None or str(source) == SAMPLE:
        return None
    if not source.exists():
        raise LandmarkError(f"--haystack: there is no file or folder {source}; the shipped novels are called {SAMPLE}")
    return source


def _text(document: Document) -> str:
    try:
        return b"".join(document.pieces(PIECE_BYTES)).decode()
    except BadText as bad:
        raise LandmarkError(f"--haystack: {bad}") from None


def _novels() -> Iterator[Document]:
    # The novel that `landmark prepare` holds out comes first: a model may have been trained on the others.
    texts = novels()
    titles = sorted(texts, key=lambda title: title != SAMPLE_HELD_OUT)
    yield from (text_document(title, texts[title]) for title in titles)


def _documents(source: Path) -> Iterator[Document]:
    for file in find_sources([source], ENDINGS).files:
        yield from read_documents(file.path, "text", None)


def haystack_identity(source: Path | None) -> dict[str, Any]:
    """What has to be the same for a haystack's stretches to be the same (JSON). source: as of Prose. Raises
    LandmarkError for a source that is not there."""
    text: str | list = NOVELS
    source = _source(source)
    if source is not None:
        text = [[str(file.path), file.size, file.modified_ns] for file in find_sources([source], ENDINGS).files]
    # What was answered when every prompt was the beginning of the text was asked in other prompts; and so what was when
    # sentences were those of English alone, of which the novels are.
    return {"text": text, "begin": "drawn"} | ({} if source is None else {"sentences": "of any script"})
