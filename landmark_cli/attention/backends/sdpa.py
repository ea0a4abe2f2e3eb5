"""sdpa: PyTorch's own attention (attention/sdpa.py), whose kernels are a library's, for training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import sdpa
from . import triton
from .backend import Backend
from .fallible import Fallible, or_else
from .hopper import is_hopper
from .problem import FEW_QUERIES, Problem, knows_no_other_logits, needs_the_definition


def _failure(error: Exception) -> str | None:
    """That the library does not attend on this GPU, if that is why a call raised an error; None for any other error."""
    if not isinstance(error, RuntimeError) or isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
        return None
    return f"cuDNN {torch.backends.cudnn.version()} does not attend here"


# On GPUs; a CPU has nothing else in its place.
LIBRARY = Fallible(_failure)


def why_not(problem: Problem) -> str | None:
    if problem.reading or problem.retrieving:
        return "PyTorch's attention retrieves no blocks"
    if problem.local:
        return "PyTorch's attention is not used in layers with a sliding window"
    reason = needs_the_definition(problem) or knows_no_other_logits("PyTorch's attention", problem)
    if reason is not None:
        return reason
    if not problem.joint:
        return "joint is not asked for, and PyTorch's attention knows no grouped softmax"
    if problem.padded:
        return "PyTorch's attention is used without padding"
    if problem.packed and problem.kind != "cpu":
        return "PyTorch's attention is used with packed documents on a CPU alone"
    if problem.dropout:
        return "dropout_p is of the grouped softmax"
    if problem.earlier_keys:
        return "k has more tokens than q"
    if problem.lse:
        return "return_lse asks for what PyTorch's attention does not differentiate"
    reason = sdpa.why_not(problem.kind, problem.dtype, problem.head_dim, problem.block_size)
    if reason is not None or problem.kind == "cpu":
        return reason
    if problem.few_queries:
        return f"q has fewer than {FEW_QUERIES} tokens"
    # These attend for landmarks, and for all where the library cannot.
    return triton.why_not(problem) or LIBRARY.given_up


def _by_the_library(function: Callable, q: Tensor, *arguments) -> tuple[Tensor, ...] | None:
    """What a function of attention/sdpa.py gives; None where the library cannot on this GPU."""
    return LIBRARY.call(function, q, *arguments) if q.is_cuda else function(q, *arguments)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: None, block_size: int, scale: float, start: None, cu_seqlens, *_
) -> tuple | None:
    return _by_the_library(sdpa.forward, q, k, v, block_size, scale, cu_seqlens)


def _backward(
    dout, dlse: None, q, k, v, sinks: None, out, lse, block_size, scale, start: None, cu_seqlens, *_
) -> tuple | None:
    # cuDNN adds up queries' gradients in any order, and has PyTorch know no other way.
    repeats = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    if repeats and q.is_cuda:
        return None
    found = _by_the_library(sdpa.backward, dout, q, k, v, out, lse, block_size, scale, cu_seqlens)
    return None if found is None else (*found, None)


SDPA = Backend(
    "sdpa",
    # It was measured on no other GPU.
    lambda device: device.startswith("cpu") or is_hopper(device),
    why_not,
    None,
    or_else(_forward, triton.forward),
    or_else(_backward, triton.backward),
    # On a GPU a library takes long before its first call with a new length; training windows are alike.
    tried=lambda problem: problem.joint and (problem.differentiated or problem.kind == "cpu"),
)
