"""Pass keys: a number hidden in text, to be found again. Prompts of any exact length in tokens.

Source: arXiv 2305.16300, section 4.2, whose wording these prompts have, and, unless they are given another text, whose
filler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from landmark_cli.console import counted
from landmark_cli.data.documents import Document, text_document
from landmark_cli.errors import LandmarkError, UsageError

if TYPE_CHECKING:
    from landmark_cli.data.corpora import Corpus
    from landmark_cli.data.text_tokenizer import TextTokenizer

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KEY_LINE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
ANSWER = " {key}."
LARGEST_KEY = 50_000
# How far from where it was asked for a key may stand so as to be between sentences: in tokens, and as a share of the
# text. Text without sentences would have all keys at its ends.
NEAR_TOKENS, NEAR_SHARE = 32, 0.05
# About how many bytes a token of this text takes, for the progress of preparing.
TOKEN_BYTES = 4


@dataclass(frozen=True)
class PassKey:
    """One prompt.

    tokens: (length,) int64, ends with the question. key: the number hidden. depth: share of the text around it that was
    asked for in front of it. begin: the haystack's token at which that text begins; None where that was not asked for.
    """

    tokens: np.ndarray
    key: int
    depth: float
    begin: int | None = None


class PassKeyPrompts:
    """Makes prompts with one tokenizer, from pieces that are encoded once.

    encode: text -> ids, without special tokens. begin: tokens in front of every prompt, such as a begin-of-text token.
    haystack: (b, n) -> n tokens of a text that keys are hidden in, (n,), from the sentence on that begins at its token
    b, and where in them sentences begin, (m,), of which the first is 0; None hides them in the paper's filler, at any
    token.
    """

    def __init__(
        self,
        encode: Callable[[str], Sequence[int]],
        begin: Sequence[int] = (),
        haystack: Callable[[int, int], tuple[np.ndarray, np.ndarray]] | None = None,
    ):
        self._encode, self._haystack = encode, haystack
        self._task = [*begin, *encode(f"{TASK}\n")]
        self._first, self._period = (np.asarray(encode(text), dtype=np.int64) for text in (FILLER, f" {FILLER}"))
        self._question = list(encode(f"\n{QUESTION}"))

    @property
    def shortest(self) -> int:
        """Tokens of a prompt without filler, enough for any key."""
        return len(self._task) + len(self._key_line(LARGEST_KEY)) + len(self._question)

    def make(self, length: int, key: int, depth: float, begin: int | None = None) -> PassKey:
        """A prompt of exactly `length` tokens, the line with the key behind a share `depth` (0 to 1) of the text around
        it: of a haystack in front of the nearest sentence, or at its end, where that is near (NEAR_TOKENS, NEAR_SHARE).
        begin: the haystack's token from which on that text is taken; None, and for the filler, its first.

        Raises LandmarkError where the length leaves no room for the line and the question.
        """
        key_line = self._key_line(key)
        filler = length - len(self._task) - len(key_line) - len(self._question)
        if filler < 0:
            raise LandmarkError(
                f"a pass-key prompt of {counted(length, 'token')} cannot be: without any filler it takes "
                f"{length - filler}; ask for a longer one"
            )
        before, after = self._around(filler, depth, begin or 0)
        parts = [self._task, before, key_line, after, self._question]
        return PassKey(np.concatenate([np.asarray(part, dtype=np.int64) for part in parts]), key, depth, begin)

    def _around(self, length: int, depth: float, begin: int) -> tuple[np.ndarray, np.ndarray]:
        """`length` tokens, those in front of the key's line and those behind it."""
        place = round(depth * length)
        if self._haystack is None:
            return self._filler(place), self._filler(length - place)
        text, sentences = self._haystack(begin, length)
        places = np.append(sentences, length)
        nearest = places[np.abs(places - place).argmin()]
        if abs(nearest - place) <= max(NEAR_TOKENS, NEAR_SHARE * length):
            place = nearest
        return text[:place], text[place:]

    def _key_line(self, key: int) -> list[int]:
        return list(self._encode(f"\n{KEY_LINE.format(key=key)}\n"))

    def _filler(self, length: int) -> np.ndarray:
        """The first `length` tokens of the filler repeated without end."""
        repeats = -(-max(0, length - len(self._first)) // len(self._period))
        return np.concatenate([self._first, np.tile(self._period, repeats)])[:length]


def random_key(generator: np.random.Generator) -> int:
    """A key from 1 to LARGEST_KEY, all alike likely."""
    return int(generator.integers(1, LARGEST_KEY + 1))


def passkey_corpus(
    tokenizer: TextTokenizer,
    *,
    documents: int = 2000,
    shortest: int = 256,
    longest: int = 4096,
    validation_share: float = 0.01,
    seed: int = 0,
) -> Corpus:
    """Documents that train the skill: prompts with the answer, `documents` of them.

    Their lengths are spread evenly on a logarithmic scale from `shortest` to `longest` tokens, the depths of their keys
    evenly from 0 to 1. Document i is a function of the seed and i alone.

    Raises UsageError for lengths that no prompt can have.
    """
    from landmark_cli.data.corpora import Corpus

    prompts = PassKeyPrompts(tokenizer.encode)
    answer = len(tokenizer.encode(ANSWER.format(key=LARGEST_KEY)))
    if not prompts.shortest + answer <= shortest <= longest:
        raise UsageError(
            f"pass-key documents of {shortest} to {counted(longest, 'token')} cannot be: the shortest takes "
            f"{prompts.shortest + answer}, and the longest must not be shorter than the shortest"
        )
    every = round(1 / validation_share) if validation_share else 0
    plan = [_draw(np.random.default_rng([seed, index]), shortest, longest) for index in range(documents)]

    def pieces(index: int, limit: int) -> Iterator[bytes]:
        length, key, depth = plan[index]
        prompt = prompts.make(length - answer, key, depth)
        text = tokenizer.decode(prompt.tokens) + ANSWER.format(key=key)
        yield from text_document(f"pass key {index}", text).pieces(limit)

    def all_documents() -> Iterator[tuple[str, Document]]:
        for index, (length, _, _) in enumerate(plan):
            split = "validation" if every and index % every == every // 2 else "train"
            yield split, Document(f"pass key {index}", length * TOKEN_BYTES, partial(pieces, index))

    return Corpus(
        "passkey",
        "pass keys hidden in filler",
        all_documents,
        sum(length for length, _, _ in plan) * TOKEN_BYTES,
        [documents, shortest, longest, validation_share, seed],
    )


def _draw(generator: np.random.Generator, shortest: int, longest: int) -> tuple[int, int, float]:
    """Length, key and depth of one document."""
    length = round(math.exp(generator.uniform(math.log(shortest), math.log(longest))))
    return length, random_key(generator), generator.random()
