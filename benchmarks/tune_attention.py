"""The attention kernels in other configurations: times by shape, the fastest first, today's marked with a star.

    python benchmarks/tune_attention.py --only D128
    python benchmarks/tune_attention.py --only T512 --kernels query_gradient key_gradient

A configuration is (query rows, keys, warps, stages, registers); what is best goes into
landmark_cli/attention/kernels/training/configurations.py. Backward's kernels run in the same groups of heads as in
training; --parts times backward as a whole in more of them, whose tensors the second kernel may then find in the L2
cache.
"""

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch
import triton

# The script's own folder is on the path.
from attention_shapes import DEVICE, TOY_SHAPES, Shape, shapes
from attention_timing import Timer
from timing import GPU, medians

from landmark_cli.attention.kernels.common.configuration import Configuration
from landmark_cli.attention.kernels.common.statistics import Part, backward_parts
from landmark_cli.attention.kernels.common.tensors import empty_heads_last
from landmark_cli.attention.kernels.training import configurations, launch

TRIED = {
    "forward": [(64, 4, 3), (64, 4, 2), (64, 4, 4), (128, 8, 2), (128, 8, 3), (128, 8, 4), (128, 8, 2, 128),
                (128, 8, 3, 128), (128, 4, 3), (64, 4, 3, 168)],
    "query_gradient": [(64, 4, 2), (64, 4, 3), (64, 4, 2, 168), (64, 4, 3, 168), (64, 8, 2), (32, 4, 2, 168),
                       (64, 8, 3), (128, 8, 2), (128, 8, 3), (128, 8, 4), (128, 8, 3, 128)],
    "key_gradient": [(32, 4, 2), (32, 4, 3), (32, 4, 4), (32, 8, 3), (16, 4, 3), (16, 4, 4), (16, 4, 3, 168),
                     (32, 4, 2, 168), (32, 4, 3, 168), (32, 8, 2), (64, 4, 2), (64, 4, 3), (64, 8, 2), (64, 8, 3)],
}  # fmt: skip


def backward_call(shape: Shape, workspace: int) -> tuple[tuple, launch.Layout]:
    """What launches of backward take, statistics of so many numbers included."""
    q, k, v, dout = (x.detach() for x in shape.tensors())
    layout = launch.Layout(shape.block, shape.dim**-0.5)
    out, lse = launch.forward(q, k, v, layout)
    gradients = (empty_heads_last(x) for x in (q, k, v))
    statistics = torch.empty(workspace, dtype=torch.float32, device=DEVICE)
    return (q, k, v, out, dout, lse, None, *gradients, statistics, None, None, None), layout


def kernels(shape: Shape) -> dict[str, Callable[[Configuration], object]]:
    """Our three kernels on a shape: functions of their configuration."""
    parts, workspace = parts_of(shape)
    tensors, layout = backward_call(shape, workspace)
    q, k, v, out, _, lse, *_ = tensors
    forward = q, k, v, out, lse, None, None, None

    def query_gradient(choice: Configuration) -> None:
        for part in parts:
            launch.launch_query_gradient(tensors, layout, part, choice)

    def key_gradient(choice: Configuration) -> None:
        for part in parts:
            launch.launch_key_gradient(tensors, layout, part, choice)

    return {
        "forward": lambda choice: launch.launch_forward(forward, layout, choice),
        "query_gradient": query_gradient,
        "key_gradient": key_gradient,
    }


def parts_of(shape: Shape) -> tuple[list[Part], int]:
    """The parts that backward works on, and the numbers of their workspace, as in training."""
    q, k, *_ = shape.tensors()
    return backward_parts(q, k, shape.block)


def backward_in_parts(shape: Shape, counts: list[int]) -> dict[int, Callable[[], object]]:
    """All of backward in so many groups of heads, one after the other: count -> function. Empty where not even one head
    fits the workspace whole."""
    (first_row, last_row, _, _, plane), *_ = parts_of(shape)[0]
    key_heads = shape.batch * (shape.key_heads or shape.heads)
    if last_row - first_row < shape.tokens or not counts:
        return {}
    steps = {count: -(-key_heads // count) for count in counts}
    tensors, layout = backward_call(shape, 12 * shape.groups * plane * max(steps.values()))

    def run(step: int) -> None:
        parts = [
            Part(first_row, last_row, first, min(step, key_heads - first), plane) for first in range(0, key_heads, step)
        ]
        list(launch.launch_backward(tensors, layout, parts))

    return {count: lambda step=step: run(step) for count, step in steps.items()}


def tried(kernel: str, shape: Shape) -> list[Configuration]:
    cols = max(16, triton.next_power_of_2(shape.block))
    return [Configuration(rows, cols, *rest) for rows, *rest in TRIED[kernel]]


def compile_kernels(shape: Shape, kernel: str, choices: list[Configuration]) -> None:
    """In a process of its own: fill Triton's cache, whose keys do not depend on the length."""
    function = kernels(replace(shape, batch=1, tokens=4 * shape.block))[kernel]
    for choice in choices:
        try:
            function(choice)
        except Exception as error:
            print(f"  {kernel} {choice}: {type(error).__name__}", file=sys.stderr)


def warm(found: list[Shape], names: list[str]) -> None:
    """Compile in parallel what will be timed."""
    distinct = {(shape.heads, shape.key_heads, shape.dim, shape.block): shape for shape in found}
    jobs = []
    for shape in distinct.values():
        for kernel in names:
            every = tried(kernel, shape)
            jobs += [(shape, kernel, every[first::6]) for first in range(6)]
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1, 14), get_context("spawn")) as pool:
        for job in [pool.submit(compile_kernels, *job) for job in jobs]:
            job.result()


def times(function: Callable[[Any], object], every: list, rounds: int) -> dict:
    """Seconds a call takes with each choice that compiles and fits."""
    timers = {}
    for choice in every:
        try:
            function(choice)
            timers[choice] = Timer([lambda choice=choice: function(choice)] * 3, torch.cuda.Stream() if GPU else None)
        except Exception as error:
            print(f"  {choice}: {type(error).__name__}", file=sys.stderr)
    return medians({choice: timer.run for choice, timer in timers.items()}, rounds, warm=0)


def tune(shape: Shape, names: list[str], rounds: int) -> None:
    """Print each kernel's time in every configuration tried, the fastest first."""
    print(shape, flush=True)
    q = shape.tensors()[0]
    for kernel, function in kernels(shape).items():
        if kernel not in names:
            continue
        default = configurations.choices(kernel, q, shape.block).configurations[0]
        every = list(dict.fromkeys([default, *tried(kernel, shape)]))
        found = sorted(times(function, every, rounds).items(), key=lambda pair: pair[1])
        said = (
            f"({c.rows}, {c.cols}, {c.warps}, {c.stages}, {c.registers}){'*' * (c == default)} {seconds * 1e3:.3f}"
            for c, seconds in found
        )
        print(f"  {kernel}, ms: {'; '.join(said)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    parser.add_argument("--kernels", nargs="+", choices=TRIED, default=list(TRIED))
    parser.add_argument("--parts", type=int, nargs="+", default=[], help="backward in so many groups of heads")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found = [shape for shape in (shapes() if GPU else TOY_SHAPES) if options.only in str(shape)]
    warm(found, options.kernels)
    for shape in found:
        tune(shape, options.kernels, options.rounds)
        functions = backward_in_parts(shape, options.parts)
        for count, seconds in times(
            lambda count, runs=functions: runs[count](), list(functions), options.rounds
        ).items():
            print(f"  backward in {count} parts: {seconds * 1e3:.3f} ms", flush=True)


if __name__ == "__main__":
    main()
