"""How well logits predict targets, in one pass over the logits: cross-entropy and the likeliest token of each row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def score_kernel(LOGITS, TARGETS, LOSS, CORRECT, stride, vocabulary, IGNORED: tl.constexpr, COLS: tl.constexpr):
    """LOSS (rows,) float32, 0 where the target is IGNORED, and CORRECT (rows,) int32. Program (row)."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(TARGETS + row)
    if target == IGNORED:
        tl.store(LOSS + row, 0.0)
        tl.store(CORRECT + row, 0)
        return
    column = tl.arange(0, COLS)
    top = tl.full([COLS], float("-inf"), tl.float32)
    total = tl.zeros([COLS], tl.float32)
    best = tl.zeros([COLS], tl.int32)
    # A running maximum and sum in every column, put together at the end: no reduction inside the loop.
    for first in range(0, vocabulary, COLS):
        x = tl.load(LOGITS + row * stride + first + column, mask=first + column < vocabulary, other=float("-inf"))
        x = x.to(tl.float32)
        higher = tl.maximum(top, x)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - shift) + tl.exp(x - shift)
        best = tl.where(x > top, first + column, best)
        top = higher
    highest = tl.max(top, 0)
    total = tl.sum(total * tl.exp(top - highest), 0)
    likeliest = tl.min(tl.where(top == highest, best, 2147483647), 0)
    wanted = tl.load(LOGITS + row * stride + target).to(tl.float32)
    tl.store(LOSS + row, highest + tl.log(total) - wanted)
    tl.store(CORRECT + row, (likeliest == target).to(tl.int32))


def token_scores(logits: Tensor, targets: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """logits (rows, V) with a dense last dimension, targets (rows,) int64 -> (rows,) float32 negative log-likelihoods
    and (rows,) int32, 1 where the target was the likeliest; both 0 where the target is `ignored`."""
    rows, vocabulary = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    correct = torch.empty(rows, dtype=torch.int32, device=logits.device)
    score_kernel[(rows,)](
        logits, targets, loss, correct, logits.stride(0), vocabulary, IGNORED=ignored,
        COLS=min(4096, triton.next_power_of_2(vocabulary)), num_warps=8,
    )  # fmt: skip
    return loss, correct
