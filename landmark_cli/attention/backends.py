"""The backends of landmark attention: what each can serve, and how it attends, goes backward and reads.

`choose` asks them once for every call, in the order of BACKENDS. To add one: its kernels in a folder of their own under
kernels/, and an entry here.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..console import info, warn
from ..errors import LandmarkError, UsageError
from . import blockwise, retrieval, sdpa
from .cache import Chunk, LayerBlocks, LayerWindow
from .context_miss import attend_chunk_with_context_miss
from .kernels.hopper import support as hopper_support
from .kernels.training import support as training_support
from .retrieval import Read

# With fewer queries there is too little work for a kernel that keeps a multiprocessor to itself.
FEW_QUERIES = 256


class Problem(NamedTuple):
    """What attention is asked for, as far as it decides who can serve: constants, for torch.compile keeps the choice.

    device: "cuda:1", say. block_size: None where a mask makes blocks of any size. few_queries: under FEW_QUERIES; the
    length itself is not here, lest every length be compiled anew. padded, packed, dropout, context_miss, softcap,
    sinks: what else is given beside q, k and v. reading: through the block cache; differentiated: gradients are asked
    for. local: in a layer that keeps its sliding window, which has no blocks.
    retrieving: how many blocks the chunks of a training window read of those before them; 0: it is no such window.
    joint: in one softmax over the text of all blocks that are read, which their landmarks only choose.
    earlier_keys: k has more tokens than q. lse: the log-sum-exp is wanted too.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    block_size: int | None
    few_queries: bool = False
    padded: bool = False
    packed: bool = False
    dropout: bool = False
    context_miss: bool = False
    reading: bool = False
    differentiated: bool = False
    retrieving: int = 0
    softcap: bool = False
    sinks: bool = False
    local: bool = False
    joint: bool = False
    earlier_keys: bool = False
    lse: bool = False


@dataclass(frozen=True)
class Backend:
    """One way to compute landmark attention.

    meant_for: whether it is tried unasked on a device. why_not: why it cannot serve a problem, naming the argument and
    what is allowed; None if it can.
    forward, backward: of the operators (operators.py), whose arguments they take: (q, k, v, sinks, *settings) -> (out,
    lse) and (dout, dlse, q, k, v, sinks, out, lse, *settings) -> (dq, dk, dv, dsinks), sinks and their gradient being
    None where there are none. None: the definition, which autograd differentiates.
    reads_as: the name of the backend that reads, and that serves layers with a sliding window, where this one is asked
    for. read: attention of a chunk through the
    cache, (q, k, v, blocks, chunk, scale, context_miss_key, traced) -> Read, to which softcap and sinks come by name
    where there are some; None where another one reads.
    recorded: whether shapes of what it reads do not depend on what has been read, so that CUDA graphs can record it.
    stores_first: whether it stores a chunk before it reads, so that chunks that follow one another can be read side by
    side, as rows.
    retrieve_forward, retrieve_backward: of the operators of window_operators.py, whose arguments they take; None: the
    definition, or another one.
    local_forward, local_backward: of the operators of local_operators.py, whose arguments they take; None: the
    definition, or another one.
    local_read: attention of a chunk in a layer that holds text, (q, k, v, held, chunk, frequencies, scale, softcap,
    sinks) -> out, see local.attend_chunk; None: the definition.
    tried: whether it is tried unasked for a problem, on the devices it is meant for.
    """

    name: str
    meant_for: Callable[[str], bool]
    why_not: Callable[[Problem], str | None]
    reads_as: str
    forward: Callable[..., tuple[Tensor, Tensor]] | None = None
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]] | None = None
    read: Callable[..., Read] | None = None
    recorded: bool = False
    stores_first: bool = False
    retrieve_forward: Callable[..., tuple[Tensor, ...]] | None = None
    retrieve_backward: Callable[..., tuple[Tensor | None, ...]] | None = None
    local_forward: Callable[..., tuple[Tensor, Tensor | None]] | None = None
    local_backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]] | None = None
    local_read: Callable[..., Tensor] | None = None
    tried: Callable[[Problem], bool] = lambda problem: True


# --- eager: the definition


def _read_by_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: LayerBlocks,
    chunk: Chunk,
    scale: float | None,
    context_miss_key: Tensor | None,
    traced: bool,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Read:
    if context_miss_key is not None:
        return attend_chunk_with_context_miss(q, k, v, context_miss_key, blocks, chunk, scale)
    return retrieval.attend_chunk(q, k, v, blocks, chunk, scale, softcap, sinks)


# --- triton: portable kernels, for training and for reading


def _needs_the_definition(problem: Problem) -> str | None:
    """Why no kernel can serve."""
    if problem.block_size is None and not problem.local:
        return "landmark_mask makes blocks of any size"
    if problem.context_miss:
        return "context_miss_key gives the outer softmax a key of its own"
    if problem.reading and problem.differentiated:
        return "gradients are asked for"
    return None


def _knows_no_other_logits(who: str, problem: Problem) -> str | None:
    """Why one that knows neither soft caps nor sinks cannot serve."""
    if problem.softcap:
        return f"softcap bounds the logits, which {who} cannot"
    if problem.sinks:
        return f"sinks give the outer softmax logits of their own, which {who} cannot"
    return None


def _why_not_triton(problem: Problem) -> str | None:
    if (reason := _needs_the_definition(problem)) is not None:
        return reason
    kind = problem.device.partition(":")[0]
    try:
        from .kernels.common.configuration import INTERPRETED
    except ImportError as error:
        if kind != "cuda":
            return f"the Triton kernels need an NVIDIA GPU and q is on {kind}"
        return f"{error.name or 'triton'} is not installed"
    if kind != "cuda" and not (kind == "cpu" and INTERPRETED):
        return f"the Triton kernels need an NVIDIA GPU and q is on {kind}"
    block_size = None if problem.local else problem.block_size
    reason = training_support.why_not(problem.dtype, problem.head_dim, block_size)
    if reason is None and problem.retrieving:
        from .kernels.reading import window_support

        reason = window_support.why_not(problem.dtype, problem.head_dim, problem.block_size, problem.retrieving)
    return reason


@functools.cache
def _triton() -> ModuleType:
    """The kernels' launches, imported where they are wanted: not every machine has Triton."""
    from .kernels.training import launch

    return launch


def _triton_forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *settings) -> tuple[Tensor, Tensor]:
    launch = _triton()
    return launch.forward(q, k, v, launch.Layout(*settings), sinks)


def _triton_backward(dout, dlse, q, k, v, sinks, out, lse, *settings) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    launch = _triton()
    return launch.backward(dout, dlse, q, k, v, out, lse, launch.Layout(*settings), sinks)


def _triton_read(
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
    from .kernels import reading

    reason = reading.why_not(blocks.settings, scale, softcap)
    if reason is not None:
        raise LandmarkError(f"{reason}; or set LANDMARK_ATTENTION=eager, which is slow")
    return Read(*reading.attend_chunk(q, k, v, blocks, chunk, scale, traced, softcap, sinks))


@functools.cache
def _window() -> ModuleType:
    """The launches of the kernels that read a whole window, imported where they are wanted."""
    from .kernels.reading import window

    return window


def _triton_retrieve(q, k, v, own, own_lse, *window) -> tuple[Tensor, ...]:
    kernels = _window()
    out, lse, routes = kernels.forward(q, k, v, own, own_lse, kernels.Window(*window))
    return out, lse, *routes


def _triton_retrieve_backward(dout, dlse, q, k, v, out, lse, own, own_lse, turns, entries, bounds, *window):
    kernels = _window()
    routes, window = kernels.Routes(turns, entries, bounds), kernels.Window(*window)
    return kernels.backward(dout, dlse, q, k, v, out, lse, own, own_lse, routes, window)


@functools.cache
def _local() -> ModuleType:
    """The launches of the kernels of layers with a sliding window, imported where they are wanted."""
    from .kernels.local import launch

    return launch


def _triton_local(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *seen) -> tuple[Tensor, Tensor]:
    kernels = _local()
    return kernels.forward(q, k, v, kernels.Seen(*seen), sinks)


def _triton_local_backward(dout, q, k, v, sinks, out, lse, *seen) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    kernels = _local()
    return kernels.backward(dout, q, k, v, out, lse, kernels.Seen(*seen), sinks)


def _triton_local_read(q: Tensor, k: Tensor, v: Tensor, held: LayerWindow, chunk: Chunk, *given) -> Tensor:
    from .kernels.local import read

    return read.attend_chunk(q, k, v, held, chunk, *given)


# --- hopper: kernels in Gluon for compute capability 9.0, for training

# Why they were given up for the rest of the process, once they were.
_given_up: str | None = None


@functools.cache
def _hopper() -> ModuleType:
    """The kernels' launches, imported where they are wanted: not every Triton has their language."""
    from .kernels.hopper import launch

    return launch


def _is_hopper(device: str) -> bool:
    return hopper_support.is_hopper(device)


def _why_not_hopper(problem: Problem) -> str | None:
    if problem.reading or problem.retrieving:
        return "retrieval has no Hopper kernels of its own"
    if problem.local:
        return "layers with a sliding window have no Hopper kernels of their own"
    reason = _needs_the_definition(problem) or _knows_no_other_logits("the Hopper kernels", problem)
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
    if not _is_hopper(problem.device):
        return "the Hopper kernels need a GPU of compute capability 9.0"
    return hopper_support.why_not(problem.dtype, problem.head_dim, problem.block_size) or _given_up


def _hopper_forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: None, block_size: int, scale: float, *rest
) -> tuple[Tensor, Tensor]:
    found = _unless_given_up("forward", q, k, v, block_size, scale)
    return _triton_forward(q, k, v, sinks, block_size, scale, *rest) if found is None else found


def _hopper_backward(
    dout, dlse, q, k, v, sinks: None, out, lse, block_size, scale, *rest
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    found = _unless_given_up("backward", dout, dlse, q, k, v, out, lse, block_size, scale)
    if found is None:
        return _triton_backward(dout, dlse, q, k, v, sinks, out, lse, block_size, scale, *rest)
    return *found, None


def _unless_given_up(name: str, *arguments) -> tuple[Tensor, ...] | None:
    """What the Hopper kernels give; None where Triton cannot compile them, now and for the rest of the process."""
    global _given_up
    if _given_up is not None:
        return None
    try:
        return getattr(_hopper(), name)(*arguments)
    except Exception as error:
        reason = hopper_support.compile_failure(error)
        if reason is None:
            raise
        _given_up = reason
        warn(f"{reason}; the Triton kernels run instead")
        return None


# --- sdpa: PyTorch's own attention, whose kernels are a library's, for training

# Why it was given up on GPUs for the rest of the process, once it was.
_library_given_up: str | None = None


def _why_not_sdpa(problem: Problem) -> str | None:
    if problem.reading or problem.retrieving:
        return "PyTorch's attention retrieves no blocks"
    if problem.local:
        return "PyTorch's attention is not used in layers with a sliding window"
    reason = _needs_the_definition(problem) or _knows_no_other_logits("PyTorch's attention", problem)
    if reason is not None:
        return reason
    if not problem.joint:
        return "joint is not asked for, and PyTorch's attention knows no grouped softmax"
    if problem.padded or problem.packed:
        return "PyTorch's attention is used with neither padding nor packed documents"
    if problem.dropout:
        return "dropout_p is of the grouped softmax"
    if problem.earlier_keys:
        return "k has more tokens than q"
    if problem.lse:
        return "return_lse asks for what PyTorch's attention does not differentiate"
    kind = problem.device.partition(":")[0]
    reason = sdpa.why_not(kind, problem.dtype, problem.head_dim, problem.block_size)
    if reason is not None or kind == "cpu":
        return reason
    if problem.few_queries:
        return f"q has fewer than {FEW_QUERIES} tokens"
    # These attend for landmarks, and for all where the library cannot.
    return _why_not_triton(problem) or _library_given_up


def _sdpa_forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: None, block_size: int, scale: float, *rest
) -> tuple[Tensor, Tensor]:
    found = _unless_library_fails(sdpa.forward, q, k, v, block_size, scale)
    return _triton_forward(q, k, v, sinks, block_size, scale, *rest) if found is None else found


def _sdpa_backward(
    dout, dlse: None, q, k, v, sinks: None, out, lse, block_size, scale, *rest
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    # cuDNN adds up queries' gradients in any order, and has PyTorch know no other way.
    repeats = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    found = None
    if not (repeats and q.is_cuda):
        found = _unless_library_fails(sdpa.backward, dout, q, k, v, out, lse, block_size, scale)
    if found is None:
        return _triton_backward(dout, dlse, q, k, v, sinks, out, lse, block_size, scale, *rest)
    return *found, None


def _unless_library_fails(function: Callable, q: Tensor, *arguments) -> tuple[Tensor, ...] | None:
    """What a function of sdpa.py gives; None where the library cannot on this GPU, now and for the rest of the
    process."""
    global _library_given_up
    if _library_given_up is not None and q.is_cuda:
        return None
    try:
        return function(q, *arguments)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError as error:
        if not q.is_cuda:
            raise
        words = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        _library_given_up = f"cuDNN {torch.backends.cudnn.version()} does not attend here ({words})"
        warn(f"{_library_given_up}; the Triton kernels run instead")
        return None


# --- blockwise: plain PyTorch, made for a CPU, for reading


def _why_not_blockwise(problem: Problem) -> str | None:
    if problem.local:
        # A layer without blocks is computed by definition, whoever reads the others.
        return None
    if problem.block_size is None:
        return "landmark_mask makes blocks of any size"
    if not problem.reading:
        return "only reading is made block by block"
    if problem.differentiated:
        return "gradients are asked for"
    if problem.dtype == torch.float64:
        return "q is float64 and blocks are read in float32"
    return _knows_no_other_logits("reading block by block", problem)


# In the order in which they are tried; the last can serve everything.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "sdpa",
            # It was measured on no other GPU.
            lambda device: device.startswith("cpu") or _is_hopper(device),
            _why_not_sdpa,
            "triton",
            _sdpa_forward,
            _sdpa_backward,
            # On a GPU a library takes long before its first call with a new length; training windows are alike.
            tried=lambda problem: problem.joint and (problem.differentiated or problem.device.startswith("cpu")),
        ),
        Backend(
            "hopper",
            _is_hopper,
            _why_not_hopper,
            "triton",
            _hopper_forward,
            _hopper_backward,
            tried=lambda problem: not problem.joint,
        ),
        Backend(
            "triton",
            lambda device: device.startswith("cuda"),
            _why_not_triton,
            "triton",
            _triton_forward,
            _triton_backward,
            read=_triton_read,
            recorded=True,
            stores_first=True,
            retrieve_forward=_triton_retrieve,
            retrieve_backward=_triton_retrieve_backward,
            local_forward=_triton_local,
            local_backward=_triton_local_backward,
            local_read=_triton_local_read,
        ),
        Backend(
            "blockwise",
            lambda device: not device.startswith("cuda"),
            _why_not_blockwise,
            "blockwise",
            read=blockwise.attend_chunk,
        ),
        Backend(
            "eager",
            lambda device: True,
            lambda problem: None,
            "eager",
            read=_read_by_definition,
        ),
    )
}

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
        backend = BACKENDS[backend.reads_as]
    obstacle = backend.why_not(problem)
    if obstacle is not None:
        raise refusal(f'the backend "{backend.name}" was asked for, but {obstacle}; unasked, what can serve runs')
    return backend.name if problem.local else _announce(backend.name, "as asked for")


def _first_that_can(problem: Problem) -> str:
    kind = problem.device.partition(":")[0]
    obstacle = None
    for backend in BACKENDS.values():
        if not (backend.meant_for(problem.device) and backend.tried(problem)):
            continue
        before, obstacle = obstacle, backend.why_not(problem)
        # A model's layers with landmarks say who runs; who is chosen for the others hangs together with that.
        if obstacle is None and problem.local:
            return backend.name
        if obstacle is None:
            return _announce(backend.name, f"on {kind}; {before}" if before else f"on {kind}")
    raise AssertionError("the last backend serves everything")


@functools.cache
def _announce(name: str, reason: str) -> str:
    info(f"landmark attention: {name} ({reason})")
    return name
