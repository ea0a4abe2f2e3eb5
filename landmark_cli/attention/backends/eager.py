"""eager: the definition, which serves everything everywhere."""

from __future__ import annotations

from torch import Tensor

from .. import retrieval
from ..cache import Chunk, LayerBlocks
from ..context_miss import attend_chunk_with_context_miss
from ..retrieval import Read
from .backend import Backend


def _read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: LayerBlocks,
    chunk: Chunk,
    scale: float | None,
    context_miss_key: Tensor | None,
    traced: bool,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Read:
    if context_miss_key is not None:
        return attend_chunk_with_context_miss(q, k, v, context_miss_key, blocks, chunk, scale)
    return retrieval.attend_chunk(q, k, v, blocks, chunk, scale, softcap, sinks)


EAGER = Backend("eager", lambda device: True, lambda problem: None, "eager", read=_read)
