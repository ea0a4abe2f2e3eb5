"""Attention of the few tokens of a decoding step: each block by a program of its own, put together by the last.

Every query head has one program for each selected block and one for the block it stands in; all they read is the
cache, since the step's own keys and values have been stored before. Shapes do not depend on what has been read, so the
kernels fit into a CUDA graph. Source: arXiv 2305.16300, section 3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.dependent import let_next_begin
from ..common.logits import logits_of
from ..common.tiles import LOG2E
from .candidates import best_candidates
from .parts import cache_row, counts_of, load_columns, load_parts, page_base, rotate, sum_products
from .rerank import sharpened
from .route import distance_of

NOTHING = tl.constexpr(float("-inf"))


@triton.jit(do_not_specialize=["tokens", "batch", "heads", "capacity", "retrievable", "top_k"])
def decode_kernel(Q, BLOCKS, POOL, PAGE_TABLE, COUNTERS, rotations, AGES, SCORES, ITEM_OUT, ITEM_LOGIT, ARRIVED, OUT,
                  CHOSEN, SHARES, SINKS, q_strides, out_strides, tokens, batch, heads, capacity, retrievable, top_k,
                  scaling, temperature,
                  HEADS_PER_KEY: tl.constexpr, PARTS: tl.constexpr, D_PAD: tl.constexpr, K: tl.constexpr,
                  K_PAD: tl.constexpr, ITEMS: tl.constexpr, ITEMS_PAD: tl.constexpr, SPLITS: tl.constexpr,
                  CANDIDATES: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
                  ABSOLUTE: tl.constexpr, JOINT: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """OUT (B, H, T, D) from the candidates AGES and SCORES (B, H, T, SPLITS, K) that candidates_kernel left.

    Program (item, query of a head). Items: K selected blocks, the query's own block, and, where a step may begin a new
    block, the one before. ITEM_OUT (B, H, T, ITEMS, D) and ITEM_LOGIT hold what they find; ARRIVED (B, H, T) counts
    programs that are through, from 0 and back to 0. CHOSEN and SHARES (B, H, T, K), unless None: ages and shares of the
    selected blocks. COLS: landmarks a tile of candidates_kernel's. KEYS: keys a tile of a block. retrievable: most
    blocks to choose from. JOINT: see attend_rows. temperature: of the softmax among selected blocks, or None. SINKS:
    (H,) natural logits of keys without values, or None. scaling: see common/logits.py.
    """
    let_next_begin(PDL)
    item = tl.program_id(0)
    row = tl.program_id(1)
    query_heads = heads * HEADS_PER_KEY
    D: tl.constexpr = 2 * PARTS[0] + PARTS[1]
    batch_row = row // (query_heads * tokens)
    head = row // tokens % query_heads
    token = row % tokens
    start, blocks, tail = counts_of(COUNTERS, batch, batch_row)
    cached = tl.minimum(blocks, retrievable)
    near = tl.minimum(cached, top_k)
    real = token >= start
    position = tl.maximum(token - start + tail, 0)

    # Asked for before all that is waited for first.
    one = tl.arange(0, 1)  # (1,): the query is a tile of one row, in parts
    at = tl.cast(batch_row, tl.int64) * q_strides[0] + tl.cast(head, tl.int64) * q_strides[1]
    at += tl.cast(token, tl.int64) * q_strides[2]
    q = load_parts(Q, at + one, one == 0, PARTS)
    key_row = cache_row(COUNTERS, batch, batch_row) * heads + head // HEADS_PER_KEY

    # What this item reads: the ring's block `slot`, of which the first `texts` keys are seen, `distance` slots before.
    texts = BLOCK - 1
    distance = 0
    slot = (blocks + position // BLOCK) % capacity
    ok = real
    if item < K:
        best = best_candidates(AGES, SCORES, row, cached, near, K, SPLITS, CANDIDATES, COLS, K_PAD)  # (K_PAD,)
        rank = tl.arange(0, K_PAD)  # (K_PAD,)
        age = tl.sum(tl.where(rank == item, best, 0), 0)
        older = tl.sum((best > age).to(tl.int32), 0)
        ok = real & (age > 0)
        distance = tl.where(ok, distance_of(age, older, near, ABSOLUTE), 0)
        slot = tl.where(ok, (blocks - age) % capacity, 0)
        if CHOSEN is not None:
            tl.store(CHOSEN + row * K + item, tl.where(ok, age, 0))
    else:
        if item == K:
            texts = tl.minimum(position % BLOCK + 1, BLOCK - 1)
            distance = -(position // BLOCK)
        else:
            slot = blocks % capacity
            ok = real & (position >= BLOCK)

    if distance < 0:
        q = rotate(q, rotations, -distance, PARTS, True)
    else:
        q = rotate(q, rotations, distance, PARTS)
    page = tl.cast(key_row, tl.int64) * capacity + slot
    base = BLOCKS + page * (2 * BLOCK * D)
    if item < K:
        base = page_base(BLOCKS, POOL, PAGE_TABLE, page, 2 * BLOCK * D)

    dim = tl.arange(0, D_PAD)  # (D_PAD,)
    landmark = float("-inf")
    top = -1.0e30
    total = 0.0
    out = tl.zeros([D_PAD], tl.float32)
    for part in tl.static_range((BLOCK + KEYS - 1) // KEYS):
        column = part * KEYS + tl.arange(0, KEYS)  # (KEYS,), as seen, s and p
        seen = (column < BLOCK) & ok
        k = load_parts(base, column * D, seen, PARTS)
        v = load_columns(base + BLOCK * D, column * D, seen & (column < texts), dim, D)  # (KEYS, D_PAD)
        s = logits_of(sum_products(q, k), scaling)
        if not JOINT:
            landmark = tl.maximum(landmark, tl.max(tl.where(column == BLOCK - 1, s, NOTHING), 0))
        s = tl.where(column < texts, s, NOTHING)
        new_top = tl.maximum(top, tl.max(s, 0))
        rescale = tl.exp2(top - new_top)
        p = tl.exp2(s - new_top)
        total = total * rescale + tl.sum(p, 0)
        out = out * rescale + tl.sum(p[:, None] * v.to(tl.float32), 0)
        top = new_top
    if JOINT:
        logit = top + tl.log2(total)
    else:
        logit = tl.where(item == K, top + tl.log2(total), landmark)
    logit = tl.where(ok, logit, NOTHING)
    at = tl.cast(row, tl.int64) * ITEMS
    tl.store(ITEM_OUT + (at + item) * D + dim, out / total, mask=dim < D)
    tl.store(ITEM_LOGIT + at + item, logit)

    # The program that comes last puts the items together, and leaves the count at 0 for the next step.
    tl.debug_barrier()
    if tl.atomic_add(ARRIVED + row, 1, sem="acq_rel") == ITEMS - 1:
        tl.debug_barrier()
        items = tl.arange(0, ITEMS_PAD)  # (ITEMS_PAD,), as logits and share
        logits = tl.load(ITEM_LOGIT + at + items, mask=items < ITEMS, other=NOTHING, cache_modifier=".cg")
        if temperature is not None:
            logits = sharpened(logits, items < K, temperature)
        top = tl.maximum(tl.max(logits, 0), -1.0e30)
        if SINKS is not None:
            sink = tl.load(SINKS + head).to(tl.float32) * LOG2E
            top = tl.maximum(top, sink)
        share = tl.exp2(logits - top)
        total = tl.sum(share, 0)
        if SINKS is not None:
            total += tl.exp2(sink - top)
        share = share / tl.maximum(total, 1.0e-30)
        pointers = ITEM_OUT + (at + items)[:, None] * D + dim[None, :]  # (ITEMS_PAD, D_PAD), as mask and found
        mask = (items < ITEMS)[:, None] & (dim < D)[None, :]
        found = tl.load(pointers, mask=mask, other=0.0, cache_modifier=".cg")
        to = tl.cast(batch_row, tl.int64) * out_strides[0] + tl.cast(head, tl.int64) * out_strides[1]
        to += tl.cast(token, tl.int64) * out_strides[2]
        out = tl.sum(found * share[:, None], 0)  # (D_PAD,)
        tl.store(OUT + to + dim, out.to(OUT.dtype.element_ty), mask=dim < D)
        if SHARES is not None:
            tl.store(SHARES + row * K + items, share, mask=items < K)
        tl.store(ARRIVED + row, 0)
