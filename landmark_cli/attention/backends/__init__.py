"""The backends of landmark attention: what each can serve, and how it attends, goes backward and reads.

`choose` asks them once for every call, in the order of BACKENDS. To add one: its kernels in a folder of their own under
kernels/, a file here that says all of it, and its line in BACKENDS.
"""

from __future__ import annotations

import functools
import os

import torch

from ...console import info
from ...errors import UsageError
from .backend import Backend
from .blockwise import BLOCKWISE
from .eager import EAGER
from .hopper import HOPPER
from .problem import FEW_QUERIES, Problem
from .sdpa import SDPA
from .triton import TRITON

__all__ = ["BACKENDS", "FEW_QUERIES", "FORMER_NAMES", "Backend", "Problem", "choose"]

# In the order in which they are tried; the last can serve everything.
BACKENDS = {backend.name: backend for backend in (SDPA, HOPPER, TRITON, BLOCKWISE, EAGER)}

# What a backend was called once.
FORMER_NAMES = {"fused": "triton"}


def choose(problem: Problem, requested: str | None = None) -> str:
    """The name of the first backend that is meant for the device and can serve; the user is told once.

    requested, or else the environment's LANDMARK_ATTENTION: the name of one, to have that. Of one that does not read
    through the cache the one that reads for it.

    Raises ValueError where what is asked for cannot serve, naming the argument, or where no such name exists, and
    UsageError where it is the environment that asks.
    """
    return _choose(requested, *problem)


@torch.compiler.assume_constant_result
def _choose(requested: str | None, *constants) -> str:
    """What torch.compile calls while it compiles: it knows constants, not tuples that have names."""
    problem = Problem(*constants)
    environment = None if requested else os.environ.get("LANDMARK_ATTENTION")
    requested = requested or environment or None
    if requested is None:
        return _first_that_can(problem)

    def refusal(message: str) -> Exception:
        return UsageError(f"LANDMARK_ATTENTION={environment}: {message}") if environment else ValueError(message)

    backend = BACKENDS.get(FORMER_NAMES.get(requested, requested))
    if backend is None:
        names = ", ".join(f'"{name}"' for name in BACKENDS)
        raise refusal(f"landmark attention has the backends {names}; {requested!r} was asked for")
    if problem.reading or problem.retrieving or problem.local:
        if backend.reads_as is None:
            return _first_that_can(problem)
        backend = BACKENDS[backend.reads_as]
    obstacle = backend.why_not(problem)
    if obstacle is not None:
        raise refusal(f'the backend "{backend.name}" was asked for, but {obstacle}; unasked, what can serve runs')
    return backend.name if problem.local else _announce(backend.name, "as asked for")


def _first_that_can(problem: Problem) -> str:
    obstacle = None
    for backend in BACKENDS.values():
        if not (backend.meant_for(problem.device) and backend.tried(problem)):
            continue
        before, obstacle = obstacle, backend.why_not(problem)
        # A model's layers with landmarks say who runs; who is chosen for the others hangs together with that.
        if obstacle is None and problem.local:
            return backend.name
        if obstacle is None:
            return _announce(backend.name, f"on {problem.kind}; {before}" if before else f"on {problem.kind}")
    raise AssertionError("the last backend serves everything")


@functools.cache
def _announce(name: str, reason: str) -> str:
    info(f"landmark attention: {name} ({reason})")
    return name
