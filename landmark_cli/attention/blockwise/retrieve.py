"""What queries find in the blocks that they chose: block by block, each with all queries that chose it.

A block is fetched once for many queries, whose products with it are then products of matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache import Chunk, LayerBlocks
from ..retrieval import block_distance
from .pieces import pieces

MINUS_INFINITY = float("-inf")
# The most queries of a tile. Its blocks' keys and values then take little of the time that products with them take.
LARGEST_TILE = 128
# Of so few queries of a key head hardly two choose the same block: finding out takes longer than fetching it twice.
FEW_QUERIES = 8


@dataclass(frozen=True)
class Tiles:
    """Pairs of a query and a block, in tiles of up to as many pairs as a tile has places; all of a tile's have one
    block.

    pages: (tiles,) the block of each, as LayerBlocks.blocks has them: (row * G + key head) * capacity + slot.
    pairs: (tiles, places) which pairs, of number 0 .. pairs - 1; in a place that is left over any pair.
    target: (tiles, places) the same, but in a place that is left over the number of pairs.
    """

    pages: Tensor
    pairs: Tensor
    target: Tensor


def read_blocks(q: Tensor, blocks: LayerBlocks, chunk: Chunk, ages: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The twin of `retrieval.read_blocks`, with the k chosen blocks in front: landmark logits, (k, B, H, T), minus
    infinity where there is no block or the query is padding, and outputs, (k, B, H, T, D); both float32."""
    batch, heads, tokens, dim = q.shape
    size, top_k = blocks.settings.block_size, ages.shape[-1]
    shape = top_k, batch, heads, tokens
    distance = block_distance(ages, chunk, blocks.settings).permute(3, 0, 1, 2).expand(shape).flatten()
    absolute = blocks.settings.positions == "absolute"
    slots = (chunk.most_cached if absolute else blocks.settings.top_k) + 2
    cos, sin = blocks.rotations.table(slots, q.device)
    tiles = _tiles(ages.permute(3, 0, 1, 2).expand(shape), blocks, chunk)

    queries = (q.float() * scale).reshape(-1, dim)
    stored = blocks.blocks.flatten(0, 2)
    if blocks.fetching:
        needed = torch.zeros(len(stored), dtype=torch.bool, device=q.device)
        needed[tiles.pages] = True
        blocks.require(needed)
    # The last row takes what the places left over give.
    count = len(queries) * top_k
    logits = queries.new_full((count + 1,), MINUS_INFINITY)
    outputs = queries.new_zeros(count + 1, dim)
    places = tiles.pairs.shape[1]
    for at in pieces(len(tiles.pages), 2 * size * dim + places * (size + 2 * dim)):
        pairs = tiles.pairs[at].flatten()
        slot = distance.index_select(0, pairs)
        rotated = queries.index_select(0, pairs % len(queries))
        _rotate_in_place(rotated, cos.index_select(0, slot), sin.index_select(0, slot))
        rotated = rotated.view(-1, places, dim)
        fetched = stored.index_select(0, tiles.pages[at].to(stored.device)).to(q.device, torch.float32)
        keys, values = fetched.unbind(1)
        products = rotated @ keys.transpose(1, 2)
        to = tiles.target[at].flatten()
        logits.index_copy_(0, to, products[..., -1].flatten())
        products[..., -1] = MINUS_INFINITY
        found = torch.softmax(products, dim=-1) @ values
        outputs.index_copy_(0, to, found.view(-1, dim))
    return logits[:-1].view(shape), outputs[:-1].view(*shape, dim)


def _rotate_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """`rotary.rotate` of x (n, D) by cos, sin (n, rotary_dim / 2), all float32."""
    half = cos.shape[-1]
    first, second = x[:, :half], x[:, half : 2 * half]
    before = first.clone()
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(before, sin)


def _tiles(ages: Tensor, blocks: LayerBlocks, chunk: Chunk) -> Tiles:
    """Pairs by their blocks; ages: (k, B, H, T), 0 for no block. Pairs number through ages as it is."""
    _, batch, heads, tokens = ages.shape
    key_heads, capacity = blocks.landmark_keys.shape[1:3]
    row = torch.arange(batch, device=ages.device)[:, None] * key_heads
    key_row = row + torch.arange(heads, device=ages.device) // (heads // key_heads)
    page = key_row[..., None] * capacity + (chunk.blocks[:, None, None] - ages) % capacity
    cached = min(min(count, chunk.retrievable) for count in chunk.host_blocks)
    everywhere = cached >= len(ages) and min(chunk.host_lengths) == chunk.width
    chosen = None if everywhere else (ages > 0) & chunk.real[:, None]
    if heads // key_heads * tokens <= FEW_QUERIES:
        pairs = torch.arange(page.numel(), device=page.device) if chosen is None else chosen.flatten().nonzero()[:, 0]
        pages = page.flatten()
        return Tiles(pages if chosen is None else pages[pairs], pairs[:, None], pairs[:, None])
    return _by_page(page, chosen, batch * key_heads * capacity)


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

    # Of each block its tiles, of each tile where its pairs stand in the order.
    tiles = (queries + places - 1) // places
    of_tile = torch.arange(len(page), device=page.device).repeat_interleave(tiles)
    number = torch.arange(len(of_tile), device=page.device) - (tiles.cumsum(0) - tiles)[of_tile]
    end = queries.cumsum(0)
    first = (end - queries)[of_tile] + number * places
    index = first[:, None] + torch.arange(places, device=page.device)
    pairs = order[index.clamp(max=max(0, count - 1))]
    return Tiles(page[of_tile].long(), pairs, pairs.masked_fill(index >= end[of_tile][:, None], total))
