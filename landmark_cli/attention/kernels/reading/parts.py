"""What the reading kernels share: where a row stands, a head's dimensions in parts, rotations, products, pages.

A head's D dimensions come in parts: the first HALF, the HALF they are rotated with, and the REST that is not rotated.
PARTS says how many these are and how many columns their tiles have: (HALF, REST, HALF_PAD, REST_PAD). Rows "in parts"
are a tuple of tiles (rows, HALF_PAD), (rows, HALF_PAD) and, where there is a rest, (rows, REST_PAD).

Every index is a 32-bit number inside a tensor's block and a 64-bit one between blocks, so that no cache is too long.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def counts_of(COUNTERS, batch, row):
    """A row's (padding in front, complete blocks before the chunk, tokens of its tail block before the chunk)."""
    return tl.load(COUNTERS + row), tl.load(COUNTERS + batch + row), tl.load(COUNTERS + 2 * batch + row)


@triton.jit
def cache_row(COUNTERS, batch, row):
    """Which row of the cache a row of the batch is."""
    return tl.load(COUNTERS + 3 * batch + row)


@triton.jit
def query_rows(row, tokens, start, key_head, batch_row, q_strides, HEADS_PER_KEY: tl.constexpr):
    """Query rows (ROWS,) of one key head, counted head by head: (which are real, tokens, heads, offsets in Q)."""
    head = row // tokens
    token = row % tokens
    real = (head < HEADS_PER_KEY) & (token >= start)
    head = key_head * HEADS_PER_KEY + head
    offset = head.to(tl.int64) * q_strides[1] + token.to(tl.int64) * q_strides[2]
    return real, token, head, offset + tl.cast(batch_row, tl.int64) * q_strides[0]


@triton.jit
def load_columns(base, offset, ok, dim, WIDTH: tl.constexpr):
    """Columns `dim`, as far as there are WIDTH, of the rows that begin at base + offset; 0 where not ok."""
    mask = ok[:, None]  # (rows, 1)
    if dim.shape[0] != WIDTH:
        mask = mask & (dim < WIDTH)[None, :]
    return tl.load(base + (offset[:, None] + dim[None, :]), mask=mask, other=0.0)  # (rows, columns)


@triton.jit
def load_parts(base, offset, ok, PARTS: tl.constexpr):
    """The rows that begin at base + offset, in parts."""
    HALF: tl.constexpr = PARTS[0]
    REST: tl.constexpr = PARTS[1]
    dim = tl.arange(0, PARTS[2])  # (HALF_PAD,)
    first = load_columns(base, offset, ok, dim, HALF)
    second = load_columns(base + HALF, offset, ok, dim, HALF)
    if REST == 0:
        return first, second
    else:
        return first, second, load_columns(base + 2 * HALF, offset, ok, tl.arange(0, PARTS[3]), REST)


@triton.jit
def store_parts(base, offset, ok, parts, PARTS: tl.constexpr):
    """Store what load_parts would load."""
    HALF: tl.constexpr = PARTS[0]
    REST: tl.constexpr = PARTS[1]
    dim = tl.arange(0, PARTS[2])  # (HALF_PAD,)
    pointers = base + (offset[:, None] + dim[None, :])  # (rows, HALF_PAD), as mask
    mask = ok[:, None] & (dim < HALF)[None, :]
    tl.store(pointers, parts[0], mask=mask)
    tl.store(pointers + HALF, parts[1], mask=mask)
    if REST > 0:
        dim = tl.arange(0, PARTS[3])  # (REST_PAD,)
        pointers = base + 2 * HALF + (offset[:, None] + dim[None, :])  # (rows, REST_PAD)
        tl.store(pointers, parts[2], mask=ok[:, None] & (dim < REST)[None, :])


@triton.jit
def rotate(rows, tables, at, PARTS: tl.constexpr, BACK: tl.constexpr = False):
    """Rotate rows in parts by the angles in row `at` of the tables (cos, sin): a number, or (rows, 1), one for each.

    BACK: the other way.
    """
    HALF: tl.constexpr = PARTS[0]
    dim = tl.arange(0, PARTS[2])  # (HALF_PAD,)
    # (1, HALF_PAD) or (rows, HALF_PAD), as sin.
    if PARTS[2] == HALF:
        cos = tl.load(tables[0] + (at * HALF + dim[None, :])).to(tl.float32)
        sin = tl.load(tables[1] + (at * HALF + dim[None, :])).to(tl.float32)
    else:
        cos = tl.load(tables[0] + (at * HALF + dim[None, :]), mask=(dim < HALF)[None, :], other=0.0).to(tl.float32)
        sin = tl.load(tables[1] + (at * HALF + dim[None, :]), mask=(dim < HALF)[None, :], other=0.0).to(tl.float32)
    if BACK:
        sin = -sin
    first = rows[0].to(tl.float32)
    second = rows[1].to(tl.float32)
    dtype = rows[0].dtype
    rotated = ((first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype))
    if len(rows) == 2:
        return rotated
    else:
        return rotated + (rows[2],)


@triton.jit
def dot(q, k, PRECISION: tl.constexpr):
    """q k^T of rows in parts, (rows of q, rows of k) in float32."""
    s = tl.dot(q[0], tl.trans(k[0]), input_precision=PRECISION)
    s = tl.dot(q[1], tl.trans(k[1]), s, input_precision=PRECISION)
    if len(q) == 3:
        s = tl.dot(q[2], tl.trans(k[2]), s, input_precision=PRECISION)
    return s


@triton.jit
def sum_products(q, k):
    """Products of one query with rows of keys, both in parts, (rows of k,) in float32."""
    # s: (rows of k, HALF_PAD).
    if k[0].dtype == tl.float32:
        # Which of the two products is rounded: the compiler would choose otherwise in kernels with a page table than in
        # those without one. Products of 16-bit numbers are exact.
        s = tl.fma(k[0], q[0], k[1] * q[1])
    else:
        s = k[0].to(tl.float32) * q[0].to(tl.float32) + k[1].to(tl.float32) * q[1].to(tl.float32)
    s = tl.sum(s, 1)
    if len(q) == 3:
        s += tl.sum(k[2].to(tl.float32) * q[2].to(tl.float32), 1)
    return s


@triton.jit
def page_base(BLOCKS, POOL, PAGE_TABLE, page, SIZE: tl.constexpr):
    """Where a page begins, which is one block of one key head: in the pool if a frame there holds it, else in BLOCKS.

    SIZE: numbers in a page, keys and values. PAGE_TABLE is None where nothing is offloaded.
    """
    base = BLOCKS + tl.cast(page, tl.int64) * SIZE
    if PAGE_TABLE is not None:
        frame = tl.load(PAGE_TABLE + page)
        if frame >= 0:
            base = POOL + frame.to(tl.int64) * SIZE
    return base
