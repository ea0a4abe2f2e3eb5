"""Task documents of any length in tokens, and the corpus of them that `landmark prepare tasks` prepares."""

from __future__ import annotations

import hashlib
import math
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from landmark_cli.console import counted, info, warn
from landmark_cli.data.corpora import SAMPLE_HELD_OUT, Corpus, novels, open_corpus
from landmark_cli.data.documents import BadText, Document, Marked, marked_pieces, text_document
from landmark_cli.data.sentences import ENDS, FIRST_LETTER, FULL_WIDTH_ENDS
from landmark_cli.data.tasks.kinds import Draw, Task, draw_task
from landmark_cli.data.tasks.questions import Ending, ending
from landmark_cli.data.text_batches import or_skip
from landmark_cli.errors import LandmarkError, UsageError

if TYPE_CHECKING:
    from landmark_cli.data.text_tokenizer import TextTokenizer

CONTENTS = 6
"""Counts up when a version of this program gives other documents to the same seed."""
LEAST = 256
"""Tokens of the shortest document: room for a fact, its question and some text."""
LEAST_SHARE_OF_TEXT = 0.4
"""What a document has of the haystack at least; of hidden facts and questions the rest."""
FACT_TOKENS = 120
"""About what a fact takes at most, to see how many a document may have."""
HELD_OUT_TEXT = 0.05
"""Share of the haystack, its end, that only validation documents are made of."""
MOST_CHARACTERS = 1 << 28
"""What is read of a haystack: it is held in memory."""
MEASURED_CHARACTERS = 1 << 16
SEAM_TOKENS = 3
"""What empty lines around a hidden piece take, and the word of the text that it parts."""
TOKEN_BYTES = 4
LONGEST_WORD = 100
# A sentence ends at a full stop that belongs to no title, with its closing quotation mark, before white space and a
# capital letter or a quotation mark, at a full-width one wherever it stands; a paragraph at an empty line. Each begins
# with the characters that it looks for, and only then looks back: what looks back first is tried at every character,
# several times slower.
SENTENCE_END = re.compile(
    rf"[{ENDS}{FULL_WIDTH_ENDS}](?:(?<=[{FULL_WIDTH_ENDS}])[”’」』）]?"
    rf"|(?<!\bMr.)(?<!\bMrs.)(?<!\bDr.)(?<!\bSt.)[\"”’»')]?(?=\s+(?:[\"“‘«'¿¡]|{FIRST_LETTER})))"
)
_PARAGRAPH_END = re.compile(r"\n(?<=\S\n)(?=\s*\n)")


def read_haystack(
    sources: Sequence[str] | None, *, text_field: str = "text", skip_bad_text: bool = False
) -> tuple[str, str]:
    """Text to hide things in, and where it comes from in words.

    sources: files or folders of text, of whose splits the one for training is taken; None takes the novels of the
    sample that are not held out. text_field: see `open_corpus`. skip_bad_text: leave out what is no text.

    Raises LandmarkError where there is no text, or something that is none and is not to be skipped.
    """
    if sources:
        corpus = open_corpus("text", list(sources), text_field=text_field, validation_share=0)
        where = corpus.source
        documents = (document for split, document in corpus.documents() if split == "train")
    else:
        where = "five novels of Jane Austen, part of this program"
        documents = (text_document(title, text) for title, text in novels().items() if title != SAMPLE_HELD_OUT)
    texts, left = [], MOST_CHARACTERS
    for document in documents:
        try:
            text = b"".join(document.pieces(1 << 24)).decode()
        except BadText as bad:
            if not skip_bad_text:
                raise LandmarkError(or_skip(str(bad))) from None
            warn(f"left out {bad}")
            continue
        texts.append(text[:left].strip())
        left -= len(text)
        if left <= 0:
            warn(f"of the haystack {where}, the first {MOST_CHARACTERS >> 20}M characters are used")
            break
    haystack = "\n\n".join(text.replace("\r\n", "\n") for text in texts if text)
    if not haystack:
        raise LandmarkError(f"there is no text in the haystack {where}")
    return haystack, where


class Slices(Protocol):
    """Text to hide things in. tokens: how many it has, about."""

    @property
    def tokens(self) -> int: ...

    def slice(self, share: float, tokens: int) -> list[int]:
        """Ids of text from about a share of it on, `tokens` of them or slightly fewer. It begins with a sentence."""


class Haystack:
    """Slices of a text of any length in tokens.

    text: taken round and round where a slice is longer. encode, decode: of the tokenizer.
    """

    def __init__(self, text: str, tokenizer: TextTokenizer) -> None:
        self.text, self._tokenizer = text, tokenizer

    @cached_property
    def token_characters(self) -> float:
        """How many characters a token of it takes, about."""
        middle = max(0, (len(self.text) - MEASURED_CHARACTERS) // 2)
        measured = self.text[middle : middle + MEASURED_CHARACTERS]
        return len(measured) / max(1, len(self._tokenizer.encode(measured)))

    @property
    def tokens(self) -> int:
        """How many tokens it has, about."""
        return int(len(self.text) / self.token_characters)

    @cached_property
    def _starts(self) -> list[int]:
        """Where sentences begin."""
        return [0] + [_following(self.text, match) for match in SENTENCE_END.finditer(self.text)]

    def slice(self, share: float, tokens: int) -> list[int]:
        """See `Slices`."""
        place = int(share * len(self.text))
        number = bisect_left(self._starts, place)
        start = self._starts[number] if number < len(self._starts) else 0
        wanted = int(tokens * self.token_characters * 1.1) + 200
        parts, missing = [self.text[start : start + wanted]], wanted
        while (missing := missing - len(parts[-1])) > 0:
            parts.append(("\n\n" + self.text)[:missing])
        return self._tokenizer.encode("".join(parts).lstrip())[:tokens]


@dataclass(frozen=True)
class TaskDocument:
    """One document: the text with what is hidden in it, and the questions and answers at its end."""

    text: str
    ending: Ending

    def __str__(self) -> str:
        return self.text + str(self.ending)

    @property
    def parts(self) -> list[tuple[str, bool]]:
        """All of its text in parts, each with whether it is an answer."""
        return [(self.text, False)] + [
            part for asked, answer in self.ending.pairs for part in ((asked, False), (answer, True))
        ]


class TaskDocuments:
    """Makes documents with one tokenizer.

    absent: share of the look-ups that ask for what is not there. kinds: see `draw_task`.
    """

    def __init__(
        self, haystack: Slices, tokenizer: TextTokenizer, absent: float, kinds: Sequence[str] | None = None
    ) -> None:
        self._haystack, self._tokenizer, self._absent, self._kinds = haystack, tokenizer, absent, kinds or ()

    def make(self, length: int, seed: Sequence[int]) -> TaskDocument:
        """The document of a seed: about `length` tokens. A function of both, and of the haystack.

        Raises LandmarkError where no task fits.
        """
        generator = np.random.default_rng(seed)
        ids = self._haystack.slice(generator.random(), length)
        most = max(1, int((1 - LEAST_SHARE_OF_TEXT) * length / FACT_TOKENS))
        for attempt in range(50):
            made = self._attempt(ids, length, [*seed, attempt], most)
            if made is not None:
                return made
            most = max(1, most // 2)
        raise LandmarkError(f"no task fits into a document of {counted(length, 'token')}: make --shortest larger")

    def _attempt(self, ids: list[int], length: int, seed: Sequence[int], most: int) -> TaskDocument | None:
        """A document with a task of this seed; None where what is hidden and asked would leave too little text."""
        room, kept = len(ids), int(LEAST_SHARE_OF_TEXT * length)
        while room >= kept:
            text = self._tokenizer.decode(ids[:room]).lstrip().rstrip("\ufffd")
            # No word is cut, of text that has spaces between them.
            word = max(text.rfind(" "), text.rfind("\n"))
            text = text[: word if len(text) - word < LONGEST_WORD else None].rstrip()
            generator = np.random.default_rng(seed)
            task = draw_task(Draw(generator, text, most, self._absent), self._kinds)
            places = _places(task, generator)
            asked = ending(task.asked, generator)
            added = [*task.hidden, str(asked)]
            over = room + sum(len(self._tokenizer.encode(piece)) + SEAM_TOKENS for piece in added) - length
            if over <= 0:
                return TaskDocument(_insert_at(text, task, places), asked)
            room -= over
        return None


def insert(text: str, task: Task, generator: np.random.Generator) -> str:
    """A text with the pieces of a task put in, in their order, at places that are spread evenly over it: sentences
    between its sentences, what has lines of its own between its paragraphs."""
    return _insert_at(text, task, _places(task, generator))


def _places(task: Task, generator: np.random.Generator) -> list[tuple[float, bool]]:
    """At which share of a text each piece of a task goes in, in order, and whether it has lines of its own."""
    shares = np.sort(generator.random(len(task.hidden))).tolist()
    return [
        (share, "\n" in piece or generator.random() < 0.3) for share, piece in zip(shares, task.hidden, strict=True)
    ]


def _insert_at(text: str, task: Task, places: list[tuple[float, bool]]) -> str:
    """See `insert`. places: of `_places`."""
    sentences = [match.end() for match in SENTENCE_END.finditer(text)]
    paragraphs = [match.start() for match in _PARAGRAPH_END.finditer(text)]
    parts, done = [], 0
    for (place, own_lines), piece in zip(places, task.hidden, strict=True):
        at = _next(paragraphs if own_lines and paragraphs else sentences, int(place * len(text)), done, len(text))
        parts += [text[done:at], f"\n\n{piece}" if own_lines else f" {piece}"]
        if own_lines and not text.startswith("\n\n", at) and at < len(text):
            parts.append("\n\n")
            at += len(text) - at - len(text[at:].lstrip())
        elif at < len(text) and not text[at].isspace():
            parts.append(" ")
        done = at
    return "".join([*parts, text[done:]])


def _next(places: list[int], wanted: int, least: int, end: int) -> int:
    """The place nearest behind what is wanted, and not before `least`; the end where there is none."""
    number = bisect_left(places, max(wanted, least))
    return places[number] if number < len(places) else end


def tasks_corpus(
    tokenizer: TextTokenizer,
    *,
    haystack: Sequence[str] | None = None,
    text_field: str = "text",
    skip_bad_text: bool = False,
    documents: int = 2000,
    shortest: int = 256,
    longest: int = 4096,
    absent: float = 0.1,
    kinds: Sequence[str] | None = None,
    validation_share: float = 0.01,
    seed: int = 0,
) -> Corpus:
    """Documents in which something must be found, `documents` of them, their lengths spread evenly on a logarithmic
    scale from `shortest` to `longest` tokens.

    haystack, text_field, skip_bad_text: see `read_haystack`; the haystack's end is kept for validation documents.
    absent: share of the look-ups that ask for what is not there. kinds: of questions, see `draw_task`. Document i is a
    function of the seed, i, the kinds and the haystack.

    Raises UsageError for lengths that no document can have, LandmarkError for a haystack without text.
    """
    if not LEAST <= shortest <= longest:
        raise UsageError(
            f"task documents of {shortest} to {counted(longest, 'token')} cannot be: the shortest takes {LEAST}, and "
            "the longest must not be shorter than the shortest"
        )
    text, where = read_haystack(haystack, text_field=text_field, skip_bad_text=skip_bad_text)
    end = _cut(text) if validation_share else len(text)
    texts = {"train": text[:end]} | ({"validation": text[end:]} if validation_share else {})
    return hidden_in(
        {split: Haystack(part, tokenizer) for split, part in texts.items()},
        tokenizer,
        where,
        identity=hashlib.sha256(text.encode()).hexdigest(),
        documents=documents,
        shortest=shortest,
        longest=longest,
        absent=absent,
        kinds=kinds,
        validation_share=validation_share,
        seed=seed,
    )


def hidden_in(
    stacks: Mapping[str, Slices],
    tokenizer: TextTokenizer,
    where: str,
    *,
    identity: Any,
    documents: int,
    shortest: int,
    longest: int,
    absent: float,
    validation_share: float,
    seed: int,
    kinds: Sequence[str] | None = None,
) -> Corpus:
    """As `tasks_corpus`, hidden in the haystack of each split: "train" and, unless `validation_share` is 0,
    "validation". where: they come from, in words. identity: what has to be the same for them to be the same (JSON)."""
    makers = {split: TaskDocuments(stack, tokenizer, absent, kinds) for split, stack in stacks.items()}
    info(f"haystack: {where}")
    for split, stack in stacks.items():
        if longest > stack.tokens:
            held = counted(stack.tokens, "token")
            warn(f"the haystack for {split} has about {held}, and is repeated in documents that are longer")
    plan = [_length(np.random.default_rng([seed, index]), shortest, longest) for index in range(documents)]
    return Corpus(
        "tasks",
        f"tasks hidden in {where}",
        _AllTasks(makers, plan, round(1 / validation_share) if validation_share else 0, seed),
        sum(plan) * TOKEN_BYTES,
        [CONTENTS, identity, documents, shortest, longest, absent, validation_share, seed, *(kinds or ())],
        has_answers=True,
        is_made=True,
    )


@dataclass(frozen=True)
class _AllTasks:
    """Called, yields all documents of a corpus, each with its split.

    makers: by split. plan: tokens of each document. every: so many documents have one for validation among them; none
    where it is 0.
    """

    makers: Mapping[str, TaskDocuments]
    plan: list[int]
    every: int
    seed: int

    def __call__(self) -> Iterator[tuple[str, Document]]:
        for index, length in enumerate(self.plan):
            yield self._split(index), Document(f"task {index}", length * TOKEN_BYTES, partial(self._pieces, index))

    def _split(self, index: int) -> str:
        return "validation" if self.every and index % self.every == self.every // 2 else "train"

    def _pieces(self, index: int, limit: int) -> Iterator[Marked]:
        made = self.makers[self._split(index)].make(self.plan[index], [self.seed, index, 1])
        yield from marked_pieces(f"task {index}", made.parts, limit)


def _following(text: str, end: re.Match[str]) -> int:
    """Where the sentence behind the end of another begins, whose white space is one character at most."""
    return end.end() + text[end.end() : end.end() + 1].isspace()


def _cut(text: str) -> int:
    """Where the end of a text that is held out begins: with a sentence, if it has some."""
    wanted = len(text) - int(HELD_OUT_TEXT * len(text))
    found = SENTENCE_END.search(text, wanted)
    return _following(text, found) if found else wanted


def _length(generator: np.random.Generator, shortest: int, longest: int) -> int:
    """Tokens of one document, without its end-of-text token."""
    return round(math.exp(generator.uniform(math.log(shortest), math.log(longest)))) - 1


def how_many() -> dict[str, int]:
    """How much there is to draw from, by name: terms of each vocabulary, ways to state a fact and to ask for one."""
    from landmark_cli.data.tasks.facts import CHAINS, LONG, RELATIONS, REPEATED
    from landmark_cli.data.tasks.formats import ways_to_state
    from landmark_cli.data.tasks.questions import CLOZE, FRAMES, INTRODUCTIONS
    from landmark_cli.data.tasks.vocabulary import VOCABULARIES

    related = list(chain(RELATIONS, REPEATED, LONG))
    stated = sum(ways_to_state(relation) for relation in chain(related, CHAINS))
    # A question for a value may have the beginning of a sentence behind it.
    questions = sum(2 * len(r.asks) + bool(r.back) + bool(r.count) for r in related)
    questions += sum(len(c.asks) + len(c.ends) + len(c.lists) for c in CHAINS)
    framed = questions * len(FRAMES) + len(related) * len(CLOZE)
    return {kind: vocabulary.size for kind, vocabulary in VOCABULARIES.items()} | {
        "relations": len(related) + len(CHAINS),
        "ways to state a fact": stated,
        "ways to ask": framed * len(set(INTRODUCTIONS)),
    }
