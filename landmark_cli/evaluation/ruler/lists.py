"""Lists of words, of which the most frequent are asked for."""

from __future__ import annotations

import math
import string
from collections.abc import Iterator, Sequence
from itertools import count as numbers_from

import numpy as np

from . import words
from .encoding import LINE, PromptEncoder
from .haystacks import Prompt, TooShort
from .task import Task
from .wording import COMMON_WORDS, DOTS, FREQUENT_WORDS

COMMON = 10
COMMON_TOKENS = 120
# Below this length words stand there fewer times.
LONG = 4096
PAIRS_AT_ONCE = 1024

FREQUENT = 3
FREQUENT_TOKENS = 50
CODED_LETTERS = 6
# The exponent of the Zeta distribution, and the sum of its series.
ALPHA, ZETA = 2.0, math.pi**2 / 6
# From so many words on the third answer is more frequent than the word behind it, whatever is rounded off.
FEWEST_OCCURRENCES = 74
# A coded word for so many tokens of the length, but no fewer than stand among the fewest words.
TOKENS_OF_A_CODED_WORD = 50
FEWEST_CODED_WORDS = 6


class CommonWords(Task):
    """A numbered list in which 10 words stand 30 times each and others 3 times, in lists of under 4096 tokens 6 times
    and once. A worked example comes first.

    What is left at the end and has no room for another word as often as that is filled with further words that stand
    there once, the last of them cut.
    """

    rules_from = (0, LONG)

    def __init__(self, name: str, encoder: PromptEncoder, seed: int):
        super().__init__(name, COMMON_TOKENS, encoder, seed)
        self._numbers: list[np.ndarray] = []
        self._words: dict[str, np.ndarray] = {}
        self._pairs: list[str] = []
        self._pair_generator = self.generator(0, 2)

    def make(self, sample: int, length: int) -> Prompt:
        often, seldom = (30, 3) if length >= LONG else (6, 1)
        order = self.generator(sample).permutation(len(words.vocabulary()))
        shuffled = [words.vocabulary()[number] for number in order]
        common, uncommon = shuffled[:COMMON], self._uncommon(shuffled[COMMON:])
        head = self.encoder.head(self._example(sample, length) + COMMON_WORDS.head, before="1")
        tail = self.encoder.tail(COMMON_WORDS.tail, COMMON_WORDS.answer)
        room = length - self.new_tokens - len(head) - len(tail)
        tokens = often * sum(len(self._ids(word)) for word in common)
        count = often * COMMON
        least = tokens + self._numbers_tokens(count)
        if least > room:
            raise TooShort(length + least - room)
        taken: list[str] = []
        word = next(uncommon)
        while True:
            tokens += seldom * len(self._ids(word))
            if tokens + self._numbers_tokens(count + seldom) > room:
                break
            count += seldom
            taken.append(word)
            word = next(uncommon)
        listed = np.asarray(common * often + taken * seldom)
        # Another order at every length; the words that are asked for are the same.
        order = self.generator(sample, length).permutation(len(listed))
        parts = [part for number, word in enumerate(listed[order].tolist()) for part in self._item(number, word)]
        left, number = room - sum(map(len, parts)), count
        while left > 0:
            item = np.concatenate(self._item(number, word))[:left]
            parts.append(item)
            left, number, word = left - len(item), number + 1, next(uncommon)
        return Prompt(np.concatenate([head, *parts, tail]), common)

    def _example(self, sample: int, length: int) -> str:
        """The worked example: 10 words 10 times and 30 others 3 times, in short prompts 3 times and 10 others once."""
        size, often, seldom = (40, 10, 3) if length >= LONG else (20, 3, 1)
        generator = self.generator(sample, 1)
        chosen = [words.vocabulary()[number] for number in generator.permutation(len(words.vocabulary()))[:size]]
        common, uncommon = chosen[:COMMON], chosen[COMMON:]
        listed = np.asarray(common * often + uncommon * seldom)
        context = _numbered(listed[generator.permutation(len(listed))].tolist())
        return COMMON_WORDS.head + context + COMMON_WORDS.tail + COMMON_WORDS.answer + _numbered(common) + "\n"

    def _uncommon(self, single: Sequence[str]) -> Iterator[str]:
        """The other words; when the vocabulary is used up, pairs of adjective and noun go on, the same in all
        samples."""
        yield from single
        for number in numbers_from():
            if number == len(self._pairs):
                drawn = dict.fromkeys(words.pair(self._pair_generator) for _ in range(max(PAIRS_AT_ONCE, number)))
                self._pairs += [pair for pair in drawn if pair not in self._words]
                self._encode(self._pairs[number:])
            yield self._pairs[number]

    def _ids(self, word: str) -> np.ndarray:
        if not self._words:
            self._encode(words.vocabulary())
        return self._words[word]

    def _encode(self, listed: Sequence[str]) -> None:
        self._words |= zip(listed, self.encoder.inner([f" {word}" for word in listed], after="."), strict=True)

    def _item(self, number: int, word: str) -> tuple[np.ndarray, np.ndarray]:
        """An item of the list, the first of which has the number 0 here."""
        self._number_up_to(number + 1)
        return self._numbers[number], self._ids(word)

    def _numbers_tokens(self, count: int) -> int:
        """Tokens of the first `count` numbers of a list."""
        self._number_up_to(count)
        return int(self._ends[count - 1])

    def _number_up_to(self, count: int) -> None:
        if count > len(self._numbers):
            first = len(self._numbers)
            more = max(PAIRS_AT_ONCE, count - first, first)
            numbers = [f" {number}." for number in range(first + 1, first + more + 1)]
            self._numbers += self.encoder.inner(numbers)
            if first == 0:
                self._numbers[0] = self.encoder.text("1.", after=LINE)
            self._ends = np.cumsum([len(ids) for ids in self._numbers])


class FrequentWords(Task):
    """Words of 6 letters in frequencies of the Zeta distribution. The most frequent is shown as dots, which are to be
    ignored; the three after it are asked for.

    What is left at the end is filled with further dots.
    """

    def __init__(self, name: str, encoder: PromptEncoder, seed: int):
        super().__init__(name, FREQUENT_TOKENS, encoder, seed)

    def make(self, sample: int, length: int) -> Prompt:
        coded = self._coded_words(sample, max(length // TOKENS_OF_A_CODED_WORD, FEWEST_CODED_WORDS))
        ids = self.encoder.inner([f" {word}" for word in coded])
        widths = np.asarray([len(one) for one in ids])
        head = self.encoder.head(FREQUENT_WORDS.head)
        tail = self.encoder.tail(FREQUENT_WORDS.tail, FREQUENT_WORDS.answer)
        room = length - self.new_tokens - len(head) - len(tail)
        least = int(zeta_counts(FEWEST_OCCURRENCES, len(coded)) @ widths)
        if least > room:
            raise TooShort(length + least - room)
        low, high = FEWEST_OCCURRENCES, 4 * room + FEWEST_OCCURRENCES
        while high - low > 1:
            middle = (low + high) // 2
            fits = int(zeta_counts(middle, len(coded)) @ widths) <= room
            low, high = (middle, high) if fits else (low, middle)
        numbers = np.repeat(np.arange(len(coded)), zeta_counts(low, len(coded)))
        parts = [ids[number] for number in self.generator(sample, length).permutation(numbers)]
        left = room - sum(map(len, parts))
        more = -(-left // len(ids[0]))
        filling = np.tile(ids[0], more)[:left]
        return Prompt(np.concatenate([head, *parts, filling, tail]), coded[1 : FREQUENT + 1])

    def _coded_words(self, sample: int, count: int) -> list[str]:
        """Different words by rank, the first of them the dots. A longer list begins as a shorter one does."""
        generator = self.generator(sample)
        drawn: dict[str, None] = {}
        while len(drawn) < count - 1:
            letters = generator.integers(len(string.ascii_lowercase), size=CODED_LETTERS)
            drawn["".join(string.ascii_lowercase[letter] for letter in letters)] = None
        return [DOTS, *drawn]


def zeta_counts(occurrences: int, ranks: int) -> np.ndarray:
    """How often the words of the ranks 1, 2, ... stand in a text of about so many words, (ranks,) int64."""
    return (occurrences * np.arange(1, ranks + 1) ** -ALPHA / ZETA).astype(np.int64)


def _numbered(listed: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
