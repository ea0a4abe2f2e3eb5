"""What landmark attention says beside its queries, keys and values, as the training kernels take it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..common.logits import scaling_of
from ..common.tiles import LOG2E
from .tiles import PACKED, PADDED, PLAIN


class Layout(NamedTuple):
    """Where blocks are in each row, what makes logits, and what weights them.

    start, cu_seqlens: int32 on the device of q, or None; dropout_seed: one int64 there, or None without dropout.
    softcap: bound of the logits, or None. joint: one softmax over all text; then there is no dropout.
    """

    block_size: int
    scale: float
    start: Tensor | None = None
    cu_seqlens: Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None
    softcap: float | None = None
    joint: bool = False

    @property
    def scaling(self) -> tuple[float, float | None]:
        """What makes base-2 logits of products: see common/logits.py."""
        return scaling_of(self.scale, self.softcap, LOG2E.value)

    @property
    def kind(self) -> int:
        if self.cu_seqlens is not None:
            return PACKED.value
        return PLAIN.value if self.start is None else PADDED.value

    @property
    def bounds(self) -> Tensor | None:
        return self.start if self.cu_seqlens is None else self.cu_seqlens

    @property
    def documents(self) -> int:
        return 0 if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    def tiles(self, rows: int, size: int) -> int:
        """Tiles of `size` that cover `rows` rows; packed documents never share one."""
        return triton.cdiv(rows, size) if self.cu_seqlens is None else rows // size + self.documents

    @property
    def key(self) -> tuple:
        """All that launches depend on."""
        return self.block_size, self.scale, self.kind, self.documents, self.dropout_p, self.softcap, self.joint

    def dropout(self) -> tuple[int, float]:
        """(threshold under which a 24-bit random number drops a block, what the others are multiplied by)."""
        p = torch.tensor(self.dropout_p, dtype=torch.float32).item()
        return math.ceil(p * (1 << 24)), 1.0 / (1.0 - self.dropout_p)
