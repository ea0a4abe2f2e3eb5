"""`Reader`, the name by which the reader through the block cache was known: programs that import it go on working."""

from landmark_cli.inference.block_reader import BlockReader as Reader

__all__ = ["Reader"]
