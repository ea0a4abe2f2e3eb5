"""How many key heads the Hopper kernels' backward works on at a time.

Statistics are bounded (see common/statistics.py), so backward may take several launches. A launch lasts as long as its
heaviest tile, and a tile of the second kernel walks over the rows of a whole group: too few key heads at a time, and
most multiprocessors have nothing to do while the heaviest tiles go on.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..common.statistics import Part, head_bytes, part_size, split, usual_bound
from .key_gradient import CONSUMERS
from .schedule import longest_key_walk

# Bytes that a part's statistics may take, however small q is.
LEAST_BOUND = 128 << 20

# Other heads at a time than usual, and perhaps more memory, have to shorten the second kernel by this share.
WORTH = 0.05

# What a launch costs beside its work, in steps of a walk.
LAUNCH_COST = 5.0


def backward_parts(q: Tensor, k: Tensor, block_size: int) -> tuple[list[Part], int]:
    """As `common.statistics.backward_parts`; the statistics take at most 1.6 times the memory of q, or 128 MiB if
    that is more."""
    return _backward_parts(q.shape, k.shape, block_size, q.device, usual_bound(q), LEAST_BOUND)


@functools.lru_cache(maxsize=1024)
def _backward_parts(
    q_shape: torch.Size, k_shape: torch.Size, block_size: int, device: torch.device, usual: int, least: int
) -> tuple[list[Part], int]:
    per_head, bound = head_bytes(q_shape, k_shape, block_size), max(usual, least)
    if per_head > bound:
        return split(q_shape, k_shape, block_size, *part_size(q_shape, k_shape, block_size, bound))
    step = part_size(q_shape, k_shape, block_size, usual)[0] if per_head <= usual else None
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    step = balanced(q_shape, k_shape, block_size, bound // per_head, step, programs)
    return split(q_shape, k_shape, block_size, step, q_shape[2])


def balanced(
    q_shape: torch.Size, k_shape: torch.Size, block_size: int, most: int, usual: int | None, programs: int
) -> int:
    """Key heads at a time, at most `most`: the usual number, if there is one, unless another keeps the multiprocessors
    busier; of several that do, the smallest."""
    batch, heads, queries, dim = q_shape
    key_heads, offset, group = batch * k_shape[1], k_shape[2] - queries, heads // k_shape[1]
    if usual == key_heads:
        return usual

    @functools.cache
    def walk(part: int) -> float:
        return LAUNCH_COST + longest_key_walk(queries, offset, CONSUMERS.value, block_size, part, group, dim, programs)

    def takes(step: int) -> float:
        whole, rest = divmod(key_heads, step)
        return whole * walk(step) + (walk(rest) if rest else 0.0)

    steps = sorted({min(most, -(-key_heads // rounds)) for rounds in range(1, key_heads + 1)})
    shortest = min(map(takes, steps))
    if usual is not None and takes(usual) * (1 - WORTH) <= shortest:
        return usual
    return next(step for step in steps if takes(step) * (1 - WORTH) <= shortest)
