"""The log-sum-exps of gate.block_logits in one kernel: no logit of a query and a token is ever written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from landmark_cli.attention.kernels.common.configuration import has_warp_groups, padded
from landmark_cli.attention.kernels.common.launch import Launch, LaunchCache, launch
from landmark_cli.attention.kernels.common.operands import operand

# Tiles of queries, those of all heads of a key head side by side, and of a block's tokens: so many at most, and so many
# bytes, twice as many on a Hopper GPU. One of queries and three of keys are held in shared memory, of which older GPUs
# may have 64 KiB.
TILE, TILE_BYTES = 64, 16 << 10


@triton.jit
def block_logits_kernel(Q, K, TEXT, SPANS, OUT, q_row, q_head, q_token, k_row, k_head, k_token, scale, reach, groups,
                        sampled, blocks, REPEATS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
                        QUERIES: tl.constexpr, TOKENS: tl.constexpr, WINDOW: tl.constexpr):  # fmt: skip
    """Program (block, tile of queries, row and key head). WINDOW: a query sees the last `reach` tokens alone."""
    block = tl.program_id(0)
    pair = tl.program_id(2)
    row, group = (pair // groups).to(tl.int64), (pair % groups).to(tl.int64)
    query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    real = query < REPEATS * sampled
    head, number = group * REPEATS + query // sampled, query % sampled
    text = tl.load(TEXT + row * sampled + number, mask=real, other=-1)
    begin = tl.load(SPANS + 2 * (row * blocks + block))
    end = tl.load(SPANS + 2 * (row * blocks + block) + 1)
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    if (begin < end) & (begin <= tl.max(text, 0)):
        lane = tl.arange(0, PADDED)
        queries = Q + row * q_row + head[:, None] * q_head + text[:, None] * q_token + lane[None, :]
        q = tl.load(queries, mask=real[:, None] & (lane < DIM)[None, :], other=0.0)
        for first in range(begin, end, TOKENS):
            token = first + tl.arange(0, TOKENS)
            keys = K + row * k_row + group * k_head + token[None, :] * k_token + lane[:, None]
            k = tl.load(keys, mask=(token < end)[None, :] & (lane < DIM)[:, None], other=0.0)
            logits = tl.dot(q, k, input_precision="ieee") * scale
            seen = (token < end)[None, :] & (token[None, :] <= text[:, None])
            if WINDOW:
                seen = seen & (token[None, :] > text[:, None] - reach)
            logits = tl.where(seen, logits, float("-inf"))
            top = tl.maximum(largest, tl.max(logits, 1))
            finite = tl.where(top == float("-inf"), 0.0, top)
            total = total * tl.exp(largest - finite) + tl.sum(tl.exp(logits - finite[:, None]), 1)
            largest = top
    found = tl.where(total > 0.0, largest + tl.log(total), float("-inf"))
    place = OUT + ((row * groups * REPEATS + head) * sampled + number) * blocks + block
    tl.store(place, found, mask=real)


CALLS = LaunchCache()


def block_logits(q: Tensor, k: Tensor, text: Tensor, spans: Tensor, scale: float, reach: int | None = None) -> Tensor:
    """As `gate.block_logits`: (B, H, S, M) float32. text: (B, S) int64, the queries' places among the n tokens. spans:
    (B, M, 2) int64, each block's tokens. q: (B, H, n, D) and k: (B, G, n, D), copied where the last dimension is not
    dense."""
    q, k = operand(q), operand(k)
    out = q.new_empty((*q.shape[:2], text.shape[1], spans.shape[1]), dtype=torch.float32)
    tensors = q, k, text.contiguous(), spans.contiguous(), out
    kind = q.dtype, q.device, q.shape, k.shape, q.stride(), k.stride(), out.shape, scale, reach
    if not CALLS.repeat(kind, tensors):
        CALLS.make(kind, tensors, lambda: [launch_block_logits(tensors, scale, reach)])
    return out


def launch_block_logits(tensors: tuple[Tensor, ...], scale: float, reach: int | None) -> Launch | None:
    """Launch the kernel. tensors: queries, keys, text, spans, and what is found."""
    q, k, text, spans, _ = tensors
    batch, heads, _, dim = q.shape
    groups, sampled, blocks = k.shape[1], text.shape[1], spans.shape[1]
    repeats, wide = heads // groups, padded(dim)
    room = TILE_BYTES << has_warp_groups(q.device)
    tile = max(16, min(TILE, room // (wide * q.element_size())))
    programs = blocks, triton.cdiv(repeats * sampled, tile), batch * groups
    arguments = *q.stride()[:3], *k.stride()[:3], float(scale), reach or 0, groups, sampled, blocks
    sizes = {"REPEATS": repeats, "DIM": dim, "PADDED": wide, "QUERIES": tile, "TOKENS": tile}
    constants = sizes | {"WINDOW": reach is not None}
    return launch(block_logits_kernel, programs, tensors, range(5), arguments, constants, {})
