"""`Reader`, the name by which programs know the reader through the block cache."""

from landmark_cli.inference.block_reader import BlockReader as Reader

__all__ = ["Reader"]
