"""Which multiprocessor works on which tiles: one program each, its list worked out here and read by the kernels.

A tile costs about as much as the keys (or rows) it walks over. Tiles are dealt out in the order (some heads at a time,
heaviest first), each to the program that would be free first: what the heads' tiles read stays in the L2 cache, and
light tiles fill the gaps at the end. Short sequences have few tiles a head and want more heads for that.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Iterator

import torch
from torch import Tensor

# What a tile costs beside its walk, in steps of the walk: loading, the masked steps, storing.
TILE_COST = 2.5

# Query heads to work on at a time: so many, whatever their tiles read. More only where all of that fits into the L2
# cache beside the rest, and shortens the longest list by this share.
HEADS_IN_FLIGHT = 8
BYTES_IN_FLIGHT = 17 << 20
WORTH = 0.005


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
    queries: int, offset: int, rows: int, block_size: int, heads: int, group: int, dim: int, device: torch.device
) -> Tensor:
    """The schedule of a kernel whose tiles are `rows` queries of a query head, which read keys and values."""
    costs = query_tile_costs(queries, offset, rows, block_size)
    least = -(-HEADS_IN_FLIGHT // group) * group
    return _table(costs, heads, least, 4 * (queries + offset) * dim // group, device)


@functools.lru_cache(maxsize=256)
def key_schedule(
    queries: int, offset: int, blocks: int, block_size: int, heads: int, group: int, dim: int, device: torch.device
) -> Tensor:
    """The schedule of a kernel whose tiles are `blocks` blocks of a key head, which read queries and gradients."""
    return _table(
        key_tile_costs(queries, offset, blocks, block_size, group), heads, *_key_reads(queries, group, dim), device
    )


def longest_key_walk(
    queries: int, offset: int, blocks: int, block_size: int, heads: int, group: int, dim: int, programs: int
) -> float:
    """How long that kernel takes on so many multiprocessors, in steps of a walk: as long as its busiest program."""
    costs = key_tile_costs(queries, offset, blocks, block_size, group)
    return _busiest(costs, _dealt(costs, heads, *_key_reads(queries, group, dim), programs))


def _key_reads(queries: int, group: int, dim: int) -> tuple[int, int]:
    """Key heads to be in flight at least, and the bytes that the tiles of one read."""
    return -(-HEADS_IN_FLIGHT // group), 4 * queries * dim * group


def _table(costs: list[float], heads: int, least: int, head_bytes: int, device: torch.device) -> Tensor:
    """(turns, programs, 2) int32 on the device: head and tile of each program's turn, tile -1 where none is left."""
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    lists = _dealt(costs, heads, least, head_bytes, programs)
    turns = max(map(len, lists))
    rows = [[work[turn] if turn < len(work) else (0, -1) for work in lists] for turn in range(turns)]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _dealt(costs: list[float], heads: int, least: int, head_bytes: int, programs: int) -> list[list[tuple[int, int]]]:
    """The lists of so many programs. At least `least` heads are in flight; what a head's tiles read is head_bytes."""
    lists, shortest = None, float("inf")
    for in_flight in heads_in_flight(heads, least, head_bytes):
        dealt = deal(costs, heads, in_flight, programs)
        longest = _busiest(costs, dealt)
        if longest < shortest * (1 - WORTH):
            lists, shortest = dealt, longest
    return lists


def _busiest(costs: list[float], lists: list[list[tuple[int, int]]]) -> float:
    return max(sum(costs[tile] for _, tile in work) for work in lists)


def heads_in_flight(heads: int, least: int, head_bytes: int) -> Iterator[int]:
    """How many heads might be worked on at a time, the fewest first."""
    in_flight = min(heads, least)
    yield in_flight
    while in_flight < heads and 2 * in_flight * head_bytes <= BYTES_IN_FLIGHT:
        in_flight = min(2 * in_flight, heads)
        yield in_flight
