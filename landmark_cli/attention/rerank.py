"""What of the blocks that landmarks propose is read, and how much of it: by what their text says itself.

A landmark is one key for a block of text, so of many blocks the best by landmark need not be the best. Of a few of them
the text can be asked: the log-sum-exp of a block's logits is what attention over all text would give the block.

Reading many blocks by turns, the best of them are better than any that a shorter text has, needle or not: a temperature
below 1 lets what stands out stand out, as a factor on logits that grows with length does in attention over all text
(arXiv 2501.19399).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .cache import Chunk, RetrievalSettings


def scored_distance(ages: Tensor, chunk: Chunk, settings: RetrievalSettings) -> Tensor:
    """How many block slots before the chunk's tail block a block stands while it is compared with others; ages: (B or
    1, ..), as many dimensions out."""
    absolute = settings.positions == "absolute"
    return ages if absolute else bounded_scored_distance(ages, chunk.cached, settings.top_k)


def bounded_scored_distance(ages: Tensor, cached: Tensor, top_k: int) -> Tensor:
    """Bounded positions: the last top_k blocks of the (B,) that are cached are at their true distance, all older ones
    just behind them."""
    near = cached.clamp(max=top_k).view(-1, *[1] * (ages.dim() - 1))
    return torch.minimum(ages, near + 1)


def rerank(proposed: Tensor, score: Callable[[Tensor], Tensor], top_k: int) -> Tensor:
    """The top_k blocks whose text counts most, of those that landmarks propose; of equal ones the newer.

    proposed: (B, H, T, n) ages in any order, 0 for no block. score: what the text of blocks of such ages counts, (B, H,
    T, n), minus infinity where there is none. Returns (B, H, T, min(top_k, n)), the best first.
    """
    # Ages rise, so a stable order leaves the newer of equal scores in front.
    nobody = torch.iinfo(proposed.dtype).max
    ages = proposed.masked_fill(proposed == 0, nobody).sort(dim=-1).values
    ages = ages.masked_fill(ages == nobody, 0)
    order = score(ages).sort(dim=-1, descending=True, stable=True).indices
    return ages.gather(-1, order[..., :top_k])


def sharpened(logits: Tensor, temperature: float, dim: int = -1) -> Tensor:
    """Logits of a query's retrieved blocks in the outer softmax, minus infinity where there is no block, by a
    temperature: the best block's stays as it is, so the others' change beside it and beside what else is read."""
    if temperature == 1.0:
        return logits
    best = logits.amax(dim, keepdim=True)
    return torch.where(logits > float("-inf"), best + (logits - best) / temperature, logits)
