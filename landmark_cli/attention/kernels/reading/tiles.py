"""What the retrieval kernels share: a row's place in its stream, rows loaded in rotary halves, turning, products.

A head's D dimensions come in parts: the first HALF, the HALF they are rotated with, and the REST that is not rotated.
Every index is a 32-bit number inside a tensor's block and a 64-bit one between blocks, so that no cache is too long.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place_of(COUNTERS, batch, row):
    """A row's (padding in front, complete blocks before the chunk, tokens of the incomplete block before it)."""
    return tl.load(COUNTERS + row), tl.load(COUNTERS + batch + row), tl.load(COUNTERS + 2 * batch + row)


@triton.jit
def query_rows(row, tokens, start, key_head, batch_row, q_strides, GROUP: tl.constexpr):
    """Query rows of one key head, counted head by head: (which are real, their tokens, their heads, offsets in Q)."""
    head = row // tokens
    token = row % tokens
    real = (head < GROUP) & (token >= start)
    head = key_head * GROUP + head
    offset = head.to(tl.int64) * q_strides[1] + token.to(tl.int64) * q_strides[2]
    return real, token, head, offset + tl.cast(batch_row, tl.int64) * q_strides[0]


@triton.jit
def load_columns(base, offset, ok, dim, WIDTH: tl.constexpr):
    """Columns `dim`, as far as there are WIDTH, of the rows that begin at base + offset; 0 where not ok."""
    mask = ok[:, None]
    if dim.shape[0] != WIDTH:
        mask = mask & (dim < WIDTH)[None, :]
    return tl.load(base + (offset[:, None] + dim[None, :]), mask=mask, other=0.0)


@triton.jit
def load_parts(base, offset, ok, HALF: tl.constexpr, REST: tl.constexpr, HALF_PAD: tl.constexpr,
               REST_PAD: tl.constexpr):  # fmt: skip
    """The rows that begin at base + offset, in parts."""
    dim = tl.arange(0, HALF_PAD)
    first = load_columns(base, offset, ok, dim, HALF)
    second = load_columns(base + HALF, offset, ok, dim, HALF)
    if REST == 0:
        return first, second
    else:
        return first, second, load_columns(base + 2 * HALF, offset, ok, tl.arange(0, REST_PAD), REST)


@triton.jit
def store_parts(base, offset, ok, parts, HALF: tl.constexpr, REST: tl.constexpr, HALF_PAD: tl.constexpr,
                REST_PAD: tl.constexpr):  # fmt: skip
    """Store what load_parts would load."""
    dim = tl.arange(0, HALF_PAD)
    pointers = base + (offset[:, None] + dim[None, :])
    mask = ok[:, None] & (dim < HALF)[None, :]
    tl.store(pointers, parts[0], mask=mask)
    tl.store(pointers + HALF, parts[1], mask=mask)
    if REST > 0:
        dim = tl.arange(0, REST_PAD)
        pointers = base + 2 * HALF + (offset[:, None] + dim[None, :])
        tl.store(pointers, parts[2], mask=ok[:, None] & (dim < REST)[None, :])


@triton.jit
def turn(parts, COS, SIN, at, HALF: tl.constexpr, HALF_PAD: tl.constexpr, BACK: tl.constexpr = False):
    """Turn rows by the angles in row `at` of the tables (a number, or one for each row); BACK: the other way."""
    dim = tl.arange(0, HALF_PAD)
    if HALF_PAD == HALF:
        cos = tl.load(COS + (at * HALF + dim[None, :])).to(tl.float32)
        sin = tl.load(SIN + (at * HALF + dim[None, :])).to(tl.float32)
    else:
        cos = tl.load(COS + (at * HALF + dim[None, :]), mask=(dim < HALF)[None, :], other=0.0).to(tl.float32)
        sin = tl.load(SIN + (at * HALF + dim[None, :]), mask=(dim < HALF)[None, :], other=0.0).to(tl.float32)
    if BACK:
        sin = -sin
    first = parts[0].to(tl.float32)
    second = parts[1].to(tl.float32)
    dtype = parts[0].dtype
    turned = ((first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype))
    if len(parts) == 2:
        return turned
    else:
        return turned + (parts[2],)


@triton.jit
def dot(q, k, PRECISION: tl.constexpr):
    """q k^T of rows in parts, in float32."""
    s = tl.dot(q[0], tl.trans(k[0]), input_precision=PRECISION)
    s = tl.dot(q[1], tl.trans(k[1]), s, input_precision=PRECISION)
    if len(q) == 3:
        s = tl.dot(q[2], tl.trans(k[2]), s, input_precision=PRECISION)
    return s


@triton.jit
def sum_products(q, k):
    """Products of one query with rows of keys, both in parts, in float32."""
    s = k[0].to(tl.float32) * q[0].to(tl.float32) + k[1].to(tl.float32) * q[1].to(tl.float32)
    s = tl.sum(s, 1)
    if len(q) == 3:
        s += tl.sum(k[2].to(tl.float32) * q[2].to(tl.float32), 1)
    return s


@triton.jit
def block_base(HOME, POOL, PLACE, unit, SIZE: tl.constexpr):
    """Where a block (number `unit` among all heads' blocks) begins: in the pool if it has a place there, else at home.

    SIZE: elements of a block, keys and values. PLACE is None where nothing is offloaded.
    """
    base = HOME + tl.cast(unit, tl.int64) * SIZE
    if PLACE is not None:
        place = tl.load(PLACE + unit)
        if place >= 0:
            base = POOL + place.to(tl.int64) * SIZE
    return base
