"""How a model reads and samples: the settings that commands offer and the Python functions take.

They are option dataclasses, so a command inherits its options, and nothing heavy is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from landmark_cli.options import LARGEST_SEED, LONGEST, option

READING = "Reading"
SAMPLING = "Sampling"


@dataclass
class ReadingSettings:
    """How a landmark model reads through its block cache (arXiv 2305.16300, section 3.2)."""

    top_k_blocks: int | None = option(
        None,
        panel=READING,
        min=0,
        max=LONGEST,
        help="Blocks retrieved for each token; 0 for none. [default: as the model says]",
    )
    chunk: int | None = option(
        None,
        panel=READING,
        min=1,
        max=LONGEST,
        help="Text tokens read at a time. [default: what the trained length leaves beside the retrieved blocks]",
        saves_memory="a smaller --chunk",
    )
    cache_blocks: int | None = option(
        None,
        panel=READING,
        min=0,
        help="Newest blocks kept for retrieval. [default: all]",
        saves_memory="fewer --cache-blocks",
    )
    selection: Literal["per_token_and_head", "max_over_heads", "max_over_tokens"] = option(
        "per_token_and_head",
        panel=READING,
        help="Who shares a choice of blocks: nobody, all heads, or a chunk's tokens.",
    )
    positions: Literal["bounded", "absolute"] = option(
        "bounded",
        panel=READING,
        help="Retrieved blocks stand right before the chunk, within the trained length, or at their true distance.",
    )
    context_miss_cutoff: float = option(
        0.0,
        panel=READING,
        min=0,
        max=1,
        help="Models with a context-miss token: retrieve nothing where its share is smaller.",
    )
    offload: Literal["none", "cpu"] = option(
        "none",
        panel=READING,
        help="cpu: blocks lie in host memory, and the GPU fetches those it reads.",
        saves_memory="--offload cpu (on a GPU)",
    )


@dataclass
class SamplingSettings:
    """How the next token is chosen and when to stop."""

    max_new_tokens: int = option(
        256, panel=SAMPLING, min=1, help="Most tokens to generate.", saves_memory="fewer --max-new-tokens"
    )
    temperature: float = option(
        0.8, panel=SAMPLING, min=0, max=1000, help="Flattens (above 1) or sharpens; 0 is greedy decoding."
    )
    top_p: float = option(
        1.0, panel=SAMPLING, min=0, max=1, help="Sample from the likeliest tokens that make up this share; 1 for all."
    )
    top_k: int = option(50, panel=SAMPLING, min=0, help="Sample from this many likeliest tokens; 0 for all.")
    repetition_penalty: float = option(
        1.0, panel=SAMPLING, min=0.01, max=100, help="Above 1: tokens seen before get less likely."
    )
    stop: list[str] | None = option(
        None, panel=SAMPLING, help=r"Stop before this text (\n is a line break); may be given several times."
    )
    seed: int = option(0, panel=SAMPLING, min=0, max=LARGEST_SEED, help="The same seed gives the same text.")
