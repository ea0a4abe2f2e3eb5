"""How large the kernels' tiles are, and on how many warps they run; benchmarks/long_context.py measures others."""

from __future__ import annotations

import triton

from ..common.configuration import Configuration, has_warp_groups, padded
from .call import TILE, Call

# Bytes of a token of one head, up to which tiles of 64 rows fit into the registers of 4 warps.
LARGE_ROW = 256
# Tiles of 128 rows, of all heads, that give every multiprocessor one.
ENOUGH_TILES = 120


def select_configuration(call: Call) -> Configuration:
    """For scoring landmarks; rows are the queries of the heads on a key head."""
    rows = min(64 if call.row_bytes <= 2 * LARGE_ROW else 16, padded(call.query_rows))
    if call.row_bytes > LARGE_ROW:
        return Configuration(rows, TILE, warps=8 if rows == 64 and not _is_wide(call) else 4)
    # With 128 registers a multiprocessor holds four programs instead of three; longer lists need more.
    few = call.top_k <= 8 and not call.exact and call.settings.selection == "per_token_and_head"
    return Configuration(rows, TILE, registers=128 if few else None)


def step_configuration(call: Call) -> Configuration:
    """For scoring landmarks in a decoding step; a single query needs no tile of rows."""
    if call.query_rows > 1:
        return Configuration(16, TILE)
    # Landmarks of 32 KiB: 16 loads of 16 bytes a thread, and some seven programs a multiprocessor.
    return Configuration(1, max(16, min(256, 32768 // call.row_bytes)), stages=1)


def decode_configuration(call: Call) -> Configuration:
    """For the blocks that a decoding step reads, each by a program of its own; a single query needs no tile of rows."""
    return Configuration(1, attend_configuration(call, 1).cols, stages=1)


def attend_configuration(call: Call, pairs: float) -> Configuration:
    """For reading the selected blocks, each for `pairs` queries or so."""
    cols = min(64, padded(call.settings.block_size))
    large = call.row_bytes > LARGE_ROW or call.settings.block_size > 64
    if pairs < 24 or call.row_bytes > 2 * LARGE_ROW:
        return Configuration(16, cols, warps=4 if large else 1, stages=1)
    if large:
        # Two warp groups need columns to share.
        return Configuration(64, cols, warps=8 if cols == 64 and not _is_wide(call) else 4, stages=1)
    return Configuration(64, cols, stages=1, registers=None if call.exact else 128)


def merge_configuration(call: Call) -> Configuration:
    """For a chunk's attention to itself; columns are at least 16 and, up to 64, hold a block."""
    rows, cols = min(64, padded(call.tokens)), min(64, padded(call.settings.block_size))
    if _is_wide(call) and rows == cols == 64:
        # Three times as fast as the small tiles below, with 256 dimensions on an H200.
        many = call.batch * call.heads * (call.tokens // 128) >= ENOUGH_TILES
        return Configuration(128, cols, warps=8) if many else Configuration(rows, cols)
    if call.row_bytes > LARGE_ROW:
        return Configuration(min(rows, 32 if call.row_bytes <= 2 * LARGE_ROW else 16), min(cols, 32), stages=1)
    return Configuration(rows, cols)


def store_rows(call: Call) -> int:
    """Tokens that one warp stores."""
    return min(triton.next_power_of_2(call.tokens), max(1, 4096 // call.row_bytes))


def _is_wide(call: Call) -> bool:
    """Whether tokens are large, of 16-bit numbers, and the GPU's products leave room for large tiles of them."""
    return not call.exact and LARGE_ROW < call.row_bytes <= 2 * LARGE_ROW and has_warp_groups(call.q.device)
