"""What of a run follows from the memory there is: how long windows are, how many a device takes at a time, and whether
activations are computed again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from landmark_cli.cores import processes_here

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Of a step on each device, where nobody says how many windows it has; and so of the longest window.
STEP_TOKENS = 32_768
# On a CPU attention takes long, and keeps (T, T) matrices where landmarks do more than choose.
CPU_WINDOW = 2048
# A CPU is no faster with more windows at a time.
CPU_BATCH = 2
# What is left to the caches of torch, CUDA's own memory and what an estimate misses.
MEMORY_SHARE = 0.9

Needs = Callable[[int, int, bool], int]
"""Bytes that a device has to have: of the tokens of a window, the windows in a micro-batch, and whether activations are
computed again."""


@dataclass(frozen=True)
class Fit:
    """sequence_length: tokens of a window. batch_size: windows in a micro-batch; accumulation: a device's micro-batches
    in a step. checkpointing: whether activations are computed again. fits: whether the memory is expected to hold
    it."""

    sequence_length: int
    batch_size: int
    accumulation: int
    checkpointing: bool
    fits: bool = True


def fit(
    needs: Needs,
    memory: float,
    *,
    sequence_length: int | None,
    longest: int,
    shortest: int,
    batch_size: int | None,
    accumulation: int | None,
    checkpointing: bool | None,
    most: int | None = None,
) -> Fit:
    """The longest windows that `memory` bytes hold, in steps of `STEP_TOKENS`; of these, without checkpointing if that
    fits, and as many at a time as fit.

    What is given stays as it is. most: windows in a micro-batch that is not given. Of windows, `longest` is tried
    first, then its halves, down to `shortest`. Where nothing fits, what takes least is returned.
    """
    for length in [sequence_length] if sequence_length else _halves(longest, shortest):
        rows = max(1, STEP_TOKENS // length)
        share = max(1, rows // (accumulation or 1))
        sizes = [batch_size] if batch_size else [n for n in range(min(share, most or share), 0, -1) if share % n == 0]
        for again in (False, True) if checkpointing is None else (checkpointing,):
            for size in sizes:
                found = Fit(length, size, accumulation or max(1, rows // size), again)
                if needs(length, size, again) <= memory:
                    return found
    return Fit(found.sequence_length, found.batch_size, found.accumulation, found.checkpointing, fits=False)


def _halves(longest: int, shortest: int) -> Iterator[int]:
    yield longest
    while (longest := longest // 2) >= shortest:
        yield longest


def longest_window(config: PreTrainedConfig, device: str) -> int:
    """The tokens of the longest window that a decoder is trained on unasked on this device."""
    from landmark_cli.training.setup import uses_cpu

    return min(longest_of(config), CPU_WINDOW) if uses_cpu(device) else longest_of(config)


def longest_of(config: PreTrainedConfig) -> int:
    """The tokens of the longest window that a decoder is trained on unasked, wherever there is the memory: its
    positions, or what it sees of them."""
    from landmark_cli.models.layers import window_of_all

    config = config.get_text_config()
    limits = [STEP_TOKENS, getattr(config, "max_position_embeddings", None) or CPU_WINDOW]
    # Layers that have a sliding window keep it where others see everything; where all have one, it is the limit.
    if window := window_of_all(config):
        limits.append(window)
    return min(limits)


def device_memory(device: str) -> float:
    """Bytes that a run may take of the device it is on; on a CPU of the host's memory that is free, or of all of it,
    which the processes of a launch share. Without bound where a launch splits the model, of which no estimate is
    made."""
    from landmark_cli.training.setup import uses_cpu

    if any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED")):
        return float("inf")
    if uses_cpu(device):
        import psutil

        memory, processes = psutil.virtual_memory(), processes_here()
        # What others hold already is not there: a system that runs out ends a process without a word. In a launch that
        # would be what its other processes happen to hold by now, which is theirs in any case.
        return MEMORY_SHARE * (memory.available if processes == 1 else memory.total / processes)
    import torch

    index = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
    return MEMORY_SHARE * torch.cuda.get_device_properties(index).total_memory
