"""hopper: kernels in Gluon for compute capability 9.0, for training."""

from __future__ import annotations

import functools
from types import ModuleType

from torch import Tensor

from ..kernels.hopper import support
from . import triton
from .backend import Backend
from .fallible import Fallible, or_else
from .problem import FEW_QUERIES, Problem, knows_no_other_logits, needs_the_definition

KERNELS = Fallible(support.compile_failure)


def is_hopper(device: str) -> bool:
    return support.is_hopper(device)


def why_not(problem: Problem) -> str | None:
    if problem.reading or problem.retrieving:
        return "retrieval has no Hopper kernels of its own"
    if problem.local:
        return "layers with a sliding window have no Hopper kernels of their own"
    reason = needs_the_definition(problem) or knows_no_other_logits("the Hopper kernels", problem)
    if reason is not None:
        return reason
    if problem.joint:
        return "joint asks for one softmax over all text, and the Hopper kernels know the grouped softmax alone"
    if problem.few_queries:
        return f"q has fewer than {FEW_QUERIES} tokens"
    if problem.padded or problem.packed:
        return "the Hopper kernels know neither padding nor packed documents"
    if problem.dropout:
        return "the Hopper kernels know no dropout"
    if not is_hopper(problem.device):
        return "the Hopper kernels need a GPU of compute capability 9.0"
    return support.why_not(problem.dtype, problem.head_dim, problem.block_size) or KERNELS.given_up


@functools.cache
def _launch() -> ModuleType:
    """The kernels' launches, imported where they are wanted: not every Triton has their language."""
    from ..kernels.hopper import launch

    return launch


def _launched(name: str, *arguments) -> tuple[Tensor, ...]:
    return getattr(_launch(), name)(*arguments)


def _forward(q: Tensor, k: Tensor, v: Tensor, sinks: None, block_size: int, scale: float, *_) -> tuple | None:
    return KERNELS.call(_launched, "forward", q, k, v, block_size, scale)


def _backward(dout, dlse, q, k, v, sinks: None, out, lse, block_size, scale, *_) -> tuple | None:
    found = KERNELS.call(_launched, "backward", dout, dlse, q, k, v, out, lse, block_size, scale)
    return None if found is None else (*found, None)


HOPPER = Backend(
    "hopper",
    is_hopper,
    why_not,
    "triton",
    or_else(_forward, triton.forward),
    or_else(_backward, triton.backward),
    tried=lambda problem: not problem.joint,
)
