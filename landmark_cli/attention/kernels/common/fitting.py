"""Configurations that should fit into a GPU: kernels that walk over tiles of keys for a tile of queries ("forward",
"query_gradient"), or over tiles of queries for a tile of keys ("key_gradient")."""

from __future__ import annotations

from collections.abc import Iterator

from .configuration import Configuration


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
