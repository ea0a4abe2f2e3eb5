"""Pass keys: can a model find a number that stands somewhere in a long text? Source: arXiv 2305.16300, section 4.2."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from landmark_cli.console import progress
from landmark_cli.data.passkey import PassKey, PassKeyPrompts, random_key
from landmark_cli.data.pretrained_tokenizers import begin_ids, text_ids
from landmark_cli.evaluation.prompts import PromptReaders
from landmark_cli.evaluation.ruler.haystacks import Prose
from landmark_cli.inference.generation import generate
from landmark_cli.inference.readers import BaseReader
from landmark_cli.inference.settings import ReadingSettings, SamplingSettings

# Room for five digits, each a token of its own, and the space before and the full stop behind them.
ANSWER = SamplingSettings(max_new_tokens=8, temperature=0.0)
DEPTH_BINS = 10


@dataclass(frozen=True)
class Trial:
    """One prompt and what the model answered. length: of the prompt, in text tokens. depth: of the key, 0 to 1. begin:
    the token of the prose at which its stretch begins; None in the paper's filler."""

    length: int
    depth: float
    key: int
    answer: str
    begin: int | None = None

    @property
    def found(self) -> bool:
        """Whether the first number of the answer is the key."""
        number = re.search(r"\d+", self.answer)
        return number is not None and int(number.group()) == self.key


@dataclass(frozen=True)
class Cell:
    """Prompts of one length (and of one depth or range of depths), and how many keys were found in them."""

    prompts: int
    found: int

    @property
    def accuracy(self) -> float:
        return self.found / self.prompts if self.prompts else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.found, self.prompts)


@dataclass(frozen=True)
class PassKeyResult:
    """All trials, by length and by depth.

    grid: the depths that were asked for; None where depths were drawn evenly, which are counted in DEPTH_BINS ranges.
    """

    trials: list[Trial]
    grid: list[float] | None

    @property
    def lengths(self) -> list[int]:
        return sorted({trial.length for trial in self.trials})

    @property
    def depths(self) -> list[tuple[float, float]]:
        """The rows of the heat map: (from, to) a depth, twice the same depth on a grid."""
        if self.grid is not None:
            return [(depth, depth) for depth in self.grid]
        return [(row / DEPTH_BINS, (row + 1) / DEPTH_BINS) for row in range(DEPTH_BINS)]

    def cell(self, length: int, depths: tuple[float, float] = (0.0, 1.0)) -> Cell:
        """The trials of a length whose depth lies in a range; the end of the range is part of it where it is 1 or
        equals the beginning."""
        low, high = depths
        inside = [
            trial
            for trial in self.trials
            if trial.length == length and (low <= trial.depth < high or trial.depth == high in (low, 1.0))
        ]
        return Cell(len(inside), sum(trial.found for trial in inside))


def evaluate_passkey(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    *,
    prompts: int = 10,
    depths: int | None = None,
    reading: ReadingSettings | None = None,
    full_attention: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
    prose: Prose | None = None,
) -> PassKeyResult:
    """Hide keys in prompts of these lengths (text tokens, the question included) and ask the model for them, greedily.

    prompts: how many of each length, their depths drawn evenly from 0 to 1; with `depths`, how many of each length at
    each of that many depths, evenly from 0 to 1. full_attention: read without landmarks and retrieval, by the attention
    and key/value cache that the model has of itself; the trained length is no bound then. batch_size: prompts read at a
    time; by default as many as fit, and fewer once memory runs out. prose: what keys are hidden in, in place of the
    paper's filler; every prompt has a stretch of its own, from a sentence on that is drawn.

    A trial depends only on the seed, its length and its number, and on the prose.

    Raises LandmarkError for a length that is too short.
    """
    maker = prompt_maker(tokenizer, prose)
    grid = None if depths is None else np.linspace(0.0, 1.0, depths).tolist() if depths > 1 else [0.5]
    plan = {length: list(_plan(maker, length, prompts, grid, seed, prose)) for length in sorted(set(lengths))}
    readers = PromptReaders(model, reading or ReadingSettings(), full_attention, batch_size)
    trials: list[Trial] = []
    with progress("pass keys", sum(length * len(keys) for length, keys in plan.items()), "tokens") as shown:
        for length, keys in plan.items():
            made = (maker.make(length, *drawn) for drawn in keys)
            for batch, of_batch in readers.ask(made, length + ANSWER.max_new_tokens, partial(_ask, model, tokenizer)):
                trials += of_batch
                found = sum(trial.found for trial in trials)
                shown.advance(length * len(batch), length=length, found=f"{found} of {len(trials)}")
    return PassKeyResult(trials, grid)


def prompt_maker(tokenizer: PreTrainedTokenizerBase, prose: Prose | None = None) -> PassKeyPrompts:
    """Makes prompts that begin with what the tokenizer puts in front of a text by itself, such as a begin-of-text
    token. prose: see `evaluate_passkey`."""
    haystack = None if prose is None else lambda begin, tokens: prose.units(begin).take(tokens)
    return PassKeyPrompts(partial(text_ids, tokenizer), begin_ids(tokenizer), haystack)


def wilson_interval(found: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 % by default; (0, 1) without trials.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    if trials == 0:
        return 0.0, 1.0
    share, spread = found / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    # The bounds 0 and 1 are exact, where rounding would miss them by a little.
    return (centre - half if found else 0.0), (centre + half if found < trials else 1.0)


def _plan(
    maker: PassKeyPrompts, length: int, prompts: int, grid: list[float] | None, seed: int, prose: Prose | None
) -> Iterator[tuple[int, float, int | None]]:
    """Key, depth and, in prose, the beginning of its stretch, of each prompt of one length."""
    # A prompt is made here, so that the user hears of a length that is too short before any work.
    maker.make(length, 1, 0.0)
    for number in range(prompts * len(grid or [0.0])):
        generator = np.random.default_rng([seed, length, number])
        key, depth = random_key(generator), float(generator.random())
        # Last, so that keys and depths are the same in every haystack.
        begin = None if prose is None else prose.draw(generator)
        yield key, depth if grid is None else grid[number // prompts], begin


def _ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: list[PassKey], reader: BaseReader
) -> list[Trial]:
    answers = generate(model, tokenizer, [prompt.tokens for prompt in batch], ANSWER, reader=reader)
    pairs = zip(batch, answers, strict=True)
    return [Trial(len(prompt.tokens), prompt.depth, prompt.key, answer.text, prompt.begin) for prompt, answer in pairs]
