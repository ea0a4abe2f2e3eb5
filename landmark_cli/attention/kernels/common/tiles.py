"""Tiles of rows of a matrix, loaded and stored.

Every index is a 32-bit number inside a tile and a 64-bit one between tiles, so that no tensor is too long.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

# Stands for minus infinity where a difference of two of them must not become NaN.
FLOOR = tl.constexpr(-1.0e30)

# Logits are kept times log2(e), for exp2 is what the hardware has.
LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))


@triton.jit
def load_tile(base, first, stride, row, row_ok, dim, D: tl.constexpr, MASKED: tl.constexpr):
    """The rows first + row of a matrix at base, (rows, dims). row counts within the tile, first may be far away.

    stride: from row to row; dim: 0.. up to D or more, what is beyond being 0. MASKED: rows that are not row_ok are 0.
    """
    pointers = base + tl.cast(first, tl.int64) * stride + (row[:, None] * stride + dim[None, :])
    if MASKED:
        if D == dim.shape[0]:
            return tl.load(pointers, mask=row_ok[:, None], other=0.0)
        else:
            return tl.load(pointers, mask=row_ok[:, None] & (dim < D)[None, :], other=0.0)
    else:
        if D == dim.shape[0]:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(dim < D)[None, :], other=0.0)


@triton.jit
def store_tile(base, first, stride, row, row_ok, dim, value, D: tl.constexpr):
    """Store the rows that load_tile would load."""
    pointers = base + tl.cast(first, tl.int64) * stride + (row[:, None] * stride + dim[None, :])
    tl.store(pointers, value.to(base.dtype.element_ty), mask=row_ok[:, None] & (dim < D)[None, :])
