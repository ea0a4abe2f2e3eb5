"""Loss and gradient of a piece of logits in one kernel: the twin of linear_cross_entropy.score_and_differentiate."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from landmark_cli.attention.kernels.common.launch import on_device
from landmark_cli.data.landmarks import IGNORED_TARGET


@triton.jit
def log_sum_exp(LOGITS, vocabulary, COLS: tl.constexpr, DEPTH: tl.constexpr, scale=None):
    """Of one row of logits, each times `scale` where that is given."""
    column = tl.arange(0, DEPTH)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    # A running maximum and sum in every column, put together at the end: inside the loop no thread waits for another.
    top = tl.full([COLS], float("-inf"), tl.float32)
    total = tl.zeros([COLS], tl.float32)
    for first in range(0, vocabulary, DEPTH * COLS):
        x = tl.load(LOGITS + first + column, mask=first + column < vocabulary, other=float("-inf")).to(tl.float32)
        if scale is not None:
            x *= scale
        higher = tl.maximum(top, tl.max(x, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift[None, :]), 0)
        top = higher
    highest = tl.max(top, 0)
    return highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))


@triton.jit
def score_kernel(LOGITS, TARGETS, LOSSES, stride, vocabulary, IGNORED: tl.constexpr, COLS: tl.constexpr,
                 DEPTH: tl.constexpr, WEIGHTS=None):  # fmt: skip
    """Program (row). What the second loop reads again is still in the L2 cache. A step takes DEPTH x COLS logits, of
    which a thread holds whole columns. Without WEIGHTS, nothing of what they need is compiled."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(TARGETS + row)
    if WEIGHTS is not None:
        weight = tl.load(WEIGHTS + row)
        target = tl.where(weight == 0.0, IGNORED, target)
    logits = LOGITS + row * stride
    column = tl.arange(0, DEPTH)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    if target == IGNORED:
        zeros = tl.zeros([DEPTH, COLS], LOGITS.dtype.element_ty)
        for first in range(0, vocabulary, DEPTH * COLS):
            tl.store(logits + first + column, zeros, mask=first + column < vocabulary)
        tl.store(LOSSES + row, 0.0)
        return
    wanted = tl.load(logits + target).to(tl.float32)
    normalizer = log_sum_exp(logits, vocabulary, COLS, DEPTH)
    if WEIGHTS is None:
        tl.store(LOSSES + row, normalizer - wanted)
    else:
        tl.store(LOSSES + row, (normalizer - wanted) * weight)
    for first in range(0, vocabulary, DEPTH * COLS):
        mask = first + column < vocabulary
        x = tl.load(logits + first + column, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.exp(x - normalizer) - tl.where(first + column == target, 1.0, 0.0)
        if WEIGHTS is not None:
            gradient *= weight
        tl.store(logits + first + column, gradient.to(LOGITS.dtype.element_ty), mask=mask)


def score_and_differentiate(logits: Tensor, targets: Tensor, losses: Tensor, weights: Tensor | None = None) -> None:
    """See linear_cross_entropy.score_and_differentiate; logits with a dense last dimension."""
    rows, vocabulary = logits.shape
    steps = depth(vocabulary * logits.element_size(), logits.device)
    with on_device(logits):
        score_kernel[(rows,)](
            logits, targets, losses, logits.stride(0), vocabulary, IGNORED=IGNORED_TARGET,
            COLS=min(4096, triton.next_power_of_2(vocabulary)), DEPTH=steps, WEIGHTS=weights,
            num_warps=16,
        )  # fmt: skip


@functools.cache
def depth(row_bytes: int, device: torch.device) -> int:
    """The DEPTH of the kernel's steps, so that the rows at work stay in the L2 cache: with so many threads to a row,
    registers allow a multiprocessor 3 rows at a depth of 2 and 2 at a depth of 4."""
    if device.type != "cuda":
        return 2
    chip = torch.cuda.get_device_properties(device)
    at_work = 3 * chip.multi_processor_count * row_bytes
    # With GPT-2's vocabulary in 16 bits 40 MB are at work: with an H100's cache of 52 MB a depth of 4 is faster by 11%,
    # with an H200's of 63 MB a depth of 2 by 8%.
    return 2 if at_work <= 0.75 * chip.L2_cache_size else 4
