"""Loss and gradient of a piece of logits beside the teacher's, in one kernel: the twin of
linear_distillation.distil_and_differentiate."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from landmark_cli.attention.kernels.common.launch import on_device
from landmark_cli.data.landmarks import IGNORED_TARGET

from .fused_cross_entropy import depth, log_sum_exp


@triton.jit
def distil_kernel(LOGITS, TEACHER, TARGETS, WEIGHTS, TARGET_WEIGHTS, DIVERGENCES, LOSSES, stride, teacher_stride,
                  vocabulary, common, temperature, IGNORED: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
                  TEMPERED: tl.constexpr):  # fmt: skip
    """Program (row). The teacher's softmax is over its first `common` logits. TEMPERED: the temperature is not 1. The
    tiles and what the last loop reads again are as in fused_cross_entropy."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(TARGETS + row)
    weight = tl.load(WEIGHTS + row)
    target_weight = tl.load(TARGET_WEIGHTS + row)
    logits = LOGITS + row * stride
    teacher = TEACHER + row * teacher_stride
    column = tl.arange(0, DEPTH)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    zeros = tl.zeros([DEPTH, COLS], tl.float32)
    counted = weight != 0.0
    known = target != IGNORED
    if not (counted | known):
        for first in range(0, vocabulary, DEPTH * COLS):
            tl.store(logits + first + column, zeros.to(LOGITS.dtype.element_ty), mask=first + column < vocabulary)
        tl.store(DIVERGENCES + row, 0.0)
        tl.store(LOSSES + row, 0.0)
        return
    normalizer = log_sum_exp(logits, vocabulary, COLS, DEPTH)
    loss = 0.0
    if known:
        loss = normalizer - tl.load(logits + target).to(tl.float32)
    tl.store(LOSSES + row, loss)
    tempered_normalizer = normalizer
    teacher_normalizer = 0.0
    by = 1.0 / temperature
    if counted:
        if TEMPERED:
            tempered_normalizer = log_sum_exp(logits, vocabulary, COLS, DEPTH, by)
            teacher_normalizer = log_sum_exp(teacher, common, COLS, DEPTH, by)
        else:
            teacher_normalizer = log_sum_exp(teacher, common, COLS, DEPTH)
    weighed = known & (target_weight != 0.0)
    divergence = tl.zeros([COLS], tl.float32)
    for first in range(0, vocabulary, DEPTH * COLS):
        mask = first + column < vocabulary
        x = tl.load(logits + first + column, mask=mask, other=0.0).to(tl.float32)
        gradient = zeros
        if weighed:
            gradient = (tl.exp(x - normalizer) - tl.where(first + column == target, 1.0, 0.0)) * target_weight
        if counted:
            both = first + column < common
            y = tl.load(teacher + first + column, mask=both, other=0.0).to(tl.float32)
            student_log = x * by - tempered_normalizer
            teacher_log = y * by - teacher_normalizer
            probability = tl.where(both, tl.exp(teacher_log), 0.0)
            divergence += tl.sum(probability * (teacher_log - student_log), 0)
            gradient += (tl.exp(student_log) - probability) * (temperature * weight)
        tl.store(logits + first + column, gradient.to(LOGITS.dtype.element_ty), mask=mask)
    tl.store(DIVERGENCES + row, tl.sum(divergence, 0) * temperature * temperature)


def distil_and_differentiate(
    logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    target_weights: Tensor,
    temperature: float,
    divergences: Tensor,
    losses: Tensor,
) -> None:
    """See linear_distillation.distil_and_differentiate; both logits with a dense last dimension."""
    rows, vocabulary = logits.shape
    # Both rows are read again.
    read_again = vocabulary * logits.element_size() + teacher_logits.shape[1] * teacher_logits.element_size()
    with on_device(logits):
        distil_kernel[(rows,)](
            logits, teacher_logits, targets, weights, target_weights, divergences, losses, logits.stride(0),
            teacher_logits.stride(0), vocabulary, min(vocabulary, teacher_logits.shape[1]), float(temperature),
            IGNORED=IGNORED_TARGET, COLS=min(4096, triton.next_power_of_2(vocabulary)),
            DEPTH=depth(read_again, logits.device), TEMPERED=temperature != 1.0, num_warps=16,
        )  # fmt: skip
