"""Reading a whole window at once, forward and backward: what runs in which order, on which grids.

Queries, keys and values are those of all chunks of a batch of windows. Some key heads are worked on at a time, since
each pair of a query and a block takes a row of workspace; all chunks of these are worked on at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..common.choices import Choices
from ..common.configuration import padded, product_precision
from ..common.launch import on_device
from ..common.logits import scaling_of
from ..common.operands import operand
from ..common.tensors import empty_heads_last
from ..common.tiles import LOG2E
from .call import PASS, TILE, strides
from .top_k import select_in_window_kernel
from .window_attend import attend_in_window_kernel, merge_in_window_kernel
from .window_backward import own_gradient_kernel, pair_gradient_kernel, sum_keys_kernel, sum_queries_kernel
from .window_configurations import ITEM, KEY_ROWS, window_choices
from .window_route import list_kernel, place_kernel

# Bytes of the rows that pairs take, up to which several key heads are worked on at a time.
PAIR_BYTES = 4 << 30


class Window(NamedTuple):
    """Where chunks and blocks stand, and how they are read; attention/window.py says what the tensors are.

    ages: (B, H or 1, N, k) int32, a selection that is made already (age a: the a-th newest of a query's earlier blocks,
    0, at the end, for none); None where each query and head chooses for itself. one_landmark_key: all landmarks have
    one key before rotation. softcap: bound of the logits, or None. joint: a block's logit in the outer softmax is the
    log-sum-exp of its text's logits in place of its landmark's.
    """

    chunks: Tensor
    blocks: Tensor
    chunk_of: Tensor
    cos: Tensor
    sin: Tensor
    ages: Tensor | None
    explore_seed: Tensor | None
    chunk: int
    block_size: int
    top_k: int
    most_earlier: int
    explore: float
    one_landmark_key: bool
    scale: float
    softcap: float | None = None
    joint: bool = False

    @property
    def score_scaling(self) -> tuple[float, float | None]:
        """What makes scores of products of queries and landmark keys: natural logits, see common/logits.py."""
        return scaling_of(self.scale, self.softcap)

    @property
    def scaling(self) -> tuple[float, float | None]:
        """What makes base-2 logits of products."""
        return scaling_of(self.scale, self.softcap, LOG2E.value)


class Routes(NamedTuple):
    """Which query reads which block, of all key heads.

    turns: (G, P) int16, P = B * H / G * N * k pairs of a key head, query by query, k in time order: block slots that
    the query is rotated by, -1 where there is no block. entries: (G, P) int64, pairs sorted by block, pair +
    (turn << 32). bounds: (G, M + 1) int32, where each block's pairs begin, and where all end.
    """

    turns: Tensor
    entries: Tensor
    bounds: Tensor


class Items(NamedTuple):
    """Lists of pairs, cut into items of work: whose list an item belongs to, and each list's first item (and, behind
    the last, the number of all)."""

    list_of: Tensor
    first: Tensor
    lists: int
    most: int


class WindowCall:
    """One layer's window on its way through the kernels. k: blocks that a query reads. pairs: of a key head."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, window: Window):
        self.q, self.k, self.v, self.window = q, k, v, window
        self.batch, self.heads, self.tokens, self.dim = q.shape
        self.key_heads = k.shape[1]
        self.heads_per_key = self.heads // self.key_heads
        self.top_k = min(window.top_k, window.most_earlier)
        self.rows = self.batch * self.heads_per_key * self.tokens
        self.pairs = self.rows * self.top_k
        self.blocks = window.blocks.shape[0]
        if self.pairs >= 1 << 31:
            raise ValueError(f"{self.rows} queries of a key head read {self.top_k} blocks: more than 2**31 of both")
        half = window.cos.shape[1]
        rest = self.dim - 2 * half
        self.parts = half, rest, padded(half), padded(rest)
        self.dim_pad = padded(self.dim)
        self.exact = q.dtype == torch.float32
        self.precision = product_precision(q.dtype)
        # Half the bytes where tables are read for every pair; they round off less than 16-bit queries do.
        tables = window.cos, window.sin
        self.tables = tables if self.exact else tuple(x.to(torch.float16) for x in tables)

    def groups(self) -> Iterator[tuple[int, int]]:
        """(first key head, key heads) of the groups that are worked on one after the other."""
        most = max(1, min(self.key_heads, PAIR_BYTES // (self.pairs * self.dim * self.q.element_size())))
        step = triton.cdiv(self.key_heads, triton.cdiv(self.key_heads, most))
        for first in range(0, self.key_heads, step):
            yield first, min(step, self.key_heads - first)

    def workspace(self) -> Tensor:
        """A row for each pair of the largest group, (key heads, P, D)."""
        return self.q.new_empty(max(count for _, count in self.groups()), self.pairs, self.dim)

    def choices(self, kernel: str) -> Choices:
        return window_choices(kernel, self.q, self.window.block_size, self.top_k)

    def empty(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q.device)


def forward(
    q: Tensor, k: Tensor, v: Tensor, own: Tensor | None, own_lse: Tensor | None, window: Window
) -> tuple[Tensor, Tensor, Routes]:
    """What queries find in the blocks of earlier chunks, by the outer softmax over these and their own chunk's part.

    q: (B, H, N, D) and k, v: (B, G, N, D), rotated by index in the chunk. own, (B, H, N, D), and own_lse, (B, H, N)
    float32: attention within the chunk and its log-sum-exp; None: of blocks of earlier chunks alone.
    Returns out (B, H, N, D), in memory (B, N, H, D), its log-sum-exp (B, H, N) float32, and what backward needs.
    """
    dtype = q.dtype
    q, k, v = (operand(x) for x in (q, k, v))
    with on_device(q):
        call = WindowCall(q, k, v, window)
        if own is not None:
            own, own_lse = operand(own), own_lse.contiguous()
        out = empty_heads_last(q)
        lse = call.empty(*q.shape[:3], dtype=torch.float32)
        routes = Routes(
            call.empty(call.key_heads, call.pairs, dtype=torch.int16),
            call.empty(call.key_heads, call.pairs, dtype=torch.int64),
            call.empty(call.key_heads, call.blocks + 1),
        )
        landmark_keys = landmark_keys_of(call) if window.ages is None else None
        outputs = call.workspace()
        for first, count in call.groups():
            part = Routes(*(x[first : first + count] for x in routes))
            ages = select(call, landmark_keys, first, count) if window.ages is None else given_ages(call, first, count)
            logits = call.empty(count, call.pairs, dtype=torch.float32)
            route(call, ages, part, logits, first)
            attend(call, part, outputs, logits, first)
            merge(call, outputs, logits, own, own_lse, out, lse, first, count)
    return out.to(dtype), lse, routes


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    own: Tensor | None,
    own_lse: Tensor | None,
    routes: Routes,
    window: Window,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dq, dk, dv, down, down_lse) for the gradients of out and, where there is one, of lse."""
    dtype = q.dtype
    dout, q, k, v, out = (operand(x) for x in (dout, q, k, v, out))
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    with on_device(q):
        call = WindowCall(q, k, v, window)
        if own is not None:
            own, own_lse = operand(own), own_lse.contiguous()
        delta, down, down_lse = own_gradient(call, dout, dlse, out, lse, own, own_lse)
        dq = empty_heads_last(q)
        # Tokens behind a document's last complete block are retrieved by nobody.
        dk, dv = empty_heads_last(k).zero_(), empty_heads_last(v).zero_()
        dq_pairs = call.workspace()
        for first, count in call.groups():
            part = Routes(*(x[first : first + count] for x in routes))
            key_gradients(call, dout, lse, delta, part, dq_pairs, dk, dv, first)
            sum_queries(call, dq_pairs, part, dq, first, count)
    down = None if down is None else down.to(dtype)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype), down, down_lse


def landmark_keys_of(call: WindowCall) -> Tensor:
    """(G, M, D): the landmark key of every block, rotated by its offset in its block only, as a block cache has it."""
    from ..common.rotary import rotate

    row, token, number = call.window.blocks.long().unbind(-1)
    keys = call.k[row.clamp(min=0), :, token + call.window.block_size - 1].transpose(0, 1).contiguous()[None]
    cos, sin = (x[number][None, None] for x in (call.window.cos, -call.window.sin))
    return rotate(keys, cos, sin)[0].contiguous()


def select(call: WindowCall, landmark_keys: Tensor, first_head: int, heads: int) -> Tensor:
    """Ages of each query's best blocks, (heads, B, H / G, N, k) int32, the best one first; nothing on padding."""
    window = call.window
    ages = call.empty(heads, call.batch, call.heads_per_key, call.tokens, call.top_k)
    scores = torch.empty_like(ages, dtype=torch.float32) if call.top_k > PASS else None

    def launch(choice, first: int) -> None:
        programs = triton.cdiv(call.heads_per_key * window.chunk, choice.rows), window.chunks.shape[0], heads
        select_in_window_kernel[programs](
            call.q, landmark_keys, window.chunks, window.cos, window.sin, ages, scores, strides(call.q),
            ages.stride()[:4], window.chunk, first_head, call.blocks, window.top_k,
            int(window.one_landmark_key), first, window.score_scaling, HEADS_PER_KEY=call.heads_per_key,
            PARTS=call.parts, K=min(PASS, call.top_k - first), ROWS=choice.rows, COLS=TILE, LATER=first > 0,
            EXACT=call.exact, PRECISION=call.precision, **choice.launch_options(),
        )  # fmt: skip

    for first in range(0, call.top_k, PASS):
        call.choices("select").run(functools.partial(launch, first=first))
    return ages


def given_ages(call: WindowCall, first_head: int, heads: int) -> Tensor:
    """What select would return, of a selection that is made already: a view."""
    ages = call.window.ages.expand(*call.q.shape[:3], call.top_k)
    ages = ages.unflatten(1, (call.key_heads, call.heads_per_key)).transpose(0, 1)
    return ages[first_head : first_head + heads]


def route(call: WindowCall, ages: Tensor, routes: Routes, logits: Tensor, first_head: int) -> None:
    """Fill in the routes of some key heads, and minus infinity into the logits of pairs without a block."""
    window, heads = call.window, ages.shape[0]
    narrow = call.blocks < 1 << 16
    keys = call.empty(heads, call.pairs, dtype=torch.int16 if narrow else torch.int32)
    bias = 1 << 15 if narrow else 0
    k_pad = triton.next_power_of_2(call.top_k)
    tile = max(1, min(128, 1024 // k_pad))
    threshold = math.ceil(window.explore * (1 << 24)) if window.ages is None else 0
    place_kernel[(triton.cdiv(call.rows, tile), heads)](
        ages, window.chunks, window.chunk_of, window.blocks, window.explore_seed, routes.turns, keys, logits,
        ages.stride()[:4], call.tokens, call.rows, call.heads, first_head, call.blocks, window.top_k, threshold,
        HEADS_PER_KEY=call.heads_per_key, K=call.top_k, K_PAD=k_pad, ROWS=tile, BIAS=bias, EXPLORE=threshold > 0,
    )  # fmt: skip
    edges = torch.arange(call.blocks + 1, device=keys.device).sub_(bias).to(keys.dtype)
    for head in range(heads):
        # A radix sort of 16-bit numbers: two passes over the pairs.
        ordered, order = keys[head].sort(stable=True)
        routes.entries[head].copy_(order)
        torch.searchsorted(ordered, edges, out_int32=True, out=routes.bounds[head])
    size = min(1024, triton.next_power_of_2(call.pairs))
    list_kernel[(triton.cdiv(call.pairs, size), heads)](routes.entries, routes.turns, call.pairs, SIZE=size)


def items_of(call: WindowCall, routes: Routes, size: int) -> Items:
    """The items of `size` pairs that the lists of some key heads are worked off in."""
    counts = routes.bounds.diff(dim=1).flatten()
    items = (counts + (size - 1)) // size
    lists, most = len(items), routes.entries.numel() // size + len(items)
    first = torch.zeros(lists + 1, dtype=torch.int32, device=items.device)
    torch.cumsum(items, 0, dtype=torch.int32, out=first[1:])
    places = torch.arange(most, dtype=torch.int32, device=items.device)
    return Items(torch.searchsorted(first[1:], places, right=True, out_int32=True), first, lists, most)


def attend(call: WindowCall, routes: Routes, outputs: Tensor, logits: Tensor, first_head: int) -> None:
    """Fill in what the pairs of some key heads find: outputs (heads, P, D), and logits (heads, P), base 2."""

    def launch(choice) -> None:
        items = items_of(call, routes, choice.rows)
        attend_in_window_kernel[(items.most,)](
            call.q, call.k, call.v, *call.tables, call.window.blocks, routes.entries, routes.bounds, items.list_of,
            items.first, outputs, logits, strides(call.q), strides(call.k), strides(call.v), call.tokens, first_head,
            call.blocks, items.lists, call.pairs, call.window.scaling, HEADS_PER_KEY=call.heads_per_key,
            PARTS=call.parts, D_PAD=call.dim_pad, K=call.top_k, BLOCK=call.window.block_size, ROWS=choice.rows,
            COLS=choice.cols, PRECISION=call.precision, JOINT=call.window.joint, **choice.launch_options(),
        )  # fmt: skip

    call.choices("attend").run(launch)


def merge(call: WindowCall, outputs, logits, own, own_lse, out, lse, first_head: int, heads: int) -> None:
    """Put the pairs of some key heads and the chunk's own part together, into out and lse."""
    group_heads = heads * call.heads_per_key

    def launch(choice) -> None:
        merge_in_window_kernel[(triton.cdiv(call.tokens, choice.rows), call.batch * group_heads)](
            outputs, logits, own, own_lse, out, lse, (0, 0, 0) if own is None else strides(own), strides(out),
            call.tokens, group_heads, call.heads, first_head, call.pairs, HEADS_PER_KEY=call.heads_per_key,
            D=call.dim, D_PAD=call.dim_pad, K=call.top_k, ROWS=choice.rows, **choice.launch_options(),
        )  # fmt: skip

    call.choices("merge").run(launch)


def own_gradient(
    call: WindowCall, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, own: Tensor | None, own_lse
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(rowsum(dO * O) - dlse, (B, H, N) float32; the gradients of own and own_lse, if there are these)."""
    delta = torch.empty_like(lse)
    down, down_lse = (None, None) if own is None else (empty_heads_last(own), torch.empty_like(own_lse))
    none = 0, 0, 0

    def launch(choice) -> None:
        own_gradient_kernel[(triton.cdiv(call.tokens, choice.rows), call.batch * call.heads)](
            dout, out, lse, dlse, own, own_lse, delta, down, down_lse, strides(dout), strides(out),
            none if own is None else strides(own), none if own is None else strides(down), call.tokens, call.heads,
            D=call.dim, D_PAD=call.dim_pad, ROWS=choice.rows, **choice.launch_options(),
        )  # fmt: skip

    call.choices("own_gradient").run(launch)
    return delta, down, down_lse


def key_gradients(call: WindowCall, dout, lse, delta, routes: Routes, dq_pairs, dk, dv, first_head: int) -> None:
    """dk and dv of some key heads, and the gradients of their pairs' rotated queries, (heads, P, D)."""
    window, heads = call.window, routes.bounds.shape[0]
    items = items_of(call, routes, ITEM)
    sums = call.empty(items.most, 2, window.block_size, call.dim, dtype=torch.float32)

    def launch(choice, part: int) -> None:
        pair_gradient_kernel[(items.most,)](
            call.q, call.k, call.v, dout, lse, delta, *call.tables, window.blocks, routes.entries, routes.bounds,
            items.list_of, items.first, dq_pairs, sums, strides(call.q), strides(call.k), strides(call.v),
            strides(dout), call.tokens, call.heads, first_head, call.blocks, items.lists, call.pairs,
            window.scaling, window.scale, HEADS_PER_KEY=call.heads_per_key, PARTS=call.parts, K=call.top_k,
            BLOCK=window.block_size, ROWS=choice.rows, COLS=choice.cols, SIZE=ITEM, PART=part,
            PRECISION=call.precision, JOINT=window.joint, **choice.launch_options(),
        )  # fmt: skip

    # Two accumulators of a block's size: those of wide blocks and heads do not fit into the registers together.
    whole = padded(window.block_size) * call.dim_pad <= 64 * 128
    for part in (-1,) if whole else range(2 + (call.parts[1] > 0)):
        call.choices("pair_gradient").run(functools.partial(launch, part=part))
    rows = min(KEY_ROWS, padded(window.block_size))
    for which, gradient in enumerate((dk, dv)):
        sum_keys_kernel[(call.blocks, heads, triton.cdiv(window.block_size, rows))](
            sums, items.first, window.blocks, gradient, strides(gradient), first_head, call.blocks, which,
            BLOCK=window.block_size, D=call.dim, D_PAD=call.dim_pad, ROWS=rows,
        )  # fmt: skip


def sum_queries(call: WindowCall, dq_pairs: Tensor, routes: Routes, dq: Tensor, first_head: int, heads: int) -> None:
    """dq of some key heads: the gradients of a query's pairs, rotated back and added."""
    group_heads = heads * call.heads_per_key

    def launch(choice) -> None:
        sum_queries_kernel[(triton.cdiv(call.tokens, choice.rows), call.batch * group_heads)](
            dq_pairs, routes.turns, *call.tables, dq, strides(dq), call.tokens, group_heads, call.heads, first_head,
            call.pairs, HEADS_PER_KEY=call.heads_per_key, PARTS=call.parts, K=call.top_k, ROWS=choice.rows,
            **choice.launch_options(),
        )  # fmt: skip

    call.choices("sum_queries").run(launch)
