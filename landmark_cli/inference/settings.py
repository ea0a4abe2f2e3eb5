"""How a model reads and samples: the settings that commands offer and the Python functions take.

They are option dataclasses, from which commands inherit these options, so nothing heavy is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from landmark_cli.options import LARGEST_SEED, LONGEST, Options, option

READING = "Reading"
SAMPLING = "Sampling"


@dataclass
class ReadingSettings(Options):
    """How a landmark model reads through its block cache (arXiv 2305.16300, section 3.2). A value that cannot be
    raises UsageError.

    >>> landmark_cli.ReadingSettings(top_k_blocks=8, offload="cpu").selection
    'per_token_and_head'
    """

    top_k_blocks: int | None = option(
        None,
        panel=READING,
        min=0,
        max=LONGEST,
        help="Blocks retrieved for each token; 0 for none. [default: the number in the model's config]",
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
        help="How many of the newest blocks are kept for retrieval. [default: all]",
        saves_memory="fewer --cache-blocks",
    )
    selection: Literal["per_token_and_head", "max_over_query_heads", "max_over_heads", "max_over_tokens"] = option(
        "per_token_and_head",
        panel=READING,
        help="Who chooses blocks: every token and head, every token for the query heads of each key head, every token "
        "for all heads, or every head for all of a chunk.",
    )
    positions: Literal["bounded", "absolute"] = option(
        "bounded",
        panel=READING,
        help="Where retrieved blocks stand: before the chunk, within the trained length, or at their true distance.",
    )
    rerank_blocks: int | None = option(
        None,
        panel=READING,
        min=1,
        # As many as the kernels re-rank.
        max=64,
        help="Let landmarks propose so many blocks, and read the --top-k-blocks of them whose text counts most; for "
        "models whose landmarks only choose blocks. [default: landmarks choose]",
    )
    block_temperature: float = option(
        1.0,
        panel=READING,
        min=0.01,
        max=100,
        help="Softmax temperature among retrieved blocks: below 1 the best of them get more beside the others.",
    )
    context_miss_cutoff: float = option(
        0.0,
        panel=READING,
        min=0,
        max=1,
        help="For models with a context-miss token: retrieve nothing where that token's share of attention is smaller.",
    )
    offload: Literal["none", "cpu"] = option(
        "none",
        panel=READING,
        help="Where blocks lie: cpu is host memory, from which the GPU fetches those that it reads.",
        saves_memory="--offload cpu (on a GPU)",
    )


@dataclass
class SamplingSettings(Options):
    """How the next token is chosen and when to stop. A value that cannot be raises UsageError.

    >>> landmark_cli.SamplingSettings(temperature=0, stop=["CHAPTER"]).max_new_tokens
    256
    """

    max_new_tokens: int = option(
        256,
        panel=SAMPLING,
        min=0,
        help="Largest number of tokens to generate; 0 to read only.",
        saves_memory="fewer --max-new-tokens",
    )
    temperature: float = option(
        0.8,
        panel=SAMPLING,
        min=0,
        max=1000,
        help="Above 1 flattens the probabilities, below 1 sharpens them; 0 is greedy decoding.",
    )
    top_p: float = option(
        1.0,
        panel=SAMPLING,
        min=0,
        max=1,
        help="Sample from the likeliest tokens whose probabilities add up to this; 1 for all.",
    )
    top_k: int = option(50, panel=SAMPLING, min=0, help="Sample from this many likeliest tokens; 0 for all.")
    repetition_penalty: float = option(
        1.0, panel=SAMPLING, min=0.01, max=100, help="Above 1, tokens that occurred before become less likely."
    )
    stop: list[str] | None = option(
        None, panel=SAMPLING, help=r"Stop before this text (\n is a line break); may be given several times."
    )
    seed: int = option(
        0, panel=SAMPLING, min=0, max=LARGEST_SEED, help="Seed for sampling: the same seed gives the same text."
    )
