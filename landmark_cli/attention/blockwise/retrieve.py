"""What queries find in the blocks that they chose: block by block, each with all queries that chose it.

A block is fetched once for many queries, whose products with it are then products of matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..cache import Chunk, LayerBlocks
from ..rerank import sharpened
from ..retrieval import block_distance
from .pieces import pieces
from .window import softmax_and_lse

MINUS_INFINITY = float("-inf")
# The most queries of a tile. Its blocks' keys and values then take little of the time that products with them take.
LARGEST_TILE = 128
# Of so few queries of a key head hardly two choose the same block: finding out takes longer than fetching it twice.
FEW_QUERIES = 8


class Tiles(NamedTuple):
    """Pairs of a query and a block, in tiles of up to as many pairs as a tile has places; all of a tile's have one
    block.

    pages: (tiles,) the block of each, as LayerBlocks.blocks has them: (row * G + key head) * capacity + slot.
    pairs: (tiles, places) which pairs, of number 0 .. pairs - 1; in a place that is left over any pair.
    place: (pairs,) the place of each, of number 0 .. tiles * places - 1; tiles * places where there is no block.
    """

    pages: Tensor
    pairs: Tensor
    place: Tensor


class Found(NamedTuple):
    """What queries find in their blocks, the k chosen blocks in front.

    logits: (k, B, H, T) float32 in the outer softmax, as `retrieval.read_blocks` gives them, minus infinity where there
    is no block or the query is padding. outputs: (places + 1, D) float32, by the inner softmax. place: (k, B * H * T),
    which of these is a query's.
    """

    logits: Tensor
    outputs: Tensor
    place: Tensor

    def add_to(self, out: Tensor, shares: Iterable[Tensor]) -> None:
        """Add the outputs, each with its share, k times (B, H, T), to out (B, H, T, D)."""
        for place, share in zip(self.place, shares, strict=True):
            out.addcmul_(self.outputs.index_select(0, place).view(out.shape), share.unsqueeze(-1))


def read_blocks(q: Tensor, blocks: LayerBlocks, chunk: Chunk, ages: Tensor, scale: float) -> Found:
    """The twin of `retrieval.read_blocks`."""
    dim, joint, top_k = q.shape[-1], blocks.settings.joint, ages.shape[-1]
    tiles = _tiles(_blocks_first(ages, q), blocks, chunk)
    count, places = tiles.pairs.shape
    # The last one is for where there is no block.
    logits = torch.empty(count * places + 1, device=q.device)
    outputs = torch.empty(count * places + 1, dim, device=q.device)
    logits[-1], outputs[-1] = MINUS_INFINITY, 0.0
    by_tile = logits[:-1].view(-1, places), outputs[:-1].view(-1, places, dim)
    distance = block_distance(ages, chunk, blocks.settings)
    for at, products, fetched in _products(q, blocks, chunk, tiles, distance, scale):
        if not joint:
            by_tile[0][at] = products[..., -1]
        products[..., -1] = MINUS_INFINITY
        if joint:
            _, by_tile[0][at] = softmax_and_lse(products, out=products)
        else:
            torch.softmax(products, dim=-1, out=products)
        torch.bmm(products, fetched[:, 1], out=by_tile[1][at])
    shape = top_k, *q.shape[:3]
    logits = sharpened(logits.index_select(0, tiles.place).view(shape), blocks.settings.block_temperature, dim=0)
    return Found(logits, outputs, tiles.place.view(top_k, -1))


def text_scores(q: Tensor, blocks: LayerBlocks, chunk: Chunk, ages: Tensor, distance: Tensor, scale: float) -> Tensor:
    """The log-sum-exps of blocks' text, (B, H, T, n) float32, minus infinity where there is no block. ages, distance:
    (B, H, T, n), which blocks, and how many slots before the tail block they stand."""
    tiles = _tiles(_blocks_first(ages, q), blocks, chunk)
    count, places = tiles.pairs.shape
    scores = torch.empty(count * places + 1, device=q.device)
    scores[-1] = MINUS_INFINITY
    for at, products, _ in _products(q, blocks, chunk, tiles, distance, scale, with_values=False):
        scores[:-1].view(-1, places)[at] = torch.logsumexp(products[..., :-1], dim=-1)
    return scores.index_select(0, tiles.place).view(-1, *q.shape[:3]).permute(1, 2, 3, 0)


def _blocks_first(of_queries: Tensor, q: Tensor) -> Tensor:
    """(n, B, H, T) of (B, H or 1, T or 1, n)."""
    return of_queries.permute(3, 0, 1, 2).expand(-1, *q.shape[:3])


def _products(
    q: Tensor,
    blocks: LayerBlocks,
    chunk: Chunk,
    tiles: Tiles,
    distance: Tensor,
    scale: float,
    with_values: bool = True,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some tiles at a time: which, the products of their queries with their blocks' keys, (tiles, places, block_size),
    to be overwritten, and the blocks' keys and, unless they are not wanted, values, (tiles, 1 or 2, block_size, D).
    distance: as `retrieval.block_distance` gives."""
    dim, size = q.shape[-1], blocks.settings.block_size
    absolute = blocks.settings.positions == "absolute"
    cos, sin = blocks.rotations.table((chunk.most_cached if absolute else blocks.settings.top_k) + 2, q.device)
    distance = _blocks_first(distance, q).flatten()
    queries = (q.float() * scale).reshape(-1, dim)
    stored = blocks.blocks.flatten(0, 2)[:, : 1 + with_values]
    if blocks.fetching:
        needed = torch.zeros(len(stored), dtype=torch.bool, device=q.device)
        needed[tiles.pages] = True
        blocks.require(needed)
    count, places = tiles.pairs.shape
    for at in pieces(count, 2 * size * dim + places * (size + 2 * dim)):
        pairs = tiles.pairs[at].flatten()
        slot = distance.index_select(0, pairs)
        rotated = queries.index_select(0, pairs % len(queries))
        _rotate_in_place(rotated, cos.index_select(0, slot), sin.index_select(0, slot))
        fetched = stored.index_select(0, tiles.pages[at].to(stored.device)).to(q.device, torch.float32)
        yield at, rotated.view(-1, places, dim) @ fetched[:, 0].transpose(1, 2), fetched


def _rotate_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """`rotary.rotate` of x (n, D) by cos, sin (n, rotary_dim / 2), all float32."""
    half = cos.shape[-1]
    first, second = x[:, :half], x[:, half : 2 * half]
    before = first.clone()
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(before, sin)


def _tiles(ages: Tensor, blocks: LayerBlocks, chunk: Chunk) -> Tiles:
    """Pairs by their blocks; ages: (k, B, H, T), 0 for no block. Pairs number through ages as it is."""
    _, _, heads, tokens = ages.shape
    key_heads, capacity = blocks.landmark_keys.shape[1:3]
    row = chunk.rows.long()[:, None] * key_heads
    key_row = row + torch.arange(heads, device=ages.device) // (heads // key_heads)
    page = key_row[..., None] * capacity + (chunk.blocks[:, None, None] - ages) % capacity
    cached = min(min(count, chunk.retrievable) for count in chunk.host_blocks)
    everywhere = cached >= len(ages) and min(chunk.host_lengths) == chunk.width
    chosen = None if everywhere else (ages > 0) & chunk.real[:, None]
    if heads // key_heads * tokens <= FEW_QUERIES and chosen is None:
        pairs = torch.arange(page.numel(), device=page.device)
        return Tiles(page.flatten(), pairs[:, None], pairs)
    return _by_page(page, chosen, blocks.landmark_keys.shape[:3].numel())


def _by_page(page: Tensor, chosen: Tensor | None, pages: int) -> Tiles:
    """The tiles of pairs whose blocks are page, (k, B, H, T), of so many pages. chosen: where there is a block."""
    count = total = page.numel()
    # Numbers of 32 bits are sorted several times as fast.
    page = page.int()
    if chosen is not None:
        page = torch.where(chosen, page, pages)
        count = int(chosen.sum())
    page, order = page.flatten().sort(stable=True)
    page, order = page[:count], order[:count]
    page, queries = torch.unique_consecutive(page, return_counts=True)
    places = min(LARGEST_TILE, 1 << (max(1, count // max(1, len(page))) - 1).bit_length())

    # Of each block its tiles, of each tile where its pairs stand in the order, and of each pair its place.
    tiles, number = (queries + places - 1) // places, torch.arange(len(page), device=page.device)
    first, first_tile = queries.cumsum(0) - queries, tiles.cumsum(0) - tiles
    of_tile, of_pair = number.repeat_interleave(tiles), number.repeat_interleave(queries)
    index = torch.arange(len(of_tile), device=page.device) - first_tile[of_tile]
    index = (first[of_tile] + index * places)[:, None] + torch.arange(places, device=page.device)
    place = torch.full((total,), len(of_tile) * places, device=page.device)
    place[order] = (first_tile * places - first)[of_pair] + torch.arange(count, device=page.device)
    return Tiles(page[of_tile].long(), order[index.clamp(max=max(0, count - 1))], place)
