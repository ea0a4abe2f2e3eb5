"""The words that the benchmark hides and lists: those of the package wonderwords, which the extra `ruler` brings."""

from __future__ import annotations

import functools

import numpy as np

from landmark_cli.errors import import_extra


@functools.cache
def _words(category: str) -> tuple[str, ...]:
    """The words of a kind ("noun", "adjective", "verb"). Raises LandmarkError where the package is missing."""
    wonderwords = import_extra("wonderwords", "ruler")
    return tuple(sorted(set(wonderwords.RandomWord().filter(include_categories=[category]))))


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """All nouns, adjectives and verbs, some 8 thousand. Raises as `pair` does."""
    return tuple(sorted({*_words("noun"), *_words("adjective"), *_words("verb")}))


def pair(generator: np.random.Generator) -> str:
    """An adjective and a noun, such as "wandering-lantern"; some 6 million pairs, all alike likely.

    Raises LandmarkError where the package wonderwords is missing.
    """
    adjectives, nouns = _words("adjective"), _words("noun")
    return f"{adjectives[generator.integers(len(adjectives))]}-{nouns[generator.integers(len(nouns))]}"
