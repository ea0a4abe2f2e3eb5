"""What a trace holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from landmark_cli.inference.text import CONTEXT, texts_of_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from landmark_cli.inference.block_reader import BlockReader
    from landmark_cli.inference.generation import Generation


@dataclass(frozen=True)
class GenerationTrace:
    """What each token read that was generated after one prompt.

    model: its name. memory_tokens: text tokens that had been read before the prompt, as --memory gives them.
    prompt_tokens: those of the prompt. landmark_freq: text tokens of a block. blocks: the text of each, of all that was
    read: memory, prompt and generated tokens but the last; the last block may be incomplete. tokens: the text of each
    generated token. reads: for each of these the blocks that the query read which predicted it, as Generation has them.
    """

    model: str
    memory_tokens: int
    prompt_tokens: int
    landmark_freq: int
    blocks: Sequence[str]
    tokens: Sequence[str]
    reads: Sequence[list[dict[str, Any]]]


def trace_of(
    model: str, reader: BlockReader, tokenizer: PreTrainedTokenizerBase, generation: Generation
) -> GenerationTrace:
    """The trace of what was generated with `trace` by a reader of one row. model: the name it is to be shown under."""
    ids = reader.texts[0].tolist()
    # The last token was sampled, and nothing more had to be read.
    read = max(0, len(generation.tokens) - 1)
    begin = len(ids) - read
    return GenerationTrace(
        model=model,
        memory_tokens=begin - generation.prompt_tokens,
        prompt_tokens=generation.prompt_tokens,
        landmark_freq=reader.landmark_freq,
        blocks=texts_of_blocks(tokenizer, ids, reader.landmark_freq),
        tokens=texts_of_blocks(tokenizer, generation.tokens, 1, context=ids[max(0, begin - CONTEXT) : begin]),
        reads=generation.reads,
    )
