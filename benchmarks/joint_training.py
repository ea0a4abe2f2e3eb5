"""What training with the joint softmax takes beside a teacher: attention by each backend, and the least a step takes.

    python benchmarks/joint_training.py
    python benchmarks/joint_training.py --quick
    python benchmarks/joint_training.py --output benchmarks/results/joint-training-MACHINE.md

SmolLM2-135M, 4 windows of 8192 stream tokens, blocks of 64, bfloat16, random weights. All parts are timed in turns,
round after round, by CUDA events, each behind a pause in which the host gets ahead; medians.

Attention of one layer, forward and backward: "triton" and "sdpa" are this project's backends, on the stream. "cuDNN"
and "FA2" are plain causal attention of as many text tokens as the stream has, which is the bound of what "sdpa" can
reach. What it does beside that is timed apart: copies of the text, and the kernels of landmarks' own queries. How far
the two backends' results are apart is said, as a share of their norms. The teacher reads the same windows, one layer
forward as PyTorch chooses unasked, and by each library.

The least that a micro-batch takes, where nothing but these ran:

    layers x (attention, forward and backward + the student's products, forward and backward
              + the teacher's attention, forward + its products, forward)
    + the head's products, of the student forward and backward, of the teacher forward

Products: a layer's seven linear layers, 6 operations a weight and token for the student and 2 for the teacher; the
head, in pieces of rows, the same. Tokens a second are stream tokens of the micro-batch divided by that time. Norms,
rotations, activations, softmaxes over the vocabulary, the gate's loss and the optimizer come on top. Without a GPU all
runs on toy sizes, and says nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

from landmark_cli.attention import sdpa
from landmark_cli.attention.functional import landmark_attention

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
# Clock cycles of the GPU in which the host puts a part's launches in line: some milliseconds.
PAUSE = 5_000_000
FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Sizes:
    """Of the model, the micro-batch (rows x tokens of the stream), and the pieces that the head's products come in."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    dim: int
    vocabulary: int
    rows: int
    tokens: int
    block_size: int
    piece: int

    @property
    def text(self) -> int:
        return self.tokens - self.tokens // self.block_size


SMOLLM2 = Sizes(30, 576, 1536, 9, 3, 64, 49152, 4, 8192, 64, 8192)
TOY = Sizes(2, 48, 96, 3, 1, 16, 500, 2, 300, 16, 100)
# A part of a step: what it takes of the clock is marked by the names that it gives, each when that much was launched.
Part = Callable[[], Iterator[str]]


def attention_part(attend: Callable[..., Tensor], leaves: list[Tensor], dout: Tensor) -> Iterator[str]:
    out = attend(*leaves)
    yield FORWARD
    torch.autograd.grad(out, leaves, dout)
    yield BACKWARD


def forward_part(work: Callable[[], Any]) -> Iterator[str]:
    with torch.no_grad():
        work()
    yield FORWARD


def joint(q: Tensor, k: Tensor, v: Tensor, *, block_size: int, backend: str) -> Tensor:
    return landmark_attention(q, k, v, block_size, joint=True, backend=backend)


def plain(q: Tensor, k: Tensor, v: Tensor, *, backend: SDPBackend | None) -> Tensor:
    """backend: None for what PyTorch chooses."""
    with nullcontext() if backend is None else sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def heads_of(sizes: Sizes, tokens: int, count: int) -> list[Tensor]:
    """So many of: queries (B, H, T, D), keys, values (B, G, T, D), and a gradient like the queries."""
    heads = sizes.heads, sizes.key_heads, sizes.key_heads, sizes.heads
    return [
        torch.randn(sizes.rows, tokens, n, sizes.dim, dtype=DTYPE, device=DEVICE).transpose(1, 2) for n in heads[:count]
    ]


def products_part(weights: list[Tensor], inputs: list[Tensor], gradients: list[Tensor]) -> Iterator[str]:
    """Products of linear layers, with which nothing else happens."""
    outs = [linear(x, weight) for x, weight in zip(inputs, weights, strict=True)]
    yield FORWARD
    torch.autograd.grad(outs, [*weights, *inputs], gradients)
    yield BACKWARD


def layer_products(sizes: Sizes) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(weights, inputs, gradients of outputs) of one layer's seven linear layers."""
    hidden, wide, keys = sizes.hidden, sizes.intermediate, sizes.key_heads * sizes.dim
    queries = sizes.heads * sizes.dim
    shapes = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
    return products(shapes + [(wide, hidden), (wide, hidden), (hidden, wide)], sizes.rows * sizes.tokens)


def products(shapes: list[tuple[int, int]], rows: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=DTYPE, device=DEVICE)

    weights = [nn.Parameter(random(*shape) * shape[1] ** -0.5) for shape in shapes]
    inputs = [random(rows, of).requires_grad_() for _, of in shapes]
    return weights, inputs, [random(rows, to) for to, _ in shapes]


def copies_part(leaves: list[Tensor], dout: Tensor, block_size: int) -> Iterator[str]:
    """What the text is copied for, out of the stream and back, where a library attends to it."""
    q, k, v = leaves
    text = [sdpa.text_of(x, block_size) for x in (q, k, v)]
    out = torch.empty_like(q)
    sdpa.put_text(out, block_size, text[0])
    yield FORWARD
    for x in (q, k, v, out, dout):
        sdpa.text_of(x, block_size)
    for x, of_text in zip((q, k, v), text, strict=True):
        sdpa.put_text(torch.empty_like(x), block_size, of_text)
    yield BACKWARD


def landmarks_part(leaves: list[Tensor], dout: Tensor, block_size: int) -> Iterator[str]:
    """Attention for the landmarks' own queries."""
    q, dout = (sdpa.landmarks_of(x, block_size) for x in (leaves[0], dout))
    k, v = (x[:, :, : q.shape[2] * (block_size - 1)] for x in leaves[1:])
    given = block_size - 1, q.shape[-1] ** -0.5
    kernels = sdpa._landmarks(q)
    out, lse = kernels.forward(q, k, v, *given)
    yield FORWARD
    kernels.backward(dout, q, k, v, out, lse, *given)
    yield BACKWARD


def parts_of(sizes: Sizes) -> dict[str, Part]:
    """Everything that is timed, by name."""
    *stream, stream_dout = heads_of(sizes, sizes.tokens, 4)
    *text, text_dout = heads_of(sizes, sizes.text, 4)
    leaves = [x.clone().requires_grad_() for x in stream]
    text_leaves = [x.clone().requires_grad_() for x in text]
    block = {"block_size": sizes.block_size}
    backends = ("triton", "sdpa") if GPU else ("eager", "sdpa")
    found: dict[str, Part] = {
        name: partial(attention_part, partial(joint, **block, backend=name), leaves, stream_dout) for name in backends
    }
    libraries = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FA2": SDPBackend.FLASH_ATTENTION} if GPU else {"plain": None}
    for name, backend in libraries.items():
        found[name] = partial(attention_part, partial(plain, backend=backend), text_leaves, text_dout)
    found["copies of sdpa"] = partial(copies_part, stream, stream_dout, sizes.block_size)
    found["landmarks of sdpa"] = partial(landmarks_part, [stream[0], *text[1:]], stream_dout, sizes.block_size)
    for name, backend in {"unasked": None, **libraries}.items():
        found[f"teacher, {name}"] = partial(forward_part, partial(plain, *stream, backend=backend))
    weights, inputs, gradients = layer_products(sizes)
    found["products"] = partial(products_part, weights, inputs, gradients)
    found["teacher's products"] = partial(
        forward_part, lambda: [linear(x, weight) for x, weight in zip(inputs, weights, strict=True)]
    )
    head, states, dlogits = products([(sizes.vocabulary, sizes.hidden)], sizes.piece)
    found["head, a piece"] = partial(products_part, head, states, dlogits)
    return found


def clocked(part: Part) -> dict[str, float]:
    """Milliseconds of a part, by the names that it gives."""
    if not GPU:
        times, before = {}, time.perf_counter()
        for name in part():
            times[name], before = (time.perf_counter() - before) * 1e3, time.perf_counter()
        return times
    torch.cuda._sleep(PAUSE)
    events = [torch.cuda.Event(enable_timing=True)]
    names = []
    events[0].record()
    for name in part():
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()
        names.append(name)
    torch.cuda.synchronize()
    return {name: a.elapsed_time(b) for name, a, b in zip(names, events, events[1:], strict=False)}


def in_turns(parts: dict[str, Part], rounds: int, warm: int) -> dict[str, dict[str, float]]:
    """Medians of milliseconds, of each part's names."""
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in parts}
    for number in range(warm + rounds):
        for name, part in parts.items():
            for phase, milliseconds in clocked(part).items():
                if number >= warm:
                    taken[name].setdefault(phase, []).append(milliseconds)
    return {
        name: {phase: statistics.median(all_of) for phase, all_of in phases.items()} for name, phases in taken.items()
    }


def apart(sizes: Sizes, ours: str) -> str:
    """How far "sdpa" is from another backend, out, dq, dk and dv, as shares of their norms."""
    *leaves, dout = heads_of(sizes, sizes.tokens, 4)
    leaves = [x.requires_grad_() for x in leaves]
    found = []
    for backend in (ours, "sdpa"):
        out = joint(*leaves, block_size=sizes.block_size, backend=backend)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, dout)])
    names = "out", "dq", "dk", "dv"
    errors = [((a.float() - b.float()).norm() / a.float().norm()).item() for a, b in zip(*found, strict=True)]
    return ", ".join(f"{name} {error:.1e}" for name, error in zip(names, errors, strict=True))


def report(sizes: Sizes, rounds: int, warm: int) -> str:
    started = time.perf_counter()
    difference = apart(sizes, "triton" if GPU else "eager")
    times = in_turns(parts_of(sizes), rounds, warm)
    total = {name: sum(phases.values()) for name, phases in times.items()}
    device = torch.cuda.get_device_name() if GPU else "a CPU, toy sizes"
    lines = [f"# Training with the joint softmax beside a teacher: {device}", ""]
    lines += [f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}; `benchmarks/joint_training.py`.", ""]
    lines += ["| part | forward ms | backward ms | both ms |", "| --- | --- | --- | --- |"]
    for name, phases in times.items():
        backward = f"{phases[BACKWARD]:.3f}" if BACKWARD in phases else ""
        lines.append(f"| {name} | {phases[FORWARD]:.3f} | {backward} | {total[name]:.3f} |")
    lines += ["", f"sdpa against {'triton' if GPU else 'eager'}: {difference}.", ""]
    pieces = sizes.rows * sizes.tokens / sizes.piece
    head = pieces * (total["head, a piece"] + times["head, a piece"][FORWARD])
    teacher, of_products = total["teacher, unasked"], total["products"] + total["teacher's products"]
    lines += [
        f"A micro-batch's head {head:.1f} ms, products of all layers {sizes.layers * of_products:.1f} ms, "
        f"the teacher's attention {sizes.layers * teacher:.1f} ms.",
        "",
    ]
    lines += ["| attention | all layers ms | least of a micro-batch ms | tokens/s if nothing but these ran |"]
    lines += ["| --- | --- | --- | --- |"]
    for name in times:
        if name in ("triton", "eager", "sdpa", "cuDNN", "FA2", "plain"):
            least = sizes.layers * (total[name] + of_products + teacher) + head
            speed = sizes.rows * sizes.tokens / least * 1e3
            lines.append(f"| {name} | {sizes.layers * total[name]:.1f} | {least:.1f} | {speed:,.0f} |")
    return "\n".join([*lines, "", f"{time.perf_counter() - started:.0f} s in all."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--output", type=Path, help="also write what is printed to a file")
    options = parser.parse_args()
    rounds, warm = (5, 2) if options.quick or not GPU else (30, 4)
    said = report(SMOLLM2 if GPU else TOY, rounds, warm)
    print(said)
    if options.output:
        options.output.write_text(f"{said}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
