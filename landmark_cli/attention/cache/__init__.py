"""The block cache: what a model has read, block by block, and where the next chunk stands."""

from .blocks import HeldBlocks, LayerBlocks
from .cache import BlockCache
from .chunk import Chunk, Passage, most_side_by_side
from .layer_window import HeldText, LayerWindow, rolled
from .pages import Offload
from .settings import Positions, RetrievalSettings, Selection
from .trace import Trace

__all__ = [
    "BlockCache",
    "Chunk",
    "HeldBlocks",
    "HeldText",
    "LayerBlocks",
    "LayerWindow",
    "Offload",
    "Passage",
    "Positions",
    "RetrievalSettings",
    "Selection",
    "Trace",
    "most_side_by_side",
    "rolled",
]
