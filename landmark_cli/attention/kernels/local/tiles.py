"""What a tile of queries sees of a tile of keys, in a layer with a sliding window.

FIRST holds of each query the number of the first key that it may see, TEXT of each key whether others may see it at
all. A query sees the text from its first key up to itself, and itself whether it is text or a landmark.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def query_tile(FIRST, first_stride, batch, row, queries, offset, ROWS: tl.constexpr):
    """A tile of queries from `row` on: (rows, which of them there are, their numbers among the keys, the first key of
    each or, where that comes behind it, itself), (ROWS,) each. Of rows that are not there no key comes before that
    first key."""
    rows = tl.arange(0, ROWS)
    row_ok = row + rows < queries
    first = tl.load(FIRST + batch * first_stride + row + rows, mask=row_ok, other=queries + offset)
    index = row + rows + offset
    # A walk from the first key on meets the query itself, which it sees in any case.
    return rows, row_ok, index, tl.minimum(first, index)


@triton.jit
def key_tile(TEXT, text_stride, batch, start, keys, COLS: tl.constexpr):
    """A tile of keys from `start` on: (their numbers, which of them are text), (COLS,) each."""
    key = start + tl.arange(0, COLS)
    text = tl.load(TEXT + batch * text_stride + key, mask=key < keys, other=0) != 0
    return key, text


@triton.jit
def sees(index, first, key, text):
    """Whether queries see keys, (ROWS, COLS), of (ROWS, 1) index and first and (1, COLS) key and text; or all of it
    transposed."""
    return ((key >= first) & (key < index) & text) | (key == index)
