"""Fused landmark attention against PyTorch's fused plain attention and the eager definition: time, memory, error.

    python benchmarks/attention.py --output benchmarks/results/attention-h100.md
    python benchmarks/attention.py --quick --only D64

Times are medians of replayed CUDA graphs, in which each call takes another set of inputs until they exceed the L2 cache
twice. All implementations of a row are replayed in turn, round after round, so a ratio compares neighbours in time.
TF/s counts 4 B H T T D / 2 forward and 2.5 times that backward, whatever an implementation really computes.

A further implementation is one entry of IMPLEMENTATIONS. Without a GPU the script runs on toy shapes, timed by a clock.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from attention_shapes import DTYPE, PHASES, TOY_SHAPES, Shape, shapes
from attention_timing import cut, part, timers, times_of_part
from markdown_table import table
from timing import GPU, in_turn, synchronize
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from landmark_cli.attention.functional import landmark_attention
from landmark_cli.attention.reference import landmark_attention as definition
from tests.closeness import whole_error

# Beyond this, inputs of one call do not stay in the L2 cache until they come again.
ROTATED_BYTES = 128 << 20


def plain(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    return attend


def fused(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    return landmark_attention(q, k, v, block_size=block, backend="triton")


def hopper(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    return landmark_attention(q, k, v, block_size=block, backend="hopper")


def eager(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    return definition(q, k, v, block_size=block)


TRITON, HOPPER, YARDSTICK, EAGER = "Triton", "Hopper", "FA2", "eager"
# Ours, and where a shape has their targets.
OURS = {TRITON: "targets", HOPPER: "hopper_targets"}
# Each computes attention of q, k, v with blocks of that many tokens; one that raises cannot serve: its cell is "—".
IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    TRITON: fused,
    HOPPER: hopper,
    YARDSTICK: plain(SDPBackend.FLASH_ATTENTION),
    "cuDNN": plain(SDPBackend.CUDNN_ATTENTION),
}
# These compute plain attention, and are held against that in float32.
PLAIN = {YARDSTICK, "cuDNN"}


@dataclass
class Result:
    """What one implementation did on one shape. times: of each phase, seconds a call, round after round."""

    times: dict[str, list[float]]
    bytes: int = 0
    errors: dict[str, float] = field(default_factory=dict)

    def seconds(self, phase: str) -> float:
        return statistics.median(self.times[phase])


def peak_memory(function: Callable, shape: Shape, given: list[Tensor]) -> int:
    """Bytes that a forward and a backward pass take at most, beside their inputs."""
    if not GPU:
        return 0
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(function(*given[:3], shape.block), given[:3], given[3])
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def exact(function: Callable, small: Shape, given: list[Tensor]) -> list[Tensor]:
    """Output and gradients in float32, of the part of the inputs that fits."""
    *leaves, dout = (x.float() for x in cut(given, small))
    leaves = [x.requires_grad_() for x in leaves]
    out = function(*leaves, small.block)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def relative_errors(function: Callable, shape: Shape, given: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    """Relative norm of the difference to float32, of the output and each gradient."""
    small, _ = part(shape)
    out = function(*given[:3], shape.block)
    dq, dk, dv = torch.autograd.grad(out, given[:3], given[3])
    dq, dk, dv, out = cut([dq, dk, dv, out], small)
    return {name: whole_error(a, b)
            for name, a, b in zip(("out", "dq", "dk", "dv"), (out, dq, dk, dv), expected, strict=True)}  # fmt: skip


def measure_eager(shape: Shape, given: list[Tensor]) -> Result:
    """The eager definition on the part that fits, scaled to the whole."""
    small, share = part(shape)
    *leaves, dout = cut(given, small)
    leaves = [x.requires_grad_() for x in leaves]
    times = times_of_part(eager, shape, given)
    return Result(times, round(peak_memory(eager, small, [*leaves, dout]) / share))


def measure_times(shape: Shape, sets: list[list[Tensor]], rounds: int) -> dict[str, Result]:
    """Every implementation that can serve, and each of OURS on the shape beside it under "beside" and its name."""
    contenders = {name: timers(function, shape, sets) for name, function in IMPLEMENTATIONS.items()}
    if shape.beside:
        others = [shape.beside.tensors() for _ in sets]
        for name in OURS.keys() & IMPLEMENTATIONS.keys():
            contenders[f"beside {name}"] = timers(IMPLEMENTATIONS[name], shape.beside, others)
    contenders = {name: found for name, found in contenders.items() if found}
    # The first rounds warm the GPU up.
    runs = {(phase, name): found[phase].run for phase in PHASES for name, found in contenders.items()}
    times = in_turn(runs, rounds)
    return {name: Result({phase: times[phase, name] for phase in PHASES}) for name in contenders}


def measure(shape: Shape, rounds: int, with_eager: bool) -> dict[str, Result]:
    """Everything about a shape."""
    torch.manual_seed(0)
    bytes_of_one = 4 * shape.batch * shape.heads * shape.tokens * shape.dim * DTYPE.itemsize
    sets = [shape.tensors() for _ in range(math.ceil(ROTATED_BYTES / bytes_of_one) if GPU else 1)]
    results = measure_times(shape, sets, rounds)
    given = sets[0]
    for names, kind in ((IMPLEMENTATIONS.keys() - PLAIN, eager), (PLAIN, plain(SDPBackend.MATH))):
        if names & results.keys():
            expected = exact(kind, part(shape)[0], given)
        for name in names & results.keys():
            results[name].bytes = peak_memory(IMPLEMENTATIONS[name], shape, given)
            results[name].errors = relative_errors(IMPLEMENTATIONS[name], shape, given, expected)
    if with_eager:
        results[EAGER] = measure_eager(shape, given)
    return results


def ratio(shape: Shape, results: dict[str, Result], phase: str, name: str) -> float | None:
    """Speed of one of OURS against the yardstick: the median over rounds."""
    other = results.get(f"beside {name}" if shape.beside else YARDSTICK)
    if name not in results or other is None:
        return None
    work = shape.flops(phase) / shape.beside.flops(phase) if shape.beside else 1.0
    pairs = zip(results[name].times[phase], other.times[phase], strict=True)
    return statistics.median(theirs / ours * work for ours, theirs in pairs)


def time_row(shape: Shape, results: dict[str, Result], phase: str, names: list[str]) -> list[str]:
    cells = ["—"] * len(names)
    for column, name in enumerate(names):
        if name in results:
            seconds = results[name].seconds(phase)
            cells[column] = f"{seconds * 1e3:.3f} ({shape.flops(phase) / seconds / 1e12:.0f})"
    against = f"H{shape.beside.heads}, block {shape.beside.block}" if shape.beside else YARDSTICK
    for name, targets in OURS.items():
        found, wanted = ratio(shape, results, phase, name), getattr(shape, targets)[PHASES.index(phase)]
        if found is None:
            cells += ["—", "—"]
        else:
            met = "met" if found >= wanted else "not met"
            cells += [f"{found:.2f} x {against}", f"{wanted:.2f} {met}"]
    return [str(shape), *cells]


def report(measured: dict[Shape, dict[str, Result]], seconds: float) -> str:
    """The whole document."""

    def rows(names: list[str], cell: Callable[[Result], str]) -> list[list[str]]:
        return [
            [str(shape), *(cell(results[name]) if name in results else "—" for name in names)]
            for shape, results in measured.items()
        ]

    names = [*IMPLEMENTATIONS, *([EAGER] if any(EAGER in results for results in measured.values()) else [])]
    method = (__doc__ or "").split("\n\n")[2]
    parts = [
        f"# Attention, bf16, causal: {torch.cuda.get_device_name() if GPU else 'CPU, toy shapes'}",
        f"torch {torch.__version__}, triton {triton.__version__}, cuDNN {torch.backends.cudnn.version()}; "
        f"`benchmarks/attention.py`, {seconds:.0f} s.",
        method,
    ]
    if EAGER in names:
        parts.append(
            "The eager definition was timed on as many heads as it has memory for, without a graph; its time and\n"
            "memory are scaled up to the shape."
        )
    for phase in PHASES:
        heading = ["shape", *names, *(title for name in OURS for title in (f"speed of {name}", "target"))]
        parts.append(f"## {phase.capitalize()}: ms (TF/s)")
        parts.append(table(heading, [time_row(shape, found, phase, names) for shape, found in measured.items()]))
    parts.append("## Peak memory of forward and backward, beside their inputs: MiB")
    parts.append(table(["shape", *names], rows(names, lambda result: f"{result.bytes / 2**20:.0f}")))
    parts.append("## Relative error of out, dq, dk, dv: thousandths")
    parts.append(
        "Norm of the difference over the norm, on as many heads as the eager definition has memory for, against the\n"
        "same attention (landmark or plain) in float32."
    )
    names = list(IMPLEMENTATIONS)
    errors = rows(names, lambda result: ", ".join(f"{1e3 * error:.1f}" for error in result.errors.values()))
    parts.append(table(["shape", *names], errors))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, help="write the tables there, in Markdown")
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="few rounds, no eager definition")
    parser.add_argument("--without", action="append", choices=IMPLEMENTATIONS, default=[], help="leave one out")
    options = parser.parse_args()
    for name in options.without:
        del IMPLEMENTATIONS[name]
    begin = time.perf_counter()
    found = [shape for shape in (shapes() if GPU else TOY_SHAPES) if options.only in str(shape)]
    measured = {}
    for shape in found:
        measured[shape] = measure(shape, 5 if options.quick else options.rounds, with_eager=not options.quick)
        seconds = time.perf_counter() - begin
        print(f"{seconds:.0f} s: {shape}", file=sys.stderr, flush=True)
        # After every shape, so that a failure loses one.
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(report(measured, seconds), encoding="utf-8")
        if GPU:
            torch.cuda.empty_cache()
    print(report(measured, time.perf_counter() - begin))


if __name__ == "__main__":
    main()
