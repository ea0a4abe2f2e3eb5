"""Attention of tokens to the blocks that they stand in and to those before these, without retrieval.

The definition's weights, outer(landmark) * inner(token), are those of a softmax in every block, whose results the outer
softmax puts together. So every block is a small attention of its own, and the blocks before it are rows of its length.
(A block at a time by PyTorch's fused attention, which tells log-sum-exps too, is as fast with blocks of 64 tokens, and
three times as slow with blocks of 16: what it finds in each has to be written and added up.)

With joint, where landmarks are no keys, the text of all earlier blocks has one softmax, which is then put together with
the own block's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .pieces import PIECE, pieces

MINUS_INFINITY = float("-inf")


def attend_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    scale: float,
    tokens: int | None = None,
    joint: bool = False,
) -> tuple[Tensor, Tensor]:
    """What `reference.landmark_attention` gives for tokens without padding: the output, (B, H, Tq, D), and the
    log-sum-exp of the outer softmax, (B, H, Tq), both float32.

    q: (B, H, Tq, D), the last Tq of the keys' tokens. k, v: (B, G, Tk, D); the first key begins a block. tokens: how
    many of the keys there are, Tk by default; behind them stands what is no key, nor nan. joint: as there.
    """
    batch, heads, queries, dim = q.shape
    key_heads, tokens = k.shape[1], k.shape[2] if tokens is None else tokens
    rows, each = batch * key_heads, heads // key_heads
    # (rows, heads of a key head, Tq, D) and (rows, blocks * block_size, D).
    q = q.float().reshape(rows, each, queries, dim) * scale
    k, v = (_whole_blocks(x.float().reshape(rows, -1, dim), block_size) for x in (k, v))
    out, lse = q.new_empty(rows, each, queries, dim), q.new_empty(rows, each, queries)
    first = tokens - queries
    for begin, end in _runs(first, tokens, block_size):
        _attend_to_own_blocks(q, k, v, out, lse, begin, end, first, block_size)
    for begin, end, at in _tiles(first, tokens, block_size, rows, each):
        _add_earlier_blocks(q[at], k[at], v[at], out[at], lse[at], begin, end, first, block_size, joint)
    return out.view(batch, heads, queries, dim), lse.view(batch, heads, queries)


def _whole_blocks(x: Tensor, block_size: int) -> Tensor:
    """x (rows, T, D), filled up with zeros to whole blocks."""
    missing = -x.shape[1] % block_size
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()


def _runs(first: int, last: int, block_size: int) -> Iterator[tuple[int, int]]:
    """The tokens first .. last - 1 in runs: what begins inside a block, whole blocks, and what ends inside a block."""
    bounds = [first, min(last, -(-first // block_size) * block_size), max(first, last // block_size * block_size), last]
    bounds.sort()
    for begin, end in zip(bounds, bounds[1:], strict=False):
        if begin < end:
            yield begin, end


def _attend_to_own_blocks(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, begin: int, end: int, first: int, block_size: int
) -> None:
    """Have tokens begin .. end - 1, a part of one block or whole blocks, attend to the text before them in their own
    block. first: the token of the first query."""
    rows, each, _, dim = q.shape
    offset, length = begin % block_size, min(end - begin, block_size)
    count = (end - begin) // length
    seen = offset + length
    unseen = _unseen(offset, length, block_size, q.device)

    def by_block(x: Tensor, numbers: slice) -> Tensor:
        """(rows, each, Tq, ..) -> (rows, each, blocks, length, ..), a view."""
        x = x[:, :, begin - first : end - first]
        return x.unflatten(2, (count, length))[:, :, numbers]

    for numbers in pieces(count, rows * each * length * seen):
        block = slice(begin // block_size + numbers.start, begin // block_size + numbers.stop)
        keys, values = (x.unflatten(1, (-1, block_size))[:, block, :seen].flatten(0, 1) for x in (k, v))
        queries = by_block(q, numbers).transpose(1, 2)
        logits = queries.reshape(-1, each * length, dim) @ keys.transpose(1, 2)
        logits.view(-1, each, length, seen).add_(unseen)
        weights, total = softmax_and_lse(logits)
        by_block(out, numbers).copy_((weights @ values).view(queries.shape).transpose(1, 2))
        by_block(lse, numbers).copy_(total.view(queries.shape[:-1]).transpose(1, 2))


@functools.lru_cache(maxsize=64)
def _unseen(offset: int, length: int, block_size: int, device: torch.device) -> Tensor:
    """(length, offset + length): minus infinity where a key of a block stands behind a query, whose first has this
    offset, or is the landmark, which nothing sees; else 0."""
    index = torch.arange(offset + length, device=device)
    unseen = (index > index[offset:, None]) | (index == block_size - 1)
    return torch.zeros(unseen.shape, device=device).masked_fill_(unseen, MINUS_INFINITY)


def _tiles(first: int, last: int, block_size: int, rows: int, each: int) -> Iterator[tuple[int, int, slice]]:
    """Pieces of the tokens first .. last - 1 with blocks before them: tokens that begin and end with blocks, and rows.

    A piece of several blocks has logits for blocks that some of its tokens do not see, so it is no larger than it must.
    """
    # The first block has none before it.
    block, room = max(1, first // block_size), PIECE // (rows * each * block_size**2)
    while block * block_size < last:
        # So many blocks that their logits, width * (block + width - 1) blocks of them, are a piece.
        width = max(1, (math.isqrt((block - 1) ** 2 + 4 * room) - block + 1) // 2)
        begin, end = max(first, block * block_size), min(last, (block + width) * block_size)
        for at in pieces(rows, each * (end - begin) * ((end - 1) // block_size) * block_size):
            yield begin, end, at
        block += width


def _add_earlier_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    begin: int,
    end: int,
    first: int,
    block_size: int,
    joint: bool,
) -> None:
    """Put together what tokens begin .. end - 1 have found in their own blocks, in out and lse, and what they find in
    those before."""
    rows, each, _, dim = q.shape
    blocks = (end - 1) // block_size
    at, width = slice(begin - first, end - first), end - begin
    logits = q[:, :, at].reshape(rows, each * width, dim) @ k[:, : blocks * block_size].transpose(1, 2)
    logits = logits.view(rows, each, width, blocks, block_size)
    unseen = _not_before(begin, end, block_size, q.device) if begin // block_size < blocks else None
    own, own_lse, values = out[:, :, at], lse[:, :, at], v[:, : blocks * block_size]
    # Softmaxes in place, for what is written elsewhere pushes what is read out of the cache.
    if joint:
        logits[..., -1] = MINUS_INFINITY
        if unseen is not None:
            logits.masked_fill_(unseen.unsqueeze(-1), MINUS_INFINITY)
        logits = logits.flatten(-2)
        weights, earlier = softmax_and_lse(logits, out=logits)
        found = (weights.view(rows, each * width, -1) @ values).view(own.shape)
        total = torch.logaddexp(earlier, own_lse)
        own.mul_(torch.exp(own_lse - total).unsqueeze(-1)).addcmul_(found, torch.exp(earlier - total).unsqueeze(-1))
    else:
        # (rows, each, width, blocks + 1): the landmarks' logits, and the own block's.
        outer = torch.cat([logits[..., -1], own_lse.unsqueeze(-1)], dim=-1)
        if unseen is not None:
            outer[..., :-1].masked_fill_(unseen, MINUS_INFINITY)
        share, total = softmax_and_lse(outer)
        logits[..., -1] = MINUS_INFINITY
        weights = torch.softmax(logits, dim=-1, out=logits).mul_(share[..., :-1, None])
        shared = (own * share[..., -1:]).view(rows, each * width, dim)
        own.copy_(torch.baddbmm(shared, weights.view(rows, each * width, -1), values).view(own.shape))
    own_lse.copy_(total)


def softmax_and_lse(logits: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The softmax over the last dimension, (.., n), and the log-sum-exp, (..), of logits of which one at least is
    finite: the largest weight is exp(its logit - log-sum-exp), and no smaller than 1 / n. out: where the softmax goes,
    which may be the logits themselves."""
    top = logits.amax(dim=-1)
    weights = torch.softmax(logits, dim=-1, out=out)
    return weights, top - weights.amax(dim=-1).log()


def _not_before(begin: int, end: int, block_size: int, device: torch.device) -> Tensor:
    """(tokens, blocks) bool: which of the blocks before the last token's do not end before a token's block."""
    block = torch.arange(begin, end, device=device) // block_size
    return torch.arange((end - 1) // block_size, device=device) >= block[:, None]
