"""triton: portable kernels, for training and for reading. What launches them is imported where it is wanted, for not
every machine has Triton."""

from __future__ import annotations

import functools
from types import ModuleType

from torch import Tensor

from ...errors import LandmarkError
from ..cache import Chunk, LayerBlocks, LayerWindow
from ..kernels.training import support
from ..retrieval import Read
from .backend import Backend
from .problem import Problem, needs_the_definition


def why_not(problem: Problem) -> str | None:
    if (reason := needs_the_definition(problem)) is not None:
        return reason
    try:
        from ..kernels.common.configuration import INTERPRETED
    except ImportError as error:
        if problem.kind != "cuda":
            return f"the Triton kernels need an NVIDIA GPU and q is on {problem.kind}"
        return f"{error.name or 'triton'} is not installed"
    if problem.kind != "cuda" and not (problem.kind == "cpu" and INTERPRETED):
        return f"the Triton kernels need an NVIDIA GPU and q is on {problem.kind}"
    block_size = None if problem.local else problem.block_size
    reason = support.why_not(problem.dtype, problem.head_dim, block_size)
    if reason is None and problem.retrieving:
        from ..kernels.reading import window_support

        reason = window_support.why_not(problem.dtype, problem.head_dim, problem.block_size, problem.retrieving)
    return reason


# --- a whole input


@functools.cache
def _training() -> ModuleType:
    from ..kernels.training import launch

    return launch


def forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *settings) -> tuple[Tensor, Tensor]:
    launch = _training()
    return launch.forward(q, k, v, launch.Layout(*settings), sinks)


def backward(dout, dlse, q, k, v, sinks, out, lse, *settings) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    launch = _training()
    return launch.backward(dout, dlse, q, k, v, out, lse, launch.Layout(*settings), sinks)


# --- a chunk, through the block cache


def _read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: LayerBlocks,
    chunk: Chunk,
    scale: float | None,
    context_miss_key: None,
    traced: bool,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Read:
    from ..kernels import reading

    reason = reading.why_not(blocks.settings, scale, softcap)
    if reason is not None:
        raise LandmarkError(f"{reason}; or set LANDMARK_ATTENTION=eager, which is slow")
    return Read(*reading.attend_chunk(q, k, v, blocks, chunk, scale, traced, softcap, sinks))


# --- what the chunks of a training window retrieve


@functools.cache
def _window() -> ModuleType:
    from ..kernels.reading import window

    return window


def _retrieve_forward(q, k, v, own, own_lse, *window) -> tuple[Tensor, ...]:
    kernels = _window()
    out, lse, routes = kernels.forward(q, k, v, own, own_lse, kernels.Window(*window))
    return out, lse, *routes


def _retrieve_backward(dout, dlse, q, k, v, out, lse, own, own_lse, turns, entries, bounds, *window):
    kernels = _window()
    routes, window = kernels.Routes(turns, entries, bounds), kernels.Window(*window)
    return kernels.backward(dout, dlse, q, k, v, out, lse, own, own_lse, routes, window)


# --- layers with a sliding window


@functools.cache
def _local() -> ModuleType:
    from ..kernels.local import launch

    return launch


def _local_forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *seen) -> tuple[Tensor, Tensor]:
    kernels = _local()
    return kernels.forward(q, k, v, kernels.Seen(*seen), sinks)


def _local_backward(dout, q, k, v, sinks, out, lse, *seen) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    kernels = _local()
    return kernels.backward(dout, q, k, v, out, lse, kernels.Seen(*seen), sinks)


def _local_read(q: Tensor, k: Tensor, v: Tensor, held: LayerWindow, chunk: Chunk, *given) -> Tensor:
    from ..kernels.local import read

    return read.attend_chunk(q, k, v, held, chunk, *given)


TRITON = Backend(
    "triton",
    lambda device: device.startswith("cuda"),
    why_not,
    "triton",
    forward,
    backward,
    read=_read,
    recorded=True,
    stores_first=True,
    retrieve_forward=_retrieve_forward,
    retrieve_backward=_retrieve_backward,
    local_forward=_local_forward,
    local_backward=_local_backward,
    local_read=_local_read,
)
