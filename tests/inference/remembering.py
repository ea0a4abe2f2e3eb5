"""What tests of files that keep what was read share."""

import pytest
import torch

from landmark_cli.inference.block_reader import BlockReader
from tests.tiny import tiny_model, tiny_text

MODEL = tiny_model()
NOVEL, QUESTION = tiny_text(53), tiny_text(11, seed=2)
SETTINGS = [
    {},
    {"selection": "max_over_heads"},
    {"selection": "max_over_tokens", "top_k_blocks": 3},
    {"cache_blocks": 3},
    {"cache_blocks": 0},
    {"positions": "absolute"},
    {"positions": "absolute", "cache_blocks": 4},
    {"offload": "cpu"},
    {"top_k_blocks": 0},
]
each_setting = pytest.mark.parametrize("settings", SETTINGS, ids=lambda chosen: " ".join(map(str, chosen.items())))


def reader(batch=1, model=MODEL, **settings) -> BlockReader:
    return BlockReader(model, **{"chunk": 8, **settings}, batch=batch)


def read(from_reader: BlockReader, text, row=0) -> torch.Tensor:
    """The logits of a text that one row reads; the others rest."""
    rows = [text if index == row else text[:0] for index in range(from_reader.batch)]
    return torch.cat([chunk.row(row) for chunk in from_reader.read(rows)])


def ask(from_reader: BlockReader, row=0) -> torch.Tensor:
    """The logits of the question, chunk by chunk, and of three steps behind it."""
    steps = [[token if index == row else None for index in range(from_reader.batch)] for token in (3, 1, 4)]
    return torch.cat([read(from_reader, QUESTION, row), *(from_reader.step(step)[row, None] for step in steps)])


def recalled(paths, **settings):
    one = reader(**settings)
    one.recall(*paths)
    return one
