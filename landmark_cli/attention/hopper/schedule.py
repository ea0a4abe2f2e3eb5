"""Which multiprocessor works on which tiles: one program each, its list worked out here and read by the kernels.

A tile costs about as much as the keys (or rows) it walks over. Tiles are dealt out in the order (some heads at a time,
heaviest first), each to the program that would be free first: the heads' keys and values stay in the L2 cache together,
and light tiles fill the gaps at the end.
"""

from __future__ import annotations

import functools
import heapq

import torch
from torch import Tensor

# What a tile costs beside its walk, in steps of the walk: loading, the masked steps, storing.
TILE_COST = 2.5


def query_tile_costs(queries: int, offset: int, rows: int, block_size: int) -> list[float]:
    """Cost of each tile of `rows` queries, the first behind `offset` keys: the blocks it touches."""
    ends = (min(first + rows, queries) + offset for first in range(0, queries, rows))
    return [TILE_COST - (-end // block_size) for end in ends]


def key_tile_costs(queries: int, offset: int, blocks: int, block_size: int, group: int) -> list[float]:
    """Cost of each tile of `blocks` blocks of keys: the 64-row tiles of queries that see it, in a whole group."""
    firsts = (max(first - offset, 0) for first in range(0, queries + offset, blocks * block_size))
    return [TILE_COST - group * (-(queries - first) // 64) for first in firsts]


def deal(costs: list[float], heads: int, heads_in_flight: int, programs: int) -> list[list[tuple[int, int]]]:
    """Lists of (head, tile) for so many programs (fewer where there are fewer tiles)."""
    heaviest_first = sorted(range(len(costs)), key=lambda tile: -costs[tile])
    lists = [[] for _ in range(min(programs, heads * len(costs)))]
    free = [(0.0, program) for program in range(len(lists))]
    for first in range(0, heads, heads_in_flight):
        for tile in heaviest_first:
            for head in range(first, min(first + heads_in_flight, heads)):
                busy, program = free[0]
                lists[program].append((head, tile))
                heapq.heapreplace(free, (busy + costs[tile], program))
    return lists


@functools.lru_cache(maxsize=256)
def query_schedule(
    queries: int, offset: int, rows: int, block_size: int, heads: int, heads_in_flight: int, device: torch.device
) -> Tensor:
    """The schedule of a kernel whose tiles are `rows` queries of a head."""
    return _table(query_tile_costs(queries, offset, rows, block_size), heads, heads_in_flight, device)


@functools.lru_cache(maxsize=256)
def key_schedule(
    queries: int,
    offset: int,
    blocks: int,
    block_size: int,
    group: int,
    heads: int,
    heads_in_flight: int,
    device: torch.device,
) -> Tensor:
    """The schedule of a kernel whose tiles are `blocks` blocks of a key head."""
    return _table(key_tile_costs(queries, offset, blocks, block_size, group), heads, heads_in_flight, device)


def _table(costs: list[float], heads: int, heads_in_flight: int, device: torch.device) -> Tensor:
    """(turns, programs, 2) int32 on the device: head and tile of each program's turn, tile -1 where none is left."""
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    lists = deal(costs, heads, heads_in_flight, programs)
    turns = max(map(len, lists))
    rows = [[work[turn] if turn < len(work) else (0, -1) for work in lists] for turn in range(turns)]
    return torch.tensor(rows, dtype=torch.int32, device=device)
