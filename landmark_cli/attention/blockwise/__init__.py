"""Landmark attention in plain PyTorch, fast: matrix products over whole blocks, in pieces that stay in a processor's
cache. It runs wherever PyTorch does, and is made for a CPU."""

from .read import attend_chunk

__all__ = ["attend_chunk"]
