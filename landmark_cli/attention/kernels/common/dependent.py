"""Programmatic dependent launch: a kernel is brought up while the one before it in the stream still runs.

A decoding step is hundreds of kernels of a few microseconds, and between one's end and the next one's begin another
goes by. On GPUs of compute capability 9 and later a kernel may be launched before: it says itself from where on it
needs what the kernels before it have done. In a CUDA graph that is recorded of such launches it is the same.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor
from triton import language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Set to False where launches are compared with those that wait for the kernel before to end.
enabled = False


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until the kernel before has ended and what it wrote can be read; the next one may be brought up meanwhile.

    Every program of a kernel that is launched with `dependent_launch` calls it before it touches what another kernel
    of a step writes or reads: since each kernel waits for the one before it, all earlier ones have ended then too.
    What comes before it in the source reads weights at most.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


def dependent_launch(x: Tensor) -> dict[str, bool]:
    """What a kernel with `wait_for_previous` is launched with on x's device, its constant PDL included."""
    return {"PDL": True, "launch_pdl": True} if launches_early(x.device) else {"PDL": False}


def launches_early(device: torch.device) -> bool:
    """Whether kernels are launched so on a device."""
    return enabled and device.type == "cuda" and _can(device)


@functools.cache
def _can(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device)[0] >= 9
