"""Reading a chunk through the block cache in Triton kernels: the twin of attention/retrieval.py."""

from .launch import MAX_TOP_K, attend_chunk, why_not

__all__ = ["MAX_TOP_K", "attend_chunk", "why_not"]
