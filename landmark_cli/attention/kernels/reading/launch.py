"""Reading a chunk with the kernels: what runs in which order, on which grids."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..common.configuration import Configuration
from ..common.dependent import announcing
from ..common.launch import on_device
from ..common.tensors import empty_heads_last
from .attend import attend_kernel
from .call import MAX_TOP_K, STEP_TOKENS, Blocks, Call, Chunk, Settings, strides
from .configurations import attend_configuration, decode_configuration, merge_configuration, store_rows
from .decode import decode_kernel
from .merge import merge_kernel
from .rerank import rerank_kernel, sharpen_kernel
from .route import count_kernel, fill_kernel, scan_kernel
from .selection import SELECTIONS, select, step_candidates
from .store import fetch_kernel, store_kernel


def attend_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    chunk: Chunk,
    scale: float | None = None,
    traced: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The kernels' twin of `landmark_cli.attention.retrieval.attend_chunk`: same values, no gradients.

    q: (B, H, T, D) and k, v: (B, G, T, D), rotated at the chunk's positions, any strides with a dense last dimension.
    softcap: bound of the logits. sinks: (H,) logits of attention sinks.
    Returns the output (B, H, T, D), in memory (B, T, H, D), zeros on padding; and, if traced and there are blocks to
    retrieve, their ages, (B, H, T, k) int32, 0 where there are fewer, and their shares, (B, H, T, k) float32.

    Only where `why_not` gives no reason. The largest tensor made on the way has B * H * T * top_k * D elements. Nothing
    waits for the device, so calls can be captured in a CUDA graph, except while blocks have still to be fetched.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    with on_device(q):
        call = Call(q, k, v, blocks, chunk, scale, softcap, sinks)
        chooses = min(call.top_k, chunk.most_cached) > 0
        if chooses and call.is_step and not blocks.fetching:
            # Of offloaded blocks too: a step reads so few that finding them room on the GPU takes longer than reading
            # them where they lie, each once.
            return decode(call, traced)
        # The ring has room for the chunk beside all blocks that can still be read.
        store(call)
        if not chooses:
            return merge(call), None, None
        ages = select(call)
        if call.proposed > call.top_k:
            ages = rerank(call, ages)
        pairs = find_pairs(call, ages)
        attend(call, pairs)
        if call.temperature is not None:
            sharpen(call, pairs.logits)
        lse = call.empty(*q.shape[:3], dtype=torch.float32)
        out = merge(call, pairs, lse)
        return (out, pairs.ages, torch.exp2(pairs.logits - lse.unsqueeze(-1))) if traced else (out, None, None)


def why_not(settings: Settings, scale: float | None = None, softcap: float | None = None) -> str | None:
    """Why the kernels cannot read so, naming the setting and what is allowed; None if they can."""
    if settings.top_k > MAX_TOP_K:
        return f"top_k is {settings.top_k}; the Triton kernels retrieve at most {MAX_TOP_K} blocks"
    if settings.proposed > MAX_TOP_K:
        return f"rerank_blocks is {settings.proposed}; the Triton kernels re-rank at most {MAX_TOP_K} blocks"
    if settings.selection not in SELECTIONS:
        return f"selection is {settings.selection}; the Triton kernels know {', '.join(SELECTIONS)}"
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None and not 0.0 < value < math.inf:
            return f"{name} is {value}; the Triton kernels need a positive one"
    return None


def store(call: Call) -> None:
    """Put the chunk's keys and values into their blocks."""
    rows, blocks = store_rows(call), call.blocks
    store_kernel[(triton.cdiv(call.tokens, rows), call.key_rows)](
        call.k, call.v, blocks.blocks, blocks.landmark_keys, call.page_table, call.chunk.counters, call.rotations,
        call.stream_rotation, strides(call.k), strides(call.v), call.tokens, *call.ring, PARTS=call.parts,
        D_PAD=call.dim_pad, BLOCK=call.settings.block_size, ROWS=rows, ABSOLUTE=call.absolute, num_warps=1,
    )  # fmt: skip


@dataclass(frozen=True)
class Pairs:
    """Which queries read which blocks, block by block; the kernels of route.py say what each tensor is.

    ages: (B, H, T, k), expanded. logits: (B, H, T, k) float32, base 2, in the outer softmax. outputs: (B, H, T, k, D),
    or None where logits are all that is asked for.
    """

    ages: Tensor
    count: Tensor
    first: Tensor
    tiles: Tensor
    total: Tensor
    entries: Tensor
    logits: Tensor
    outputs: Tensor | None
    choice: Configuration


def find_pairs(call: Call, ages: Tensor, scoring: bool = False) -> Pairs:
    """List the pairs of queries and blocks; ages as select gives. scoring: blocks are to be compared with others, at
    the distance of scored_distance in route.py, and not to be read."""
    width = ages.shape[-1]
    ages = ages.expand(*call.q.shape[:3], width)
    key_rows, capacity, rows = call.key_rows, call.capacity, call.query_rows
    pairs = rows * width
    choice = attend_configuration(call, pairs / call.chunk.most_cached)
    count = torch.zeros(key_rows, capacity, dtype=torch.int32, device=call.q.device)
    slot, number, distance = (call.empty(key_rows, pairs) for _ in range(3))
    logits = call.empty(*call.q.shape[:3], width, dtype=torch.float32)
    k_pad = triton.next_power_of_2(width)
    tile = max(1, min(128, 1024 // k_pad))
    count_kernel[(triton.cdiv(rows, tile), key_rows)](
        ages, call.chunk.counters, count, slot, number, distance, logits, strides(ages), call.tokens, *call.ring,
        *call.reach, HEADS_PER_KEY=call.heads_per_key, K=width, K_PAD=k_pad, ROWS=tile, ABSOLUTE=call.absolute,
        SCORING=scoring,
    )  # fmt: skip
    most_tiles = pairs // choice.rows + min(capacity, pairs)
    first, total = call.empty(key_rows, capacity), call.empty(key_rows)
    tiles = call.empty(key_rows, most_tiles, dtype=torch.int64)
    slots = min(4096, triton.next_power_of_2(capacity))
    scan_kernel[(key_rows,)](
        count, first, tiles, total, capacity, most_tiles, ROWS=choice.rows, SLOTS=slots, num_warps=8
    )
    entries = call.empty(key_rows, pairs, dtype=torch.int64)
    size = min(1024, triton.next_power_of_2(pairs))
    fill_kernel[(triton.cdiv(pairs, size), key_rows)](
        slot, number, distance, first, entries, pairs, capacity, SIZE=size
    )
    outputs = None if scoring else call.q.new_empty(*call.q.shape[:3], width, call.dim)
    return Pairs(ages, count, first, tiles, total, entries, logits, outputs, choice)


def needed_pages(call: Call, pairs: Pairs) -> Tensor:
    """Which of all pages queries have chosen, (pages,) bool."""
    chosen = (pairs.count > 0).view(call.batch, -1)
    if call.batch == call.blocks.blocks.shape[0]:
        return chosen.flatten()
    needed = chosen.new_zeros(call.blocks.blocks.shape[0], chosen.shape[1])
    return needed.index_copy_(0, call.chunk.rows.long(), chosen).flatten()


def rerank(call: Call, proposed: Tensor) -> Tensor:
    """Of the blocks that landmarks propose, (B, H, T, n), the ages of those whose text counts most, (B, H, T, k)."""
    pairs = find_pairs(call, proposed, scoring=True)
    attend(call, pairs)
    best = call.empty(*proposed.shape[:3], call.top_k)
    count = proposed.shape[-1]
    n_pad = triton.next_power_of_2(count)
    size = max(1, 256 // n_pad)
    rows = best[..., 0].numel()
    rerank_kernel[(triton.cdiv(rows, size),)](
        proposed, pairs.logits, best, rows, N=count, N_PAD=n_pad, K=call.top_k, ROWS=size
    )
    return best


def sharpen(call: Call, logits: Tensor) -> None:
    """The logits of retrieved blocks, (B, H, T, k), by the temperature, in place."""
    k_pad = triton.next_power_of_2(logits.shape[-1])
    rows, size = logits[..., 0].numel(), max(1, 1024 // k_pad)
    sharpen_kernel[(triton.cdiv(rows, size),)](
        logits, rows, call.temperature, K=logits.shape[-1], K_PAD=k_pad, ROWS=size
    )


def attend(call: Call, pairs: Pairs) -> None:
    """Fill in the pairs' logits and outputs; of blocks that lie elsewhere, once they are fetched."""
    if call.blocks.fetching:
        call.blocks.require(needed_pages(call, pairs))
    if call.blocks.pages is not None:
        fetch(call, pairs)
    rotations = call.rotations
    if not call.exact:
        # Half the bytes: the tables are read for every pair, and round off less than 16-bit queries do.
        rotations = call.blocks.rotations.table(rotations[0].shape[0], call.q.device, torch.float16)
    attend_kernel[(pairs.tiles.shape[1], call.key_rows)](
        call.q, call.blocks.blocks, call.pool, call.page_table, call.chunk.counters, rotations, pairs.count,
        pairs.first, pairs.tiles, pairs.total, pairs.entries, pairs.outputs, pairs.logits, strides(call.q), call.tokens,
        *call.ring, pairs.entries.shape[1], pairs.tiles.shape[1], call.scaling, **call.heads_and_parts,
        D_PAD=call.dim_pad, K=pairs.ages.shape[-1], BLOCK=call.settings.block_size, ROWS=pairs.choice.rows,
        COLS=pairs.choice.cols, PRECISION=call.precision, JOINT=call.settings.joint,
        **pairs.choice.launch_options(),
    )  # fmt: skip


def merge(call: Call, pairs: Pairs | None = None, lse: Tensor | None = None) -> Tensor:
    """The chunk's attention to itself and the tail block, merged with the pairs: (B, H, T, D). lse: where its
    log-sum-exp goes (base 2)."""
    out = empty_heads_last(call.q)
    block_size, choice = call.settings.block_size, merge_configuration(call)
    outputs, logits = (None, None) if pairs is None else (pairs.outputs, pairs.logits)
    merge_kernel[(triton.cdiv(call.tokens, choice.rows), call.batch * call.heads)](
        call.q, call.k, call.v, call.blocks.blocks, call.chunk.counters, outputs, logits, lse, out,
        call.sinks, *map(strides, (call.q, call.k, call.v, out)), call.tokens, *call.ring, call.scaling,
        HEADS_PER_KEY=call.heads_per_key, D=call.dim, D_PAD=call.dim_pad, BLOCK=block_size,
        RETRIEVED=0 if pairs is None else call.top_k, ROWS=choice.rows, COLS=choice.cols,
        KEY_TILES=triton.cdiv(block_size, choice.cols), PRECISION=call.precision, JOINT=call.settings.joint,
        **choice.launch_options(),
    )  # fmt: skip
    return out


def fetch(call: Call, pairs: Pairs) -> None:
    """Copy the chosen blocks that lie in host memory to the GPU, where it does not hold them already.

    What finds no frame there is read from host memory by the attention itself.
    """
    held = call.blocks.pages
    pages, frames, count = held.admit(needed_pages(call, pairs))
    size = held.pool[0].numel()
    fetch_kernel[(held.frames,)](call.blocks.blocks, held.pool, pages, frames, count, SIZE=size, STEP=1024)


def decode(call: Call, traced: bool = False) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Attention of a step of few tokens: its keys are stored while blocks are chosen, all the rest is one kernel.

    Returns what attend_chunk does.
    """
    found, choice = step_candidates(call, stores=True), decode_configuration(call)
    items, rows = call.top_k + 1 + (call.tokens > 1), call.batch * call.heads * call.tokens
    outputs = call.empty(rows, items, call.dim, dtype=torch.float32)
    logits = call.empty(rows, items, dtype=torch.float32)
    out = empty_heads_last(call.q)
    arrived = call.blocks.arrivals(call.blocks.blocks.shape[0] * call.heads * STEP_TOKENS)
    shape = *call.q.shape[:3], call.top_k
    chosen, shares = (call.empty(*shape), call.empty(*shape, dtype=torch.float32)) if traced else (None, None)
    decode_kernel[(items, rows)](
        call.q, call.blocks.blocks, call.pool, call.page_table, call.chunk.counters, call.rotations, found.ages,
        found.scores, outputs, logits, arrived, out, chosen, shares, call.sinks, strides(call.q), strides(out),
        call.tokens, *call.ring, *call.reach, call.scaling, call.temperature, **call.heads_and_parts,
        D_PAD=call.dim_pad, **found.constants, ITEMS=items, ITEMS_PAD=triton.next_power_of_2(items),
        BLOCK=call.settings.block_size, KEYS=choice.cols, ABSOLUTE=call.absolute, JOINT=call.settings.joint,
        num_warps=choice.warps, **announcing(call.q),
    )  # fmt: skip
    return out, chosen, shares
