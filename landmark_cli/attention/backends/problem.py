"""What attention is asked for, and why none but the definition, or only some backends, can serve it."""

from __future__ import annotations

from typing import NamedTuple

import torch

# With fewer queries there is too little work for a kernel that keeps a multiprocessor to itself.
FEW_QUERIES = 256


class Problem(NamedTuple):
    """What attention is asked for, as far as it decides who can serve: constants, for torch.compile keeps the choice.

    device: "cuda:1", say. block_size: None where a mask makes blocks of any size. few_queries: under FEW_QUERIES; the
    length itself is not here, lest every length be compiled anew. padded, packed, dropout, context_miss, softcap,
    sinks: what else is given beside q, k and v. reading: through the block cache; differentiated: gradients are asked
    for. local: in a layer that keeps its sliding window, which has no blocks.
    retrieving: how many blocks the chunks of a training window read of those before them; 0: it is no such window.
    joint: in one softmax over the text of all blocks that are read, which their landmarks only choose.
    earlier_keys: k has more tokens than q. lse: the log-sum-exp is wanted too.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    block_size: int | None
    few_queries: bool = False
    padded: bool = False
    packed: bool = False
    dropout: bool = False
    context_miss: bool = False
    reading: bool = False
    differentiated: bool = False
    retrieving: int = 0
    softcap: bool = False
    sinks: bool = False
    local: bool = False
    joint: bool = False
    earlier_keys: bool = False
    lse: bool = False

    @property
    def kind(self) -> str:
        """The device's, without its number: "cuda"."""
        return self.device.partition(":")[0]


def needs_the_definition(problem: Problem) -> str | None:
    """Why no kernel can serve."""
    if problem.block_size is None and not problem.local:
        return "landmark_mask makes blocks of any size"
    if problem.context_miss:
        return "context_miss_key gives the outer softmax a key of its own"
    if problem.reading and problem.differentiated:
        return "gradients are asked for"
    return None


def knows_no_other_logits(who: str, problem: Problem) -> str | None:
    """Why one that knows neither soft caps nor sinks cannot serve."""
    if problem.softcap:
        return f"softcap bounds the logits, which {who} cannot"
    if problem.sinks:
        return f"sinks give the outer softmax logits of their own, which {who} cannot"
    return None
