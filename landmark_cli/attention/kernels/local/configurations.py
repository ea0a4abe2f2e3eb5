"""How large the kernels' tiles are, and on how many warps they run."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..common.choices import Choices
from ..common.configuration import Configuration, is_exact, padded
from ..common.fitting import candidates

# Keys a tile, at most: a window's edges cut through tiles, of which all is then computed.
COLS = 64
# Rows of queries, over all heads, up to which tiles are lower, so that there are programs for all multiprocessors: two
# on each, or one where heads have more than 128 dimensions; and queries that a step of decoding has at most.
FEW_ROWS, FEW_WIDE_ROWS, STEP = 32768, 15360, 16


def choices(kernel: str, q: Tensor) -> Choices:
    """The choices of a kernel ("forward", "query_gradient" or "key_gradient") for inputs like q, kept between calls."""
    batch, heads, queries, dim = q.shape
    few = FEW_ROWS if padded(dim) <= 128 else FEW_WIDE_ROWS
    most = STEP if queries <= STEP else 64 if batch * heads * queries <= few else 128
    if not q.is_cuda:
        return Choices([Configuration(min(most, padded(queries)), COLS)])
    return _choices(kernel, q.device.index, q.element_size(), is_exact(q.dtype), padded(dim), most)


@functools.cache
def _choices(kernel: str, device: int, width: int, exact: bool, dim: int, most: int) -> Choices:
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return Choices(fitting(kernel, shared, width, exact, dim, most))


def fitting(kernel: str, shared: int, width: int, exact: bool, dim: int, most: int) -> list[Configuration]:
    """Configurations of at most `most` rows, the most promising first; other arguments as of fitting.candidates."""
    found = [choice for choice in candidates(kernel, shared, width, exact, dim, COLS) if choice.rows <= most]
    if most == STEP and width == 2 and kernel == "forward":
        # Nothing but loading takes time.
        found.insert(0, Configuration(STEP, COLS, 4, 2))
    return found
