"""Products of one to four rows with a weight: each program reads some rows of the weight once, as a stream.

What a step's product takes is reading its weight, and a library's kernels for matrices, whose tiles are of 64 rows and
more, leave the memory idle where a weight is small. The twins are those of step_operations.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from landmark_cli.attention.kernels.common.dependent import dependent_launch, let_next_begin, wait_for_previous
from landmark_cli.attention.kernels.common.launch import on_device

# More rows have been compared with the definition, and not been timed beside a library's products in a step.
MOST_ROWS = 1
# Output and input features of the smallest weights that have been. A row is read in whole loads of a warp.
LEAST_FEATURES, WHOLE = 4096, 256


class Tiles(NamedTuple):
    """rows: of the weight that a program reads; columns: of these at a time; stages: tiles on their way at a time, 1
    for what the compiler makes of it."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 1


@triton.jit
def row_sums(X, WEIGHT, row, ok, x_stride, K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
             STAGES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Products of ROWS rows of X (ROWS, K) with rows `row` (TILE,) of WEIGHT (., K), 0 where not ok: a tuple of ROWS
    sums (TILE,) in float32. The weight's first tile is on its way before the kernel that makes X has ended."""
    column = tl.arange(0, COLS)  # (COLS,)
    weights = WEIGHT + row.to(tl.int64)[:, None] * K + column[None, :]  # (TILE, COLS), as w and each of sums
    sums = (tl.zeros([row.shape[0], COLS], tl.float32),) * ROWS
    following = tl.load(weights, mask=ok[:, None] & (column < K)[None, :], other=0.0, eviction_policy="evict_first")
    let_next_begin(PDL)
    wait_for_previous(PDL)
    for begin in tl.range(0, K, COLS, num_stages=STAGES):
        mask = begin + column < K
        w = following.to(tl.float32)
        behind = ok[:, None] & (begin + COLS + column < K)[None, :]
        following = tl.load(weights + begin + COLS, mask=behind, other=0.0, eviction_policy="evict_first")
        new = ()
        for r in tl.static_range(ROWS):
            x = tl.load(X + r * x_stride + begin + column, mask=mask, other=0.0).to(tl.float32)  # (COLS,)
            new = new + (sums[r] + w * x[None, :],)
        sums = new
    found = ()
    for r in tl.static_range(ROWS):
        found = found + (tl.sum(sums[r], 1),)
    return found


@triton.jit
def products_kernel(X, WEIGHT, BIAS, OUT, x_stride, N, K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
                    COLS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """OUT (ROWS, N) = X WEIGHT^T + BIAS, unless that is None. Program (tile of TILE rows of WEIGHT)."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)  # (TILE,), as ok
    ok = row < N
    found = row_sums(X, WEIGHT, row, ok, x_stride, K, ROWS, COLS, STAGES, PDL)
    for r in tl.static_range(ROWS):
        total = found[r]
        if BIAS is not None:
            total += tl.load(BIAS + row, mask=ok, other=0.0).to(tl.float32)
        tl.store(OUT + r * N + row, total.to(OUT.dtype.element_ty), mask=ok)


@triton.jit
def gated_products_kernel(X, WEIGHT, OUT, x_stride, N, K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
                          COLS: tl.constexpr, STAGES: tl.constexpr,
                          PDL: tl.constexpr):  # fmt: skip
    """OUT (ROWS, N) = silu(X GATE^T) * (X UP^T), where GATE (N, K) and UP (N, K) are WEIGHT. Program (tile of TILE rows
    of WEIGHT, those of GATE and of UP by turns)."""
    HALF: tl.constexpr = TILE // 2
    dtype = OUT.dtype.element_ty
    index = tl.arange(0, TILE)  # (TILE,), as row
    row = tl.program_id(0) * HALF + index // 2
    found = row_sums(X, WEIGHT, row + index % 2 * N, row < N, x_stride, K, ROWS, COLS, STAGES, PDL)
    column = tl.program_id(0) * HALF + tl.arange(0, HALF)  # (HALF,), as gate and up
    for r in tl.static_range(ROWS):
        gate, up = tl.split(tl.reshape(found[r].to(dtype).to(tl.float32), [HALF, 2]))
        gate = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        tl.store(OUT + r * N + column, (gate * up).to(dtype), mask=column < N)


def tiles_for(out_features: int, in_features: int, rows: int) -> Tiles:
    """See benchmarks/row_products.py, which measures others."""
    return Tiles(4 if rows == 1 else 2, 1024 if in_features >= 1024 else triton.next_power_of_2(in_features))


def products(x: Tensor, weight: Tensor, bias: Tensor | None = None, tiles: Tiles | None = None) -> Tensor:
    out_features, in_features = weight.shape
    rows, out = _rows(x), x.new_empty(*x.shape[:-1], out_features)
    tiles = tiles or tiles_for(out_features, in_features, len(rows))
    with on_device(x):
        products_kernel[(triton.cdiv(out_features, tiles.rows),)](
            rows, weight, bias, out, rows.stride(0), out_features, **_constants(weight, len(rows), tiles)
        )
    return out


def gated_products(x: Tensor, weight: Tensor, tiles: Tiles | None = None) -> Tensor:
    out_features, in_features = weight.shape[0] // 2, weight.shape[1]
    rows, out = _rows(x), x.new_empty(*x.shape[:-1], out_features)
    tiles = tiles or tiles_for(2 * out_features, in_features, len(rows))
    tiles = tiles._replace(rows=max(2, tiles.rows))
    with on_device(x):
        gated_products_kernel[(triton.cdiv(2 * out_features, tiles.rows),)](
            rows, weight, out, rows.stride(0), out_features, **_constants(weight, len(rows), tiles)
        )
    return out


def _rows(x: Tensor) -> Tensor:
    """(n, K), each row dense."""
    rows = x.flatten(0, -2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _constants(weight: Tensor, rows: int, tiles: Tiles) -> dict[str, int]:
    shape = {"K": weight.shape[1], "ROWS": rows} | dependent_launch(weight)
    return shape | {"TILE": tiles.rows, "COLS": tiles.columns, "STAGES": tiles.stages, "num_warps": tiles.warps}


def serves(x: Tensor, weight: Tensor | None) -> bool:
    """Whether products of x (..., K) with a weight are faster by these kernels than by a library's: where that has been
    measured (benchmarks/results/quantization-h200.md), and nowhere else."""
    if weight is None or x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        return False
    few = x.numel() <= MOST_ROWS * x.shape[-1]
    return few and min(weight.shape) >= LEAST_FEATURES and weight.shape[1] % WHOLE == 0 and weight.is_contiguous()
