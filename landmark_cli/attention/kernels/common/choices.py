"""Configurations of a kernel, of which the first that fits, or the fastest, runs."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import triton
from triton.runtime.errors import OutOfResources

from .configuration import Configuration

Result = TypeVar("Result")

# Whether the first call for a kind of input tunes, and how many configurations it tries: some seconds each kernel.
TUNE = os.environ.get("LANDMARK_ATTENTION_TUNE") == "1"
TRIED = 4


class Choices:
    """Configurations of one kernel for one kind of input, the one to run first."""

    def __init__(self, configurations: Iterable[Configuration]) -> None:
        self.configurations = list(configurations)
        self.tuned = not TUNE

    def run(self, launch: Callable[[Configuration], Result], *, repeatable: bool = True) -> Result:
        """Launch with the first configuration that the GPU has room for; those before it are not tried again.

        With LANDMARK_ATTENTION_TUNE=1 the first call times a few and puts the fastest in front, unless it is captured
        into a CUDA graph or, not being repeatable, adds to what is there.
        """
        if not self.tuned and repeatable and not torch.cuda.is_current_stream_capturing():
            self.tuned = True
            self.configurations.sort(key=functools.partial(self._milliseconds, launch, self.configurations[:TRIED]))
        while True:
            try:
                return launch(self.configurations[0])
            except OutOfResources:
                if len(self.configurations) == 1:
                    raise
                del self.configurations[0]

    @staticmethod
    def _milliseconds(launch: Callable, tried: list[Configuration], configuration: Configuration) -> float:
        if configuration not in tried:
            return math.inf
        try:
            launch(configuration)
            return triton.testing.do_bench(lambda: launch(configuration), warmup=5, rep=20, return_mode="median")
        except OutOfResources:
            return math.inf
