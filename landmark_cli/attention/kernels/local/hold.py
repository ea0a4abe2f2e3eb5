"""Putting together what a chunk attends to in a layer that holds text, and keeping the newest of it.

A layer holds each key rotated by its offset among the text of its block, so that it is rounded once, however far the
window rolls on. Attention wants keys and queries rotated at their places in the text, one key behind another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.rotary import angles_of, move_heads


@triton.jit
def move_token(K, V, TO_K, TO_V, k_stride, v_stride, to_stride, COS, SIN, table_strides, row, token, heads,
               DIMS: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    """All heads of a token: its keys, rotated by its row of a table if there is one, and its values. Strides: from head
    to head; DIMS: what move_heads knows of a head's dimensions."""
    if COS is None:
        move_heads(K, TO_K, k_stride, to_stride, 0.0, 0.0, heads, False, DIMS[0], DIMS[1], DIMS[2], DIMS[3], HEADS)
    else:
        cos, sin = angles_of(COS, SIN, table_strides, row, token, DIMS[0], DIMS[2])
        move_heads(K, TO_K, k_stride, to_stride, cos, sin, heads, True, DIMS[0], DIMS[1], DIMS[2], DIMS[3], HEADS)
    move_heads(V, TO_V, v_stride, to_stride, 0.0, 0.0, heads, False, DIMS[0], DIMS[1], DIMS[2], DIMS[3], HEADS)


@triton.jit(do_not_specialize=["held", "tokens", "key_heads", "heads"])
def join_kernel(Q, K, V, HELD_KEYS, HELD_VALUES, HELD_REAL, ROWS, TEXT, SOURCE, BACK_COS, BACK_SIN, PLACE_COS,
                PLACE_SIN, HOLD_COS, HOLD_SIN, Q_OUT, KEYS, VALUES, SEEN, NEXT_KEYS, NEXT_VALUES, NEXT_REAL, q_strides,
                k_strides, v_strides, held_strides, out_strides, keys_strides, next_strides, back_strides,
                place_strides, hold_strides, held, tokens, key_heads, heads,
                DIMS: tl.constexpr, KEY_HEADS: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    """Q_OUT (n, H, T, D): Q rotated back to places. KEYS, VALUES (n, G, held + T, D) and SEEN (n, held + T): the held
    text and the chunk. NEXT_KEYS, NEXT_VALUES (n, G, held, D) and NEXT_REAL (n, held): what is to be held.

    Q (n, H, T, D) and K, V (n, G, T, D), rotated at the chunk's positions. HELD_KEYS, HELD_VALUES (B, G, held, D) and
    HELD_REAL (B, held): of all rows, of which the chunk's are ROWS (n,). TEXT (n, T): which of the chunk is text.
    SOURCE (n, held): see places.py. BACK, PLACE, HOLD: rotations of the chunk to its places, of held keys to theirs,
    and of the chunk's keys to what is held of them; None without positions. Strides are those of the first three
    dimensions, in elements; values lie as keys do, but V. Program (number, row): the held tokens, those of the chunk,
    and the slots of what is to be held.
    """
    number = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    cache_row = tl.load(ROWS + row).to(tl.int64)
    slot = number - held - tokens
    # Which of held text and chunk the token is.
    source = number
    if slot >= 0:
        source = tl.load(SOURCE + row * held + slot)
    old = cache_row * held_strides[0] + source.to(tl.int64) * held_strides[2]
    token = (source - held).to(tl.int64)
    k = K + row * k_strides[0] + token * k_strides[2]
    v = V + row * v_strides[0] + token * v_strides[2]
    if source < held:
        real = tl.load(HELD_REAL + cache_row * held + source)
    else:
        real = tl.load(TEXT + row * tokens + token)
    if slot >= 0:
        to = row * next_strides[0] + slot.to(tl.int64) * next_strides[2]
        if source < held:
            move_token(HELD_KEYS + old, HELD_VALUES + old, NEXT_KEYS + to, NEXT_VALUES + to, held_strides[1],
                       held_strides[1], next_strides[1], None, None, None, row, token, key_heads, DIMS,
                       KEY_HEADS)  # fmt: skip
        else:
            move_token(k, v, NEXT_KEYS + to, NEXT_VALUES + to, k_strides[1], v_strides[1], next_strides[1], HOLD_COS,
                       HOLD_SIN, hold_strides, row, token, key_heads, DIMS, KEY_HEADS)  # fmt: skip
        tl.store(NEXT_REAL + row * held + slot, real)
    else:
        to = row * keys_strides[0] + number.to(tl.int64) * keys_strides[2]
        if source < held:
            move_token(HELD_KEYS + old, HELD_VALUES + old, KEYS + to, VALUES + to, held_strides[1], held_strides[1],
                       keys_strides[1], PLACE_COS, PLACE_SIN, place_strides, row, number.to(tl.int64), key_heads, DIMS,
                       KEY_HEADS)  # fmt: skip
        else:
            move_token(k, v, KEYS + to, VALUES + to, k_strides[1], v_strides[1], keys_strides[1], BACK_COS, BACK_SIN,
                       back_strides, row, token, key_heads, DIMS, KEY_HEADS)  # fmt: skip
            q = Q + row * q_strides[0] + token * q_strides[2]
            out = Q_OUT + row * out_strides[0] + token * out_strides[2]
            if BACK_COS is None:
                move_heads(q, out, q_strides[1], out_strides[1], 0.0, 0.0, heads, False, DIMS[0], DIMS[1], DIMS[2],
                           DIMS[3], HEADS)  # fmt: skip
            else:
                cos, sin = angles_of(BACK_COS, BACK_SIN, back_strides, row, token, DIMS[0], DIMS[2])
                move_heads(q, out, q_strides[1], out_strides[1], cos, sin, heads, True, DIMS[0], DIMS[1], DIMS[2],
                           DIMS[3], HEADS)  # fmt: skip
        tl.store(SEEN + row * (held + tokens) + number, real)


@triton.jit(do_not_specialize=["held", "key_heads"])
def keep_kernel(NEXT_KEYS, NEXT_VALUES, NEXT_REAL, ROWS, HELD_KEYS, HELD_VALUES, HELD_REAL, next_strides, held_strides,
                held, key_heads, DIMS: tl.constexpr, KEY_HEADS: tl.constexpr):  # fmt: skip
    """What `join_kernel` found is to be held, put into its rows, when nothing reads any longer what was held. Program
    (slot, row)."""
    slot = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    cache_row = tl.load(ROWS + row).to(tl.int64)
    at = row * next_strides[0] + slot * next_strides[2]
    to = cache_row * held_strides[0] + slot * held_strides[2]
    move_token(NEXT_KEYS + at, NEXT_VALUES + at, HELD_KEYS + to, HELD_VALUES + to, next_strides[1], next_strides[1],
               held_strides[1], None, None, None, row, slot, key_heads, DIMS, KEY_HEADS)  # fmt: skip
    tl.store(HELD_REAL + cache_row * held + slot, tl.load(NEXT_REAL + row * held + slot))
