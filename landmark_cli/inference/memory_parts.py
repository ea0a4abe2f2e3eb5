"""Memories made of memories, as of a reader that read just that: several one after another, or the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from landmark_cli.attention.cache import HeldBlocks, HeldText
from landmark_cli.errors import UsageError
from landmark_cli.inference.memory import Memory
from landmark_cli.inference.stored_blocks import cut
from landmark_cli.inference.stored_blocks import in_order as blocks_in_order


def joined(memories: Sequence[Memory]) -> Memory:
    """One memory of several of the same reader's: their complete blocks one after another, numbered through, then the
    incomplete block of the last. The incomplete blocks of the others, which have no landmark, are left out. Layers with
    a sliding window see the text of the last alone.

    Raises UsageError where positions are absolute: a block then has its place in the text that it was read in.
    """
    if len(memories) == 1:
        return memories[0]
    *before, last = memories
    if last.about.positions == "absolute":
        raise UsageError("--memory: several with absolute positions cannot be read one after another; give one")
    bound = last.about.cache_blocks
    # An older block than the cache keeps is as good as evicted.
    kept = slice(None if bound is None else -bound - 1, None)

    layers: list[HeldBlocks | HeldText] = []
    for of_layer in zip(*(memory.layers for memory in memories), strict=True):
        if isinstance(of_layer[-1], HeldText):
            layers.append(of_layer[-1])
            continue
        *ended, (end, end_keys) = of_layer
        # A text shorter than a block has no complete one.
        complete = [cut(part, 0, part.shape[1] - 1) for part, _ in ended if part.shape[1] > 1]
        blocks = blocks_in_order([*complete, cut(end, 0, end.shape[1])])
        keys = torch.cat([*(keys[:, :-1].cpu() for _, keys in ended), end_keys.cpu()], dim=1)[:, kept]
        layers.append(HeldBlocks(cut(blocks, blocks.shape[1] - keys.shape[1], blocks.shape[1]), keys))
    text = torch.cat([*(memory.text[: len(memory.text) - memory.tail] for memory in before), last.text])
    return replace(last, blocks=sum(memory.blocks for memory in memories), layers=layers, text=text, path=None)


def beginning(memory: Memory, tokens: int) -> Memory | None:
    """The memory of the first `tokens` text tokens of a memory's text, where one of its chunks ends with them: that of
    a reader that read no further, since nothing that was read depends on later chunks. None where blocks have been
    evicted that this reader would still have, or where layers with a sliding window have rolled on. What lies in a file
    is read.

    Raises LandmarkError where it cannot be.
    """
    if tokens == len(memory.text) and memory.path is None:
        return memory
    if tokens < len(memory.text) and not all(isinstance(of_layer, HeldBlocks) for of_layer in memory.layers):
        return None
    about = memory.about
    blocks, tail = divmod(tokens, about.landmark_freq)
    gone = memory.blocks + 1 - memory.held_blocks.blocks.shape[1]
    first = 0 if about.cache_blocks is None else max(0, blocks - about.cache_blocks)
    if first < gone:
        return None
    layers = []
    for held in memory.layers:
        if not isinstance(held, HeldBlocks):
            layers.append(held)
            continue
        of_layer, landmark_keys = held
        of_layer = cut(of_layer, first - gone, blocks + 1 - gone).whole()
        landmark_keys = landmark_keys[:, first - gone : blocks + 1 - gone].clone()
        # The last is the incomplete block, of which the rest is not read yet.
        of_layer[:, -1, :, tail:] = 0
        landmark_keys[:, -1] = 0
        layers.append(HeldBlocks(of_layer, landmark_keys))
    return replace(memory, blocks=blocks, tail=tail, layers=layers, text=memory.text[:tokens], path=None)
