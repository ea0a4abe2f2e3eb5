"""How blocks are retrieved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Selection = Literal["per_token_and_head", "max_over_query_heads", "max_over_heads", "max_over_tokens"]
Positions = Literal["bounded", "absolute"]


@dataclass(frozen=True)
class RetrievalSettings:
    """How blocks are retrieved.

    block_size: tokens a block, landmark included.
    top_k: blocks retrieved per query; 0 retrieves nothing, more than are cached retrieves all.
    selection: who shares a selection: nobody, a token's query heads of one key head, all heads of a token, or all
    tokens of a chunk (paper, section 4.1).
    cache_blocks: newest complete blocks kept; None keeps all.
    context_miss_cutoff: share of a context-miss token under which a query retrieves nothing (models that have one).
    positions: "bounded" places retrieved blocks in the window in front of the chunk, so no distance exceeds the trained
    length; "absolute" leaves every block at its true distance.
    rerank_blocks: that many blocks landmarks propose, of which the top_k whose text counts most are read (see
    attention/rerank.py); None: landmarks choose. Only with joint, where text is what counts, and where nobody shares a
    selection.
    block_temperature: of the softmax among retrieved blocks; below 1 the best of them gets more beside the others.
    joint: whether landmarks only choose blocks, and the text of all that is read shares one softmax, as of
    reference.landmark_attention; not together with a context-miss token.

    Raises ValueError naming a setting that cannot be.
    """

    block_size: int
    top_k: int
    selection: Selection = "per_token_and_head"
    cache_blocks: int | None = None
    positions: Positions = "bounded"
    context_miss_cutoff: float = 0.0
    joint: bool = False
    rerank_blocks: int | None = None
    block_temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise ValueError(f"block_size is {self.block_size}; a text token and a landmark make it at least 2")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 or more")
        if self.selection not in get_args(Selection):
            raise ValueError(f"selection is {self.selection!r}; choose one of {', '.join(get_args(Selection))}")
        if self.positions not in get_args(Positions):
            raise ValueError(f"positions is {self.positions!r}; choose one of {', '.join(get_args(Positions))}")
        if not 0.0 <= self.context_miss_cutoff <= 1.0:
            raise ValueError(f"context_miss_cutoff is {self.context_miss_cutoff}; a share is between 0 and 1")
        if not 0.01 <= self.block_temperature <= 100.0:
            raise ValueError(f"block_temperature is {self.block_temperature}; it is between 0.01 and 100")
        if self.rerank_blocks is not None:
            if self.rerank_blocks < 1:
                raise ValueError(f"rerank_blocks is {self.rerank_blocks}; it must be 1 or more, or None")
            if not self.joint:
                raise ValueError("rerank_blocks is for models whose landmarks only choose blocks (joint)")
            if self.selection != "per_token_and_head":
                raise ValueError(f"rerank_blocks goes with selection per_token_and_head, not with {self.selection}")
        if self.cache_blocks is not None and self.cache_blocks < 0:
            raise ValueError(f"cache_blocks is {self.cache_blocks}; it must be 0 or more, or None to keep all")

    @property
    def proposed(self) -> int:
        """How many blocks landmarks choose, to be read or to be chosen from."""
        return max(self.top_k, self.rerank_blocks or 0) if self.top_k else 0

    @property
    def retrievable(self) -> int:
        """The most complete blocks a row can choose from."""
        return 2**31 - 1 if self.cache_blocks is None else self.cache_blocks
