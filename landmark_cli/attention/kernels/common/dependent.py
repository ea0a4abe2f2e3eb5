"""Programmatic dependent launch: a kernel is brought up while the one before it in the stream still runs.

A product of few rows reads a weight that nothing writes, and can begin to while what it is multiplied with is still
being made. It is launched before that has ended, and says itself from where on it needs it; the kernel before says
when. In a CUDA graph that is recorded of such launches it is the same. Kernels that have nothing to read before they
wait are launched as usual: waiting takes them longer than being launched. What is gained is in
benchmarks/results/quantization-h200.md.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor
from triton import language as tl
from triton.language.extra import cuda

# Not every build of Triton has them: where one is None, no kernel is launched that would call it.
gdc_launch_dependents, gdc_wait = (getattr(cuda, f"gdc_{name}", None) for name in ("launch_dependents", "wait"))

# While it is False every kernel waits for the one before it to end. Whoever compares the two sets it before a process
# has launched or recorded anything.
enabled = True


@triton.jit
def let_next_begin(PDL: tl.constexpr):
    """The next kernel, if it is launched with `dependent_launch`, is brought up once all programs have come here."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until the kernel before has ended and what it wrote can be read.

    Every program of a kernel that is launched with `dependent_launch` calls it before it touches what another kernel
    of a step writes or reads: since each kernel begins or waits behind the one before it, all earlier ones have ended
    then too. What comes before it in the source reads weights at most.
    """
    if PDL:
        gdc_wait()


def dependent_launch(x: Tensor) -> dict[str, bool]:
    """What a kernel with `wait_for_previous` is launched with on x's device, its constant PDL included."""
    return {"PDL": True, "launch_pdl": True} if enabled and brings_up_early(x.device) else {"PDL": False}


def announcing(x: Tensor) -> dict[str, bool]:
    """What a kernel with `let_next_begin` is launched with: its constant PDL."""
    return {"PDL": enabled and brings_up_early(x.device)}


@functools.cache
def brings_up_early(device: torch.device) -> bool:
    """Whether a device can, and has been found the faster for it: later ones than of compute capability 9 can too, and
    have not been tried."""
    if device.type != "cuda" or torch.version.cuda is None or None in (gdc_launch_dependents, gdc_wait):
        return False
    return torch.cuda.get_device_capability(device)[0] == 9
