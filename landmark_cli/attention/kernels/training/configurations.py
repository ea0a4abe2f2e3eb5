"""How large the kernels' tiles are and how many warps and pipeline stages run them: measured, derived, or tuned.

A configuration depends on the GPU, the kernel, the bytes of a number, the head dim and the block size, and for Hopper
on whether the input is short; never on the batch or the number of heads. So a new length neither tunes nor compiles.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..common.choices import Choices
from ..common.configuration import Configuration, is_exact, padded

# Queries up to which an input counts as short: smaller tiles then fill the GPU better.
SHORT = 2048

# The fastest of some ten candidates each on an H100 (triton 3.6), 16-bit numbers, by (kernel, head dim, short), for
# blocks of 33 to 64 tokens. An H200 has the same multiprocessors.
HOPPER = {
    ("forward", 128, True): Configuration(64, 64, 4, 3),
    ("forward", 128, False): Configuration(128, 64, 8, 3),
    ("query_gradient", 128, True): Configuration(64, 64, 4, 2),
    ("query_gradient", 128, False): Configuration(128, 64, 8, 3),
    ("key_gradient", 128, True): Configuration(32, 64, 4, 3),
    ("key_gradient", 128, False): Configuration(32, 64, 4, 3),
    ("forward", 64, True): Configuration(64, 64, 4, 3),
    ("forward", 64, False): Configuration(128, 64, 8, 3, 128),
    ("query_gradient", 64, True): Configuration(64, 64, 4, 3, 168),
    ("query_gradient", 64, False): Configuration(64, 64, 4, 3, 168),
    ("key_gradient", 64, True): Configuration(64, 64, 4, 3),
    ("key_gradient", 64, False): Configuration(64, 64, 4, 3),
}


def choices(kernel: str, q: Tensor, block_size: int) -> Choices:
    """The choices of a kernel ("forward", "query_gradient" or "key_gradient") for inputs like q, kept between calls."""
    dim, block = padded(q.shape[-1]), padded(block_size)
    if not q.is_cuda:
        return Choices([Configuration(min(128, padded(q.shape[2])), block)])
    return _choices(kernel, q.device.index, q.element_size(), is_exact(q.dtype), dim, block, q.shape[2] <= SHORT)


@functools.cache
def _choices(kernel: str, device: int, width: int, exact: bool, dim: int, block: int, short: bool) -> Choices:
    properties = torch.cuda.get_device_properties(device)
    found = list(candidates(kernel, properties.shared_memory_per_block_optin, width, exact, dim, block))
    if properties.major == 9 and width == 2 and block == 64 and (kernel, dim, short) in HOPPER:
        found.insert(0, HOPPER[kernel, dim, short])
    return Choices(found)


def candidates(kernel: str, shared: int, width: int, exact: bool, dim: int, block: int) -> Iterator[Configuration]:
    """Configurations that should fit into `shared` bytes and a thread's registers, the most promising first.

    width: bytes of a number; exact: float32 in three products; dim, block: head dim and block, padded to powers of two.
    """
    rows_and_stages = ((128, 2), (64, 3), (64, 2), (64, 1), (32, 2), (32, 1), (16, 1))
    if kernel == "key_gradient" or exact:
        rows_and_stages = ((32, 3), (32, 2), (32, 1), (16, 2), (16, 1))
    registers = 32 if exact else 96 if width == 4 else 160
    # Not told a limit, the assembler gave up on some kernels of products in three parts and left all but 32 in memory.
    limit = 255 if exact else None
    cols = min(block, 32 if exact else 64 if width == 4 else 128)
    while cols >= 16:
        for rows, stages in rows_and_stages:
            for warps in (4, 8):
                choice = Configuration(rows, cols, warps, stages, limit)
                fits = _shared_memory(kernel, choice, width, dim) * (1.75 if exact else 1.0) <= shared
                if fits and _registers(kernel, choice, dim) <= registers:
                    yield choice
                    break
        cols //= 2
    yield Configuration(16, 16, 8, 1, limit)


def _shared_memory(kernel: str, choice: Configuration, width: int, dim: int) -> int:
    """Bytes a program holds: the tiles it keeps, and those that its pipeline loads ahead."""
    if kernel == "forward":
        numbers = dim * (choice.rows + 2 * choice.stages * choice.cols)
    elif kernel == "query_gradient":
        numbers = dim * (2 * choice.rows + 2 * choice.stages * choice.cols)
    else:
        numbers = dim * (2 * choice.cols + 2 * choice.stages * choice.rows) + 6 * choice.stages * choice.rows
    return width * (numbers + choice.rows * choice.cols)


def _registers(kernel: str, choice: Configuration, dim: int) -> int:
    """Registers a thread needs for its part of the accumulators and of the products of a step."""
    rows, cols = choice.rows, choice.cols
    if kernel == "forward":
        numbers = rows * (dim + cols)
    elif kernel == "query_gradient":
        numbers = rows * (dim + 2 * cols)
    else:
        numbers = 2 * cols * (dim + rows)
    return numbers // (32 * choice.warps)
