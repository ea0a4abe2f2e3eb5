"""What every task of the benchmark can do."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np

from .encoding import PromptEncoder
from .haystacks import Prompt


class Task(ABC):
    """A task: makes prompts of any length, each a function of the seed, the sample's number and the length.

    A sample asks the same question at every length; only the haystack grows. name: the benchmark's. new_tokens: the
    answer's room, which lengths count. any_of: whether one of the references is enough, as they are spellings of one
    answer. rules_from: the lengths from which on prompts are made by other rules. identity: what else has to be the
    same for the prompts to be the same (JSON). repeated: whether a prompt so far was longer than the task's own text,
    so that some of it stands there several times.
    """

    rules_from: ClassVar[tuple[int, ...]] = (0,)
    any_of: ClassVar[bool] = False
    identity: Any = None
    repeated: bool = False

    def __init__(self, name: str, new_tokens: int, encoder: PromptEncoder, seed: int):
        self.name, self.new_tokens = name, new_tokens
        self.encoder = encoder
        self._seed = [seed, zlib.crc32(name.encode())]

    @abstractmethod
    def make(self, sample: int, length: int) -> Prompt:
        """The prompt of a sample, of `length - new_tokens` tokens exactly. Raises TooShort."""

    def generator(self, sample: int, part: int = 0) -> np.random.Generator:
        """The random numbers of a sample, the same at every length. part: tells further ones apart from these."""
        return np.random.default_rng([*self._seed, sample, part])
