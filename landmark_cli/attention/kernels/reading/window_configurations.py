"""How large the tiles of the window's kernels are, and on how many warps they run; benchmarks/tune_window.py measures
others."""

from __future__ import annotations

import functools

import triton
from torch import Tensor

from ..common.choices import Choices
from ..common.configuration import Configuration, is_exact, padded
from .call import TILE

# Pairs of an item of work of backward. Each gives a part of its block's dk and dv, 2 * block size * D float32 numbers.
ITEM = 2048
# Tokens of a block whose parts a program adds up.
KEY_ROWS = 16

# For 16-bit numbers and blocks of up to 64 tokens, by (kernel, head dim padded).
TABLE = {
    ("select", 64): [Configuration(64, TILE, 4, 2, 128)],
    ("select", 128): [Configuration(64, TILE, 4, 2, 128)],
    ("attend", 64): [Configuration(64, 64, 4, 1, 128)],
    ("attend", 128): [Configuration(128, 64, 8, 1, 128)],
    ("pair_gradient", 64): [Configuration(64, 64, 4, 2)],
    ("pair_gradient", 128): [Configuration(128, 64, 8, 1)],
}


def window_choices(kernel: str, q: Tensor, block_size: int, top_k: int) -> Choices:
    """The choices of a kernel ("select", "attend", "merge", "own_gradient", "pair_gradient" or "sum_queries"), the
    first of which that fits runs; rows are queries or pairs a tile, cols the keys of one."""
    block, dim = padded(block_size), padded(q.shape[-1])
    if not q.is_cuda:
        return Choices([Configuration(min(64, padded(q.shape[2])), block)])
    return _choices(kernel, q.device.index, q.element_size(), is_exact(q.dtype), dim, block, top_k)


@functools.cache
def _choices(kernel: str, device: int, width: int, exact: bool, dim: int, block: int, top_k: int) -> Choices:
    found = list(candidates(kernel, width, exact, dim, block))
    if width == 2 and block <= 64 and (kernel != "select" or top_k <= 8):
        measured = TABLE.get((kernel, dim), [])
        found = [Configuration(c.rows, min(c.cols, block), c.warps, c.stages, c.registers) for c in measured] + found
    return Choices(found)


def candidates(kernel: str, width: int, exact: bool, dim: int, block: int) -> list[Configuration]:
    """Configurations, the most promising first; the last fits everywhere. width: bytes of a number."""
    row_bytes = dim * width
    large = row_bytes > 256 or block > 64
    if kernel == "select":
        rows = 64 if row_bytes <= 512 else 16
        return [Configuration(rows, TILE, 8 if large and rows == 64 else 4), Configuration(16, TILE, 4, 1)]
    if kernel == "attend":
        cols = min(64, block)
        wide = Configuration(64, cols, 8 if large and cols == 64 else 4, 1)
        small = Configuration(16, min(cols, 32), 4, 1)
        return [small] if row_bytes > 512 else [wide, small]
    if kernel == "pair_gradient":
        rows = [16] if exact and row_bytes > 256 else [64, 32, 16] if row_bytes <= 256 else [32, 16]
        return [Configuration(n, block, 8, 1, 255 if exact else None) for n in rows]
    # Nothing is multiplied: rows are read and added.
    rows = max(1, min(64, 8192 // row_bytes))
    return [Configuration(triton.next_power_of_2(rows), block, 4)]
