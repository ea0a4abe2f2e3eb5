"""How a model reads and samples: the settings that commands offer and the Python functions take.

They are option dataclasses, so a command inherits its options, and nothing heavy is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from landmark_cli.options import LARGEST_SEED, LONGEST, option

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from landmark_cli.inference.reader import Reader
    from landmark_cli.inference.recurrent import RecurrentReader
    from landmark_cli.inference.window import WindowReader

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


def open_reader(
    model: PreTrainedModel, settings: ReadingSettings, batch: int = 1
) -> Reader | RecurrentReader | WindowReader:
    """What reads for a model: a Reader through the block cache, a RecurrentReader for a Transformer-XL, or a
    WindowReader where the model has no memory of any kind."""
    if is_recurrent(model):
        from landmark_cli.inference.recurrent import RecurrentReader

        return RecurrentReader(model, batch=batch)
    if not has_landmarks(model):
        from landmark_cli.inference.window import WindowReader

        return WindowReader(model, batch=batch)
    from landmark_cli.inference.reader import Reader

    return Reader(
        model,
        top_k_blocks=settings.top_k_blocks,
        chunk=settings.chunk,
        cache_blocks=settings.cache_blocks,
        selection=settings.selection,
        positions=settings.positions,
        context_miss_cutoff=settings.context_miss_cutoff,
        offload=settings.offload,
        batch=batch,
    )


def has_landmarks(model: PreTrainedModel) -> bool:
    """Whether the model was trained with landmarks."""
    return bool(getattr(model.config, "landmark_freq", None))


def is_recurrent(model: PreTrainedModel) -> bool:
    """Whether the model is a Transformer-XL."""
    return getattr(model.config, "memory_length", None) is not None


def trained_text_length(model: PreTrainedModel) -> int:
    """Text tokens of the longest input the model was trained on: its window without the landmarks in it.

    A model of which nobody says what it was trained on is taken for its config's max_position_embeddings.
    """
    config = model.config
    length = getattr(config, "trained_length", None) or config.max_position_embeddings
    return length - length // (config.landmark_freq + 1) if has_landmarks(model) else length
