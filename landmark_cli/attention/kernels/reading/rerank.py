"""Of the blocks that landmarks propose those whose text counts most, and what of the outer softmax the read ones get.

The twin of attention/rerank.py, which says why.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .candidates import NO_NUMBER
from .top_k import numbered


@triton.jit(do_not_specialize=["rows"])
def rerank_kernel(AGES, SCORES, OUT, rows, N: tl.constexpr, N_PAD: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr):
    """OUT (rows, K): the ages of the K blocks of largest scores, of equal ones the newer, the best first; 0 where there
    are fewer. AGES, SCORES (rows, N): 0 and any score where there is no block. Program (tile of rows)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (ROWS,), as top and found
    column = tl.arange(0, N_PAD)  # (N_PAD,)
    in_range = row < rows
    mask = in_range[:, None] & (column < N)[None, :]  # (ROWS, N_PAD), as all down to `number`
    at = row[:, None].to(tl.int64) * N + column[None, :]
    age = tl.load(AGES + at, mask=mask, other=0)
    score = tl.load(SCORES + at, mask=mask, other=0.0)
    number = tl.where(age > 0, numbered(score, age), NO_NUMBER)
    for j in range(K):
        top = tl.max(number, 1)
        found = tl.where(top > NO_NUMBER, 2147483647 - (top & 0xFFFFFFFF).to(tl.int32), 0)
        tl.store(OUT + row.to(tl.int64) * K + j, found, mask=in_range)
        number = tl.where(number == top[:, None], NO_NUMBER, number)


@triton.jit
def sharpened(logits, chosen, temperature):
    """Logits of what a query reads, along the last axis, those of `chosen` blocks by a temperature: the best of these
    keeps its own. Minus infinity, where there is no block, stays so."""
    best = tl.max(tl.where(chosen, logits, float("-inf")), len(logits.shape) - 1, keep_dims=True)
    best = tl.maximum(best, -1.0e30)
    return tl.where(chosen, best + (logits - best) / temperature, logits)


@triton.jit(do_not_specialize=["rows"])
def sharpen_kernel(LOGITS, rows, temperature, K: tl.constexpr, K_PAD: tl.constexpr, ROWS: tl.constexpr):
    """LOGITS (rows, K) by the temperature, in place. Program (tile of rows)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    column = tl.arange(0, K_PAD)  # (K_PAD,)
    mask = (row < rows)[:, None] & (column < K)[None, :]  # (ROWS, K_PAD), as logits
    at = row[:, None].to(tl.int64) * K + column[None, :]
    logits = tl.load(LOGITS + at, mask=mask, other=float("-inf"))
    tl.store(LOGITS + at, sharpened(logits, mask, temperature), mask=mask)
