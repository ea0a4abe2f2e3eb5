"""Whether the Hopper kernels can serve, and what to do where this Triton turns out not to compile them."""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from landmark_cli.console import warn

Result = TypeVar("Result")

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128)
BLOCK_SIZES = range(16, 65)

# What a compiler that does not know this code raises; RuntimeErrors only with one of these words.
COMPILE_ERRORS = (AttributeError, TypeError, NotImplementedError, ImportError)
COMPILE_WORDS = ("PassManager", "ptxas", "MLIR", "translate")

# With fewer queries there is too little work for a kernel that keeps a multiprocessor to itself.
LEAST_QUERIES = 256


@torch.compiler.assume_constant_result
def why_not(device: str, dtype: torch.dtype, head_dim: int, block_size: int) -> str | None:
    """Why the Hopper kernels cannot serve, naming the argument and what is allowed; None if they can.

    device: "cuda:0", say; of "cuda" alone, the current one.
    """
    if not is_hopper(device):
        return "the Hopper kernels need a GPU of compute capability 9.0"
    if dtype not in DTYPES:
        return f"q is {dtype}; the Hopper kernels take {' and '.join(map(str, DTYPES))}"
    if head_dim not in HEAD_DIMS:
        return f"q has head dim {head_dim}; the Hopper kernels take {' and '.join(map(str, HEAD_DIMS))}"
    if block_size not in BLOCK_SIZES:
        return f"block_size is {block_size}; the Hopper kernels take {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]}"
    return _failure or why_not_gluon()


# Why they were given up, once they were.
_failure: str | None = None


def run(launch: Callable[[], Result]) -> Result | None:
    """What a launch of theirs returns; None where Triton cannot compile it, now and for the rest of the process.

    The language that they are written in still changes, and not every change shows before a kernel is compiled.
    """
    global _failure
    if _failure is not None:
        return None
    try:
        return launch()
    except Exception as error:
        if not _is_compile_error(error):
            raise
        import triton

        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        _failure = f"Triton {triton.__version__} does not compile the Hopper kernels ({reason})"
        warn(f"{_failure}; the portable kernels run instead")
        return None


def _is_compile_error(error: Exception) -> bool:
    """Whether it is Triton that fails at compiling; what code of our own raises is a fault of ours."""
    from triton.errors import TritonError

    if isinstance(error, TritonError) or _is_ours(error):
        return isinstance(error, TritonError)
    return isinstance(error, COMPILE_ERRORS) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in COMPILE_WORDS)
    )


def _is_ours(error: Exception) -> bool:
    """Whether the code that raised it belongs to this package."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] == __name__.partition(".")[0]


def why_not_for(queries: int, start: Tensor | None, cu_seqlens: Tensor | None, dropout_p: float) -> str | None:
    """Why they cannot serve a call; its length is not in the answer, which torch.compile may keep for all lengths."""
    if queries < LEAST_QUERIES:
        return f"q has fewer than {LEAST_QUERIES} tokens"
    if start is not None or cu_seqlens is not None:
        return "the Hopper kernels know neither padding nor packed documents"
    return "the Hopper kernels know no dropout" if dropout_p else None


@functools.cache
def is_hopper(device: str) -> bool:
    """Whether a device is a Hopper GPU; a machine may have others beside it."""
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def why_not_gluon() -> str | None:
    """What the installed Triton lacks of Gluon, its language for such kernels, which still changes; None if nothing."""
    import triton

    try:
        from . import launch

        lacks = _missing(launch.gl)
    except (ImportError, AttributeError, TypeError) as error:
        lacks = str(error)
    return (
        None
        if lacks is None
        else f"the Gluon of Triton {triton.__version__} is not as the Hopper kernels know it: {lacks}"
    )


def _missing(gl) -> str | None:
    """The first thing that the kernels call and that is not there, or not with these parameters."""
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    called = {
        gl.warp_specialize: "functions_and_args worker_num_warps worker_num_regs",
        gl.allocate_shared_memory: "element_ty shape layout",
        gl.inline_asm_elementwise: "asm constraints args dtype is_pure pack",
        gl.NVMMADistributedLayout: "version warps_per_cta instr_shape",
        mbarrier.init: "mbarrier count",
        mbarrier.expect: "mbarrier",
        mbarrier.arrive: "mbarrier count pred",
        mbarrier.wait: "mbarrier phase pred",
        tma.async_copy_global_to_shared: "tensor_desc coord barrier result",
        tma.async_copy_shared_to_global: "tensor_desc coord src",
        tma.store_wait: "pendings",
        warpgroup_mma: "a b acc use_acc is_async",
        warpgroup_mma_wait: "num_outstanding deps",
        TensorDescriptor: "base shape strides block_shape layout",
    }
    for function, parameters in called.items():
        found = inspect.signature(function).parameters
        for name in parameters.split():
            if name not in found:
                return f"{function.__name__} has no {name}"
    return None
