"""How long the chunks are that a model reads: by its trained length, and how many of them at once by its device."""

from __future__ import annotations

import math
from collections.abc import Sequence

from transformers import PreTrainedModel

from landmark_cli.attention.cache import RetrievalSettings
from landmark_cli.console import counted
from landmark_cli.data.landmarks import largest_top_k, stream_length
from landmark_cli.errors import LandmarkError

# What a layer makes of a passage may take about so much memory of a GPU.
PASSAGE_BYTES = 1 << 30
# Rows that end before a passage does rest in it: of all its work one part in so many, at most.
MOST_RESTING = 5


def default_chunk(trained_length: int, top_k_blocks: int, landmark_freq: int, name: str = "") -> int:
    """Text tokens a chunk: what the trained length (stream tokens) leaves beside top_k_blocks + 1 blocks.

    name: the model's, for the error where nothing is left.
    """
    block_size = landmark_freq + 1
    blocks = (trained_length - (top_k_blocks + 1) * block_size) // block_size
    if blocks < 1:
        raise LandmarkError(
            f"retrieving {counted(top_k_blocks, 'block')} leaves no room for a chunk: these, the incomplete block and "
            f"one of the chunk take {(top_k_blocks + 2) * block_size} positions, the model {name} was trained at "
            f"{trained_length}; retrieve at most {max(0, largest_top_k(trained_length, landmark_freq))} "
            "(--top-k-blocks), or give a chunk length"
        )
    return blocks * landmark_freq


def positions_of(tokens: int, chunk: int, settings: RetrievalSettings) -> int:
    """The most positions that a chunk of a text needs, landmarks included: its own, those of the incomplete block
    before it and of the blocks that it retrieves, and one block for what is dropped of them.

    tokens: of the text. chunk: text tokens read at a time.
    """
    size, freq = settings.block_size, settings.block_size - 1
    # Chunks begin at multiples of their length, of which the incomplete blocks before them have the greatest common
    # divisor with a block's.
    chunks = max(1, -(-tokens // chunk))
    tails = [begin % freq for begin in range(0, min(chunks, freq) * chunk, chunk)]
    if chunks > freq:
        tails = [freq - math.gcd(chunk, freq)]
    retrieved = min(settings.top_k, settings.retrievable, (chunks - 1) * chunk // freq)
    own = max(stream_length(tail + min(chunk, tokens), freq) for tail in tails)
    return (retrieved + 1) * size + own


def passage_tokens(model: PreTrainedModel) -> int:
    """Stream tokens, of all rows together, that one call of a model may read at a time; 0 where chunks are read one by
    one, as they are where nothing is gained."""
    if model.device.type != "cuda":
        return 0
    config = model.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    inner = inner if isinstance(inner, int) else max(inner)
    return PASSAGE_BYTES // ((6 * config.hidden_size + 4 * inner) * next(model.parameters()).dtype.itemsize)


def chunks_together(working: Sequence[int]) -> int:
    """How many chunks, the first at least, are read by one call of a model, all of whose rows are there until the last.

    working: how many rows have text in each, never more than in the one before.
    """
    text = 0
    for number, rows in enumerate(working):
        text, room = text + rows, (number + 1) * working[0]
        if MOST_RESTING * (room - text) > room:
            return number
    return max(1, len(working))
