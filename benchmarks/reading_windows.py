"""What measurements of windows that are read chunk by chunk share: the inputs, their attention, what a call takes."""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.timing import in_turn
from landmark_cli.attention import functional
from landmark_cli.attention.kernels.reading import window as kernels
from landmark_cli.attention.rotary import default_inverse_frequencies
from landmark_cli.attention.window import ReadingWindow, WindowSettings

DEVICE, DTYPE = "cuda", torch.bfloat16
BLOCK, CHUNK, TOP_K = 64, 2048, 8
# The stages of attention as it reads, as kernels/reading/window.py has them.
STAGES = ("landmark_keys_of", "select", "route", "attend", "merge", "own_gradient", "key_gradients", "sum_queries")


@dataclass(frozen=True)
class Shape:
    """heads on key_heads of dim numbers."""

    heads: int
    key_heads: int
    dim: int


LARGE, SMOLLM2 = Shape(32, 8, 128), Shape(9, 3, 64)


def window_of(tokens: int, dim: int) -> ReadingWindow:
    frequencies = default_inverse_frequencies(dim, 500_000.0).to(DEVICE)
    return ReadingWindow.make(WindowSettings(CHUNK, BLOCK, TOP_K), 1, tokens, frequencies)


def tensors(shape: Shape, tokens: int) -> list[Tensor]:
    """q, k, v, which ask for gradients, and dout, in memory as a model has them."""
    torch.manual_seed(0)
    *leaves, dout = (
        torch.randn(1, tokens, n, shape.dim, dtype=DTYPE, device=DEVICE).transpose(1, 2)
        for n in (shape.heads, shape.key_heads, shape.key_heads, shape.heads)
    )
    return [x.requires_grad_() for x in leaves] + [dout]


def as_it_reads(tokens: int, dim: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    window = window_of(tokens, dim)
    # Not layer 0, whose landmarks have one key: here keys are random.
    return lambda q, k, v: functional.attend_window(1, q, k, v, window)


def forward_and_backward(attention: Callable, given: list[Tensor]) -> None:
    torch.autograd.grad(attention(*given[:3]), given[:3], given[3])


def milliseconds(work: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def milliseconds_in_turn(work: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each, round after round; the first round does not count."""
    return in_turn({name: functools.partial(milliseconds, call) for name, call in work.items()}, rounds, warm=1)


def gibibytes(work: Callable[[], object]) -> float:
    """Peak memory of a call, beside what is there already."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


@contextlib.contextmanager
def timed_stages(names: tuple[str, ...] = STAGES) -> Iterator[dict[str, list[tuple]]]:
    """While it lasts, every stage leaves a pair of CUDA events, by its name."""
    events: dict[str, list[tuple]] = {}
    usual = {name: getattr(kernels, name) for name in names}

    def timed(name: str, stage: Callable) -> Callable:
        @functools.wraps(stage)
        def run(*arguments):
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            found = stage(*arguments)
            pair[1].record()
            events.setdefault(name, []).append(tuple(pair))
            return found

        return run

    for name, stage in usual.items():
        setattr(kernels, name, timed(name, stage))
    try:
        yield events
    finally:
        for name, stage in usual.items():
            setattr(kernels, name, stage)


def stage_times(work: Callable[[], object], rounds: int, names: tuple[str, ...] = STAGES) -> dict[str, float]:
    """Milliseconds that a call spends in each stage, medians over rounds."""
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        with timed_stages(names) as events:
            work()
        torch.cuda.synchronize()
        for name, pairs in events.items():
            found.setdefault(name, []).append(sum(begin.elapsed_time(end) for begin, end in pairs))
    return {name: statistics.median(times) for name, times in found.items()}
