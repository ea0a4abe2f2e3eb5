"""What a recorded chunk reads that is another one each time, brought to the device in one copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# A graph may wait to be run while the host gets the next one ready: what each reads is written to a place of its own.
STAGES = 2


class GraphInputs:
    """Memory of a device from which a recorded chunk takes its tokens and counts, and how the host writes to it.

    ids: (B, W) int64 stream tokens. kept: (n,) int64, positions of W that give logits. counters: (4, B) int32, see
    Chunk. They lie side by side, so that a copy brings all of them: each copy takes as long as several layers of a
    small model take to be launched.
    """

    def __init__(self, rows: int, width: int, kept: int, device: torch.device) -> None:
        """Zeros: rows, width and kept are B, W and n."""
        # Counters first, as they would lie in a tensor of their own: kernels are compiled for how addresses are
        # aligned.
        sizes = 2 * rows, rows * width, kept
        self._memory = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self.counters, self.ids, self.kept = _parts(self._memory, rows, sizes)
        self._stages = [_Stage(self._memory, rows, sizes) for _ in range(STAGES if self._memory.is_cuda else 1)]
        self._next = 0

    def write(self, ids: Tensor, kept: Tensor, counters: Sequence[Sequence[int]]) -> None:
        """What the next run reads, ids and kept on the host. What the device is still to read stays; it is not waited
        for, unless it is as many runs behind as there are stages."""
        stage = self._stages[self._next]
        self._next = (self._next + 1) % len(self._stages)
        stage.wait()
        stage.ids.copy_(ids)
        stage.kept.copy_(kept)
        stage.counters[...] = counters
        self._memory.copy_(stage.memory, non_blocking=True)
        stage.copied()


class _Stage:
    """Pinned host memory from which one run's inputs are copied."""

    def __init__(self, like: Tensor, rows: int, sizes: tuple[int, int, int]) -> None:
        self.memory = torch.zeros(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
        counters, self.ids, self.kept = _parts(self.memory, rows, sizes)
        # Written to from lists, which is quicker by NumPy than by way of a tensor.
        self.counters = counters.numpy()
        self._device, self._event = like.device, torch.cuda.Event() if like.is_cuda else None

    def wait(self) -> None:
        """Until what was written before has been copied."""
        if self._event is not None:
            self._event.synchronize()

    def copied(self) -> None:
        """A copy has been asked for."""
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))


def _parts(memory: Tensor, rows: int, sizes: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    counters, ids, kept = memory.split(sizes)
    return counters.view(torch.int32).view(4, rows), ids.view(rows, -1), kept
