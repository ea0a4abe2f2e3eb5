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
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from landmark_cli.attention.functional import landmark_attention
from landmark_cli.attention.reference import landmark_attention as definition
from tests.closeness import whole_error

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16

# Beyond this, inputs of one call do not stay in the L2 cache until they come again.
ROTATED_BYTES = 128 << 20
# A float32 matrix of logits of the eager definition, of which it keeps about a dozen.
EAGER_BYTES = (1 << 30) + (1 << 28)


@dataclass(frozen=True)
class Shape:
    """One row of the table. targets, hopper_targets: least speed (forward, backward) of the portable and of the Hopper
    kernels, against FA2, or against themselves on `beside` if there is one.

    beside: a shape that is timed with it in the same rounds; speeds are then compared per FLOP.
    """

    batch: int
    heads: int
    tokens: int
    dim: int
    block: int = 64
    key_heads: int = 0
    targets: tuple[float, float] = (0.0, 0.0)
    hopper_targets: tuple[float, float] = (0.0, 0.0)
    beside: Shape | None = None

    def __str__(self) -> str:
        heads = f"H{self.heads}" + (f" on {self.key_heads}" if self.key_heads else "")
        return f"B{self.batch} {heads} T{self.tokens} D{self.dim} block {self.block}"

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.heads // (self.key_heads or self.heads)

    def flops(self, phase: str) -> float:
        return 2 * self.batch * self.heads * self.tokens**2 * self.dim * {"forward": 1.0, "backward": 2.5}[phase]

    def tensors(self) -> list[Tensor]:
        """Fresh q, k, v and dout, in memory as a model has them."""
        heads = self.heads, self.key_heads or self.heads, self.key_heads or self.heads, self.heads
        found = [torch.randn(self.batch, self.tokens, n, self.dim, dtype=DTYPE, device=DEVICE) for n in heads]
        *leaves, dout = (x.transpose(1, 2) for x in found)
        return [x.requires_grad_() for x in leaves] + [dout]


def shapes() -> list[Shape]:
    """The tables' rows."""
    wide = Shape(4, 32, 2048, 128), Shape(2, 32, 4096, 128), Shape(1, 32, 8192, 128), Shape(1, 32, 16384, 128)
    found = [
        replace(shape, targets=(1.15, 1.05), hopper_targets=(1.5, 1.4) if shape.tokens == 2048 else (1.7, 1.35))
        for shape in wide
    ]
    found.append(Shape(4, 16, 4096, 64, targets=(1.2, 1.1), hopper_targets=(1.3, 1.25)))
    found.append(Shape(16, 8, 512, 128, targets=(1.25, 1.3), hopper_targets=(1.4, 1.3)))
    for shape, tokens in zip(wide, (2040, 4080, 8160), strict=False):
        both = {"targets": (0.8, 0.8), "hopper_targets": (0.8, 0.8)}
        found.append(replace(shape, tokens=tokens, block=51, beside=shape, **both))
    found.append(replace(wide[2], key_heads=8, targets=(1.0, 1.0), hopper_targets=(1.0, 1.0), beside=wide[2]))
    # SmolLM2-135M's, as it is distilled.
    found.append(Shape(4, 9, 8192, 64, key_heads=3))
    return found


TOY_SHAPES = [
    Shape(1, 2, 64, 16, 16, targets=(1.0, 1.0)),
    Shape(1, 4, 60, 16, 15, targets=(0.8, 0.8), beside=Shape(1, 4, 64, 16, 16)),
    Shape(1, 4, 64, 16, 16, key_heads=2, targets=(1.0, 1.0), beside=Shape(1, 4, 64, 16, 16)),
]


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


PHASES = "forward", "backward"
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


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


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


def measure_times(shape: Shape, sets: list[list[Tensor]], rounds: int) -> dict[str, Result]:
    """Every implementation that can serve, and each of OURS on the shape beside it under "beside" and its name."""
    contenders = {name: timers(function, shape, sets) for name, function in IMPLEMENTATIONS.items()}
    if shape.beside:
        others = [shape.beside.tensors() for _ in sets]
        for name in OURS.keys() & IMPLEMENTATIONS.keys():
            contenders[f"beside {name}"] = timers(IMPLEMENTATIONS[name], shape.beside, others)
    contenders = {name: found for name, found in contenders.items() if found}
    results = {name: Result({phase: [] for phase in PHASES}) for name in contenders}
    # The first rounds warm the GPU up.
    for number in range(-2, rounds):
        for phase in PHASES:
            for name, found in contenders.items():
                seconds = found[phase].run()
                if number >= 0:
                    results[name].times[phase].append(seconds)
    return results


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


def table(heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
