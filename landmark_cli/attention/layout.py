"""Which block a key belongs to, which keys are landmarks, and which keys a query may see at all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeyLayout:
    """The blocks of a row of keys. Every tensor is (B, T) or (1, T) when all rows are alike.

    block: block number, counted over the whole row (documents of a packed row do not share numbers).
    block_in_document: the same, counted from the first block of the document.
    landmark: the key closes its block.
    document: which document the key belongs to; -1 where the key is padding.
    blocks: how many block numbers there are.
    even_size: block size when block = position // even_size in every row, else None.
    """

    block: Tensor
    block_in_document: Tensor
    landmark: Tensor
    document: Tensor
    blocks: int
    even_size: int | None = None


def key_layout(
    length: int,
    *,
    device: torch.device,
    block_size: int | None = None,
    landmark_mask: Tensor | None = None,
    start: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> KeyLayout:
    """Work out the blocks of `length` keys.

    block_size: tokens a block, landmark included; the landmark is the last.
    landmark_mask: (B, T) bool, in place of block_size: a block ends at each True.
    start: (B,) first real key of each row (left padding); blocks count from it.
    cu_seqlens: (n + 1,) boundaries of packed documents in a single row; blocks restart in each.

    Raises ValueError naming the argument that cannot be.
    """
    if (block_size is None) == (landmark_mask is None):
        raise ValueError("give either block_size or landmark_mask, and not both")
    if block_size is not None and block_size < 2:
        raise ValueError(f"block_size is {block_size}; a block needs a text token and a landmark, so at least 2")
    if start is not None and cu_seqlens is not None:
        raise ValueError("start and cu_seqlens exclude each other: packed rows have no padding")

    index = torch.arange(length, device=device)[None]
    first = torch.zeros(1, 1, dtype=torch.long, device=device)
    document = torch.zeros_like(index)
    if cu_seqlens is not None:
        bounds = cu_seqlens.to(device=device, dtype=torch.long)
        check_bounds(bounds, length)
        document = torch.searchsorted(bounds, index, right=True) - 1
        first = bounds[document]
    elif start is not None:
        first = start.to(device=device, dtype=torch.long)[:, None]
        document = torch.where(index < first, -1, document)

    if landmark_mask is None:
        position = (index - first).clamp(min=0)
        in_document = position // block_size
        landmark = (position % block_size == block_size - 1) & (document >= 0)
        block = in_document
        if cu_seqlens is not None:
            counts = -(-bounds.diff() // block_size)
            block = in_document + (counts.cumsum(0) - counts)[document]
    else:
        if landmark_mask.shape[-1] != length:
            raise ValueError(f"landmark_mask covers {landmark_mask.shape[-1]} keys, there are {length}")
        landmark = landmark_mask.to(device=device, dtype=torch.bool) & (document >= 0)
        # A landmark belongs to the block it closes; a new document opens a new block.
        opens = torch.zeros_like(landmark)
        opens[:, 1:] = landmark[:, :-1] | (document[:, 1:] != document[:, :-1])
        block = opens.long().cumsum(-1)
        in_document = block - block.gather(-1, first.expand(block.shape[0], length).clamp(max=max(length - 1, 0)))

    plain = start is None and cu_seqlens is None and landmark_mask is None
    blocks = int(block.max()) + 1 if length else 0
    return KeyLayout(block, in_document, landmark, document, blocks, block_size if plain else None)


def check_bounds(cu_seqlens: Tensor, length: int) -> None:
    """Raise ValueError where cu_seqlens, (n + 1,), does not cut a row of so many keys into documents, some empty."""
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != length or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to the {length} keys, found {cu_seqlens.tolist()}")
