"""How attention in training is timed: replayed CUDA graphs, and the definition on what it has memory for."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from attention_shapes import PHASES, Shape
from timing import GPU, synchronize
from torch import Tensor

# A float32 matrix of logits of the eager definition, of which it keeps about a dozen.
EAGER_BYTES = (1 << 30) + (1 << 28)


class Timer:
    """Replays calls over rotating inputs; a run gives the seconds a call takes."""

    def __init__(self, calls: list[Callable[[], object]], stream) -> None:
        self.calls = calls
        if not GPU:
            return
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            for call in calls:
                call()

    def run(self) -> float:
        if not GPU:
            begin = time.perf_counter()
            for call in self.calls:
                call()
            return (time.perf_counter() - begin) / len(self.calls)
        self.start.record()
        self.graph.replay()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3 / len(self.calls)


def timers(function: Callable, shape: Shape, sets: list[list[Tensor]]) -> dict[str, Timer] | None:
    """Of an implementation, by phase; None, said on stderr, if it cannot serve."""
    stream = torch.cuda.Stream() if GPU else None

    def forward(given: list[Tensor]) -> None:
        with torch.no_grad():
            function(*given[:3], shape.block)

    # Enough calls that the clock's grain and the launch of a graph do not count.
    repeats = max(1, round(0.001 / (shape.flops("forward") / 3e14) / len(sets))) if GPU else 1
    synchronize()
    try:
        # Backward runs in the stream of its forward, and only in the stream of the capture can it be captured.
        with torch.cuda.stream(stream):
            outputs = [function(*given[:3], shape.block) for given in sets]
            backward = [
                lambda out=out, given=given: torch.autograd.grad(out, given[:3], given[3], retain_graph=True)
                for out, given in zip(outputs, sets, strict=True)
            ]
            backward[0]()
            forward(sets[0])
        synchronize()
        return {
            "forward": Timer([lambda given=given: forward(given) for given in sets] * repeats, stream),
            "backward": Timer(backward * max(1, repeats // 2), stream),
        }
    except Exception as error:
        print(f"  {shape}: {type(error).__name__}: {str(error).splitlines()[0][:150]}", file=sys.stderr)
        return None


def part(shape: Shape) -> tuple[Shape, float]:
    """As much of a shape as the eager definition has memory for, whole groups of heads, and how much that is."""
    heads = min(shape.heads, max(1, EAGER_BYTES // (4 * shape.tokens**2) // shape.groups) * shape.groups)
    rows = max(1, EAGER_BYTES // (4 * shape.tokens**2 * shape.heads)) if heads == shape.heads else 1
    rows = min(rows, shape.batch)
    smaller = replace(shape, batch=rows, heads=heads, key_heads=heads // shape.groups if shape.key_heads else 0)
    return smaller, rows * heads / (shape.batch * shape.heads)


def cut(tensors: list[Tensor], small: Shape) -> list[Tensor]:
    """That part of q, k, v and dout (or of the gradients)."""
    heads = small.heads, small.heads // small.groups, small.heads // small.groups, small.heads
    return [x.detach()[: small.batch, :n] for x, n in zip(tensors, heads, strict=True)]


def times_of_part(function: Callable, shape: Shape, given: list[Tensor]) -> dict[str, list[float]]:
    """Seconds of each phase, three times, of what is as large as the definition, on the part that fits, scaled to the
    whole. function: of q, k, v and the block size."""
    small, share = part(shape)
    *leaves, dout = cut(given, small)
    leaves = [x.requires_grad_() for x in leaves]
    times = {phase: [] for phase in PHASES}
    for _ in range(3):
        synchronize()
        begin = time.perf_counter()
        out = function(*leaves, shape.block)
        synchronize()
        middle = time.perf_counter()
        torch.autograd.grad(out, leaves, dout)
        synchronize()
        times["forward"].append((middle - begin) / share)
        times["backward"].append((time.perf_counter() - middle) / share)
        del out
    return times
