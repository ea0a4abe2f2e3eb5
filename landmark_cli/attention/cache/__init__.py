"""The block cache: what a model has read, block by block, and where the next chunk stands."""

from .cache import BlockCache, Chunk, LayerBlocks, Positions, RetrievalSettings, Selection

__all__ = ["BlockCache", "Chunk", "LayerBlocks", "Positions", "RetrievalSettings", "Selection"]
