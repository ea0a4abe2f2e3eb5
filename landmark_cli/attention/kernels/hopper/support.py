"""What the Hopper kernels can serve, and whether an error says that this Triton does not compile them."""

from __future__ import annotations

import functools
import inspect
import traceback

import torch

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128)
BLOCK_SIZES = range(16, 65)

# What a compiler that does not know this code raises; RuntimeErrors only with one of these words.
COMPILE_ERRORS = (AttributeError, TypeError, NotImplementedError, ImportError)
COMPILE_WORDS = ("PassManager", "ptxas", "MLIR", "translate")


@functools.cache
def is_hopper(device: str) -> bool:
    """Whether a device ("cuda:0"; of "cuda" alone, the current one) is a Hopper GPU; there may be others beside it."""
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


def why_not(dtype: torch.dtype, head_dim: int, block_size: int) -> str | None:
    """Why the Hopper kernels cannot serve, naming the argument and what is allowed; None if they can."""
    if dtype not in DTYPES:
        return f"q is {dtype}; the Hopper kernels take {' and '.join(map(str, DTYPES))}"
    if head_dim not in HEAD_DIMS:
        return f"q has head dim {head_dim}; the Hopper kernels take {' and '.join(map(str, HEAD_DIMS))}"
    if block_size not in BLOCK_SIZES:
        return f"block_size is {block_size}; the Hopper kernels take {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]}"
    return why_not_gluon()


@functools.cache
def why_not_gluon() -> str | None:
    """What the installed Triton lacks of Gluon, its language for such kernels, which still changes; None if nothing."""
    try:
        import triton
    except ImportError as error:
        return f"{error.name or 'triton'} is not installed"
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


def compile_failure(error: Exception) -> str | None:
    """That this Triton does not compile the kernels, if that is what a launch raised; None for any other error.

    The language that they are written in still changes, and not every change shows before a kernel is compiled. What
    code of our own raises is a fault of ours.
    """
    import triton
    from triton.errors import TritonError

    words = isinstance(error, RuntimeError) and any(word in str(error) for word in COMPILE_WORDS)
    compiler = (isinstance(error, COMPILE_ERRORS) or words) and not _is_ours(error)
    if not (isinstance(error, TritonError) or compiler):
        return None
    return f"Triton {triton.__version__} does not compile the Hopper kernels"


def _is_ours(error: Exception) -> bool:
    """Whether the code that raised it belongs to this package."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] == __name__.partition(".")[0]
