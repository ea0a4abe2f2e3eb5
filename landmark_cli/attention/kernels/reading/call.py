"""What the kernels of one layer's call have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from ...cache import Chunk, LayerBlocks
from ..common.configuration import is_exact, padded

# Landmarks a tile: all blocks that are scored at their true distance must lie in the first.
TILE = 64
MAX_TOP_K = TILE
# The running lists of a selection hold so many; more are found in several passes.
PASS = 16
# A step of at most so many tokens is worked off block by block and query by query.
STEP_TOKENS = 4


class Call:
    """One layer's chunk on its way through the kernels.

    q: (B, H, T, D); k, v: (B, G, T, D). turns: cos and sin of whole block slots. stream_turn: with absolute positions,
    the turn to each row's stream positions. place, pool: where copies of offloaded blocks are. parts: how the kernels
    see a head's dimensions. precision: of products.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, blocks: LayerBlocks, chunk: Chunk, scale: float | None):
        self.q, self.k, self.v, self.blocks, self.chunk = q, k, v, blocks, chunk
        self.settings = blocks.settings
        self.batch, self.heads, self.tokens, self.dim = q.shape
        self.key_heads = k.shape[1]
        self.group = self.heads // self.key_heads
        self.key_rows, self.group_rows = self.batch * self.key_heads, self.group * self.tokens
        self.scale = self.dim**-0.5 if scale is None else scale
        self.top_k, self.capacity = self.settings.top_k, blocks.capacity
        self.absolute = self.settings.positions == "absolute"
        slots = max(self.top_k, self.capacity if self.absolute else 0, chunk.width // self.settings.block_size) + 2
        self.turns = chunk.cache.turns(slots, q.device, torch.float32)
        self.stream_turn = chunk.stream_turn if self.absolute else (None, None)
        resident = blocks.resident
        self.place, self.pool = (None, blocks.blocks) if resident is None else (resident.place, resident.pool)

        half = chunk.inverse_frequencies.shape[0]
        rest = self.dim - 2 * half
        self.parts = {"HALF": half, "REST": rest, "HALF_PAD": padded(half), "REST_PAD": padded(rest)}
        self.dim_pad = padded(self.dim)
        self.exact = q.dtype == torch.float32
        self.precision = "tf32x3" if is_exact(q.dtype) else "tf32"

    @property
    def is_step(self) -> bool:
        """Whether this is a decoding step, for which the step's kernels are made."""
        few = self.tokens <= min(STEP_TOKENS, self.settings.block_size) and self.top_k <= PASS
        return few and self.settings.selection == "per_token_and_head"

    @property
    def ring(self) -> tuple[int, int, int]:
        return self.batch, self.key_heads, self.capacity

    @property
    def reach(self) -> tuple[int, int]:
        return self.settings.retrievable, self.top_k

    @property
    def scoring(self) -> tuple[int, int, int]:
        """What kernels that score landmarks have to know: reach, and whether far blocks share a landmark key."""
        return *self.reach, int(self.blocks.one_landmark_key and not self.absolute)

    @property
    def row_bytes(self) -> int:
        """Bytes of one token of one head, which decide how large tiles can be."""
        return self.dim_pad * self.q.element_size()

    def empty(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q.device)


def strides(x: Tensor) -> tuple[int, int, int]:
    """In elements, of all dimensions but the last, which is dense."""
    return x.stride()[:3]
