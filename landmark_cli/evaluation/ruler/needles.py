"""Needles in a haystack: numbers, words and identifiers to be found again, and chains of variables to be followed."""

from __future__ import annotations

import string
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, repeat
from typing import Literal

import numpy as np

from landmark_cli.data.passkey import FILLER

from . import words
from .encoding import LINE, PromptEncoder
from .haystacks import Needle, Prompt, Prose, Units, filler_lines, hide
from .task import Task
from .wording import BEHIND_EXAMPLE, NEEDLE, ONE, SEVERAL, TRACKING

Kind = Literal["words", "numbers", "uuids"]

# The depths of needles in prose, as shares: 40 whole per cents from 0 to 100.
DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int) / 100
NEEDLE_TOKENS = 128
# Of a haystack of needles so many are made first, and then twice as many as before, so many times.
FEWEST_DRAWN, DOUBLED = 16, 6

HOPS = 4
TRACKING_TOKENS = 30
VARIABLE_LETTERS = 5
# The worked example of variable tracking: shorter names in ten lines of filler.
EXAMPLE_LETTERS, EXAMPLE_LINES = 3, 10


@dataclass(frozen=True)
class Hidden:
    """What a needle task hides and asks for. keys: how many there are, with `values` values each. asked: how many of
    the keys are asked for. key_kind, value_kind: of what they are."""

    haystack: Literal["filler", "prose", "needles"]
    keys: int = 1
    values: int = 1
    asked: int = 1
    key_kind: Kind = "words"
    value_kind: Kind = "numbers"


NEEDLE_TASKS = {
    "niah_single_1": Hidden("filler"),
    "niah_single_2": Hidden("prose"),
    "niah_single_3": Hidden("prose", value_kind="uuids"),
    "niah_multikey_1": Hidden("prose", keys=4),
    "niah_multikey_2": Hidden("needles"),
    "niah_multikey_3": Hidden("needles", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": Hidden("prose", values=4),
    "niah_multiquery": Hidden("prose", keys=4, asked=4),
}


class NeedleTask(Task):
    """Sentences that give a key its value, hidden in filler, in prose or among other such sentences."""

    def __init__(self, name: str, encoder: PromptEncoder, seed: int, prose: Prose):
        super().__init__(name, NEEDLE_TOKENS, encoder, seed)
        self.hidden = NEEDLE_TASKS[name]
        self._prose = prose
        if self.hidden.haystack == "prose":
            self.identity = prose.identity

    def make(self, sample: int, length: int) -> Prompt:
        hidden, generator = self.hidden, self.generator(sample)
        keys = _distinct(hidden.key_kind, generator, hidden.keys)
        values = _distinct(hidden.value_kind, generator, hidden.keys * hidden.values)
        pairs = [(keys[number // hidden.values], value) for number, value in enumerate(values)]
        asked = generator.permutation(hidden.keys)[: hidden.asked]
        queries = [keys[number] for number in asked]
        template, kind = (ONE, hidden.value_kind[:-1])
        if hidden.asked * hidden.values > 1:
            template, kind = SEVERAL, hidden.value_kind
        query = ", and ".join(filter(None, [", ".join(queries[:-1]), queries[-1]]))
        tail = self.encoder.tail(
            template.tail.format(kind=kind, query=query), template.answer.format(kind=kind, query=query)
        )
        head = self.encoder.head(template.head.format(kind=kind), before="One")
        needles = self._needles(pairs, generator)
        # From numbers of its own, so that needles are what they are in other haystacks, and the same at every length.
        begin = self._prose.draw(self.generator(sample, 2)) if hidden.haystack == "prose" else None
        haystack = self._haystack(sample, set(keys), begin)
        prompt, depths = hide(head, haystack, needles, tail, length, self.new_tokens)
        found = [
            (value, depth)
            for query in queries
            for (key, value), depth in zip(pairs, depths, strict=True)
            if key == query
        ]
        return Prompt(prompt, [value for value, _ in found], [depth for _, depth in found], begin)

    def _needles(self, pairs: list[tuple[str, str]], generator: np.random.Generator) -> list[Needle]:
        """The sentences of the pairs of key and value, at depths of their own."""
        kind = self.hidden.value_kind
        sentences = [NEEDLE.format(kind=kind, key=key, value=value) for key, value in pairs]
        if self.hidden.haystack == "prose":
            shares = generator.choice(DEPTHS, len(pairs), replace=False)
            inner = self.encoder.inner([f" {sentence}" for sentence in sentences])
            opening = self.encoder.inner(sentences, after=LINE)
        else:
            shares = generator.random(len(pairs))
            inner = opening = self.encoder.inner([f"{sentence}\n" for sentence in sentences], after=LINE)
        return [Needle(float(share), *ids) for share, *ids in zip(shares, inner, opening, strict=True)]

    def _haystack(self, sample: int, taken: set[str], begin: int | None) -> Units:
        if self.hidden.haystack == "filler":
            return filler_lines(self.encoder)
        if begin is not None:
            return self._prose.units(begin)
        return Units(self._other_needles(sample, taken))

    def _other_needles(self, sample: int, taken: set[str]) -> Iterator[np.ndarray]:
        """Sentences of keys that nobody asks for. taken: keys that none of them has."""
        hidden, generator = self.hidden, self.generator(sample, 1)
        for more in count():
            drawn = FEWEST_DRAWN << min(more, DOUBLED)
            keys = [_draw(hidden.key_kind, generator) for _ in range(drawn)]
            values = [_draw(hidden.value_kind, generator) for _ in keys]
            sentences = [
                f"{NEEDLE.format(kind=hidden.value_kind, key=key, value=value)}\n"
                for key, value in zip(keys, values, strict=True)
                if key not in taken
            ]
            yield from self.encoder.inner(sentences, after=LINE)


class VariableTracking(Task):
    """A number is given to a variable, which is given to another, and so on; all that have it are asked for."""

    def __init__(self, name: str, encoder: PromptEncoder, seed: int):
        super().__init__(name, TRACKING_TOKENS, encoder, seed)

    def make(self, sample: int, length: int) -> Prompt:
        generator = self.generator(sample)
        names, value = _variables(generator, VARIABLE_LETTERS)
        shares = np.sort(generator.random(len(names)))
        example = self._example(generator)
        head = self.encoder.head(example + TRACKING.head, before="The")
        tail = self.encoder.tail(
            TRACKING.tail.format(query=value), TRACKING.answer.format(query=value, count=len(names))
        )
        lines = self.encoder.inner([f" {line}" for line in _assignments(names, value)])
        needles = [Needle(float(share), ids, ids) for share, ids in zip(shares, lines, strict=True)]
        opening = self.encoder.text(f"{FILLER}\n", after=LINE)
        filler = Units(repeat(self.encoder.text(f" {FILLER}\n", after=LINE)), opening)
        prompt, depths = hide(head, filler, needles, tail, length, self.new_tokens)
        return Prompt(prompt, names, depths)

    @staticmethod
    def _example(generator: np.random.Generator) -> str:
        """The worked example, its own names and number asked for and answered."""
        names, value = _variables(generator, EXAMPLE_LETTERS)
        places = np.sort(generator.choice(EXAMPLE_LINES, len(names), replace=False))
        assignments = dict(zip(places.tolist(), _assignments(names, value), strict=True))
        lines = [part for line in range(EXAMPLE_LINES) for part in (assignments.get(line), f"{FILLER}\n") if part]
        question = TRACKING.tail.format(query=value) + TRACKING.answer.format(query=value, count=len(names))
        return f"{TRACKING.head}{' '.join(lines)}{question} {' '.join(names)}{BEHIND_EXAMPLE}"


def _assignments(names: list[str], value: str) -> list[str]:
    """The lines of a chain; the benchmark has a space behind a name that is given on."""
    return [
        f"VAR {names[0]} = {value}",
        *(f"VAR {new} = VAR {old} " for old, new in zip(names, names[1:], strict=False)),
    ]


def _variables(generator: np.random.Generator, letters: int) -> tuple[list[str], str]:
    """The names of one chain, all different, and its number of five digits."""
    names: dict[str, None] = {}
    while len(names) < HOPS + 1:
        drawn = generator.integers(len(string.ascii_uppercase), size=letters)
        names["".join(string.ascii_uppercase[letter] for letter in drawn)] = None
    return list(names), str(generator.integers(10_000, 99_999))


def _draw(kind: Kind, generator: np.random.Generator) -> str:
    if kind == "words":
        return words.pair(generator)
    if kind == "numbers":
        return str(generator.integers(1_000_000, 10_000_000))
    return str(uuid.UUID(bytes=generator.bytes(16), version=4))


def _distinct(kind: Kind, generator: np.random.Generator, count: int) -> list[str]:
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[_draw(kind, generator)] = None
    return list(drawn)
