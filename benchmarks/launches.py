"""What repeated launches and hand-made tensor descriptors are worth, beside a step that is captured in a CUDA graph.

    python benchmarks/launches.py > benchmarks/results/launches-MACHINE.md
    python benchmarks/launches.py --cases seed --rounds 5

Three ways of launching the same kernels, in turns: as they are launched (calls that differ in addresses only repeat an
earlier one's launches); anew each time, with the descriptors of the copy engine made by hand; anew, with Triton's own
descriptors. Of a call of attention, forward and backward: microseconds of the host until it is free, and in all. Of the
training loop's step: stream tokens a second, the median of rounds. Of a micro-batch: launched, and captured.

A step that waits for its host is slower on a slower host: compare two versions of the code by their rows of one run of
each, in turns, on one machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import training

from landmark_cli.attention.functional import landmark_attention
from landmark_cli.attention.kernels.common.launch import LaunchCache
from landmark_cli.training.runs import device_name

# (batch, heads, tokens) of 128 dimensions, blocks of 51.
CALLS = [(16, 8, 512), (4, 8, 2048)]
WAYS = ("repeated", "anew, descriptors by hand", "anew, Triton's descriptors")


@contextmanager
def launched(way: str) -> Iterator[None]:
    """Launch so while the block runs."""
    if way == "repeated":
        yield
        return
    with patch.object(LaunchCache, "repeat", lambda *_: False), patch.object(LaunchCache, "make", make_and_forget):
        if way == "anew, descriptors by hand":
            yield
            return
        from landmark_cli.attention.kernels.hopper import launch

        with patch.object(launch, "_tiled", tiled_by_triton):
            yield


def make_and_forget(cache: LaunchCache, kind: tuple, tensors: tuple, launches: Callable[[], list]) -> None:
    """LaunchCache.make, but nothing is kept."""
    list(launches())


def tiled_by_triton(place: int, piece: torch.Tensor, tile: tuple[int, ...]):
    """hopper/launch.py's `_tiled`, with a descriptor that Triton makes and checks."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from landmark_cli.attention.kernels.common.launch import Operand
    from landmark_cli.attention.kernels.hopper.launch import GLUON_DTYPES

    layout = gl.NVMMASharedLayout.get_default_for(list(tile), GLUON_DTYPES[piece.dtype])
    sizes = zip(piece.shape[:-1], piece.stride(), strict=False)
    steps = [stride if size > 1 else piece.shape[-1] for size, stride in sizes]
    describe = lambda base: TensorDescriptor(base, list(piece.shape), [*steps, 1], list(tile), layout)  # noqa: E731
    return Operand(place, piece, describe)


def attention_rows(rounds: int, times: int = 50) -> Iterator[tuple[str, str, float, float]]:
    """(call, way, microseconds of the host, microseconds in all)."""
    for batch, heads, tokens in CALLS:
        shape = batch, heads, tokens, 128
        q, k, v, gradient = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
        for x in (q, k, v):
            x.requires_grad_()

        def work(q=q, k=k, v=v, gradient=gradient) -> None:
            landmark_attention(q, k, v, block_size=51).backward(gradient)

        found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way in WAYS:
                with launched(way):
                    for _ in range(5):
                        work()
                    torch.cuda.synchronize()
                    started = time.perf_counter()
                    for _ in range(times):
                        work()
                    host = time.perf_counter() - started
                    torch.cuda.synchronize()
                found[way].append((host / times * 1e6, (time.perf_counter() - started) / times * 1e6))
        for way, pairs in found.items():
            host, whole = (statistics.median(part) for part in zip(*pairs, strict=True))
            yield f"B{batch} H{heads} T{tokens}", way, host, whole


def step_rows(name: str, mode: str, rounds: int, seconds: float) -> Iterator[tuple[str, str, str]]:
    """(case, way, figure) of the training loop's step and of one micro-batch of it."""
    bench = training.Bench({}, seconds, Path(tempfile.mkdtemp()))
    case = next(one for one in training.cases([name], [], False, [mode]) if one.kind == "landmark")
    with training.fresh():
        loop = bench.loop(case)
        parameters, micro_batches = list(loop.module.parameters()), next(loop.micro_batches())

        def step() -> None:
            loop.train_step(micro_batches, parameters)
            loop.step += 1

        for _ in range(3):
            step()
        times = max(3, int(seconds / training.seconds_of(step, 3)))
        found: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way in WAYS:
                with launched(way):
                    step()
                    found[way].append(training.seconds_of(step, times))
        tokens = case.length * case.batch * case.accumulation
        for way, each in found.items():
            yield f"{name}, {mode}", way, f"{tokens / statistics.median(each):,.0f} tokens/s"

        def micro_batch() -> None:
            loop.accelerator.backward(loop.module(**micro_batches[0]))

        graph = captured(micro_batch)
        pairs = [(training.seconds_of(micro_batch, times), training.seconds_of(graph.replay, times)) for _ in found]
        for way, each in zip(("a micro-batch, launched", "the same, captured"), zip(*pairs, strict=True), strict=True):
            yield f"{name}, {mode}", way, f"{statistics.median(each) * 1e3:.2f} ms"


def captured(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Work as a graph, warmed up on a stream of its own, as capturing asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=["seed", "long"], choices=["seed", "long"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="of a round of steps")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("it needs an NVIDIA GPU")
    print(f"# Launches\n\n{device_name(torch.device('cuda'))}, torch {torch.__version__}.\n", flush=True)
    print("| attention, forward and backward | launched | host, us | in all, us |\n|---|---|---:|---:|", flush=True)
    for call, way, host, whole in attention_rows(options.rounds):
        print(f"| {call} | {way} | {host:.0f} | {whole:.0f} |", flush=True)
    print("\n| training step | launched | |\n|---|---|---:|", flush=True)
    for name in options.cases:
        for mode in ("eager", "compiled"):
            for case, way, figure in step_rows(name, mode, options.rounds, options.seconds):
                print(f"| {case} | {way} | {figure} |", flush=True)


if __name__ == "__main__":
    main()
