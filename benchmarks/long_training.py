"""Training at long windows: attention as it reads beside dense landmark attention and PyTorch's, and whole steps.

    python benchmarks/long_training.py --output benchmarks/results/long-training-h200.md
    python benchmarks/long_training.py --rows check 32k --quick

Attention is forward and backward, bf16, 32 query heads on 8 key heads, head dim 128, blocks of 64, chunks of 2048, k 8.
Everything of a row runs in turn, round after round; times are medians of CUDA events. What runs out of memory is left
out and said. PyTorch's attention gets its keys by enable_gqa where a backend takes it, else repeated heads, in which
case its name says so. Memory is the peak of a forward and backward pass beside the inputs and their gradients' inputs.
Rows are printed as soon as they are there, and 1m-step line by line (--seconds: what would take longer is left out of
it). Kernels are compiled first, by processes of their own.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.long_training_steps import loss_once, million_step_row, step_row
from benchmarks.reading_windows import (
    BLOCK,
    CHUNK,
    DEVICE,
    LARGE,
    SMOLLM2,
    Shape,
    as_it_reads,
    forward_and_backward,
    gibibytes,
    milliseconds,
    milliseconds_in_turn,
    stage_times,
    tensors,
    window_of,
)
from landmark_cli.attention import functional
from landmark_cli.attention.kernels.reading import window as kernels
from landmark_cli.attention.retrieval_window import retrieve_window, select_in_window
from landmark_cli.attention.window import ReadingWindow
from landmark_cli.attention.window_operators import retrieve
from tests.closeness import whole_error

CHECK_TOKENS = 8192
TOKENS = {"32k": 32 << 10, "64k": 64 << 10, "128k": 128 << 10}
TARGETS = {"32k": (3.0, 1.6), "64k": (5.0, 2.7), "128k": (8.0, 4.2)}
OURS, DENSE, FA2, CUDNN = "as it reads", "dense landmark", "FA2", "cuDNN"
# The most important first: device time may end.
ROWS = ("check", "64k", "128k", "32k", "1m", "smollm2-step", "llama-step", "1m-step")


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.landmark_attention(q, k, v, block_size=BLOCK)


def plain(backend: SDPBackend, repeat: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if repeat:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not repeat)

    return attend


def own_times(given: list[Tensor], rounds: int) -> tuple[float, float]:
    """Milliseconds of the chunks' own part, forward and backward: a batch of chunks."""
    folded = [x.detach().transpose(1, 2).reshape(-1, CHUNK, x.shape[1], x.shape[3]).transpose(1, 2) for x in given]
    *leaves, dout = folded
    leaves = [x.requires_grad_() for x in leaves]
    forward, backward = [], []
    attend = functools.partial(functional.landmark_attention, *leaves, block_size=BLOCK, return_lse=True)
    outputs = attend()
    gradients = [dout, torch.zeros_like(outputs[1])]
    go_back = functools.partial(torch.autograd.grad, outputs, leaves, gradients, retain_graph=True)
    for _ in range(rounds + 1):
        forward.append(milliseconds(attend))
        backward.append(milliseconds(go_back))
    return statistics.median(forward[1:]), statistics.median(backward[1:])


def attention_row(name: str, rounds: int) -> str:
    tokens = TOKENS[name]
    given = tensors(LARGE, tokens)
    said, contenders, memory = [], {}, {}
    for title, candidates in {
        OURS: {"": as_it_reads(tokens, LARGE.dim)},
        DENSE: {"": dense},
        **{rival: {kind: plain(backend, bool(kind)) for kind in ("", ", heads repeated")}
           for rival, backend in ((FA2, SDPBackend.FLASH_ATTENTION), (CUDNN, SDPBackend.CUDNN_ATTENTION))},
    }.items():  # fmt: skip
        for kind, attention in candidates.items():
            work = functools.partial(forward_and_backward, attention, given)
            try:
                memory[title + kind] = gibibytes(work)
                contenders[title + kind] = work
                break
            except (RuntimeError, torch.OutOfMemoryError) as error:
                said.append(f"{title}{kind} left out: {str(error).splitlines()[0][:100]}")
                torch.cuda.empty_cache()
    times = milliseconds_in_turn(contenders, rounds)
    lines = [
        f"## {name} tokens, attention forward and backward",
        "",
        "| | ms | as it reads is | GiB |",
        "|---|---|---|---|",
    ]
    for title, found in times.items():
        ratio = statistics.median(theirs / ours for ours, theirs in zip(times[OURS], found, strict=True))
        target = {FA2: TARGETS[name][0], CUDNN: TARGETS[name][1]}.get(title.partition(",")[0])
        wanted = f" (target {target})" if target else ""
        lines.append(f"| {title} | {statistics.median(found):.1f} | {ratio:.2f} x{wanted} | {memory[title]:.2f} |")
    parts = stage_times(contenders[OURS], 3)
    own = own_times(given, 3)
    parts = {"own forward": own[0], **parts, "own backward": own[1]}
    rest = statistics.median(times[OURS]) - sum(parts.values())
    lines += [
        "",
        "Milliseconds by part: "
        + ", ".join(f"{part} {taken:.2f}" for part, taken in parts.items())
        + f", rest {rest:.2f}",
    ]
    return "\n".join([*lines, *said])


def million_row(rounds: int) -> str:
    speeds, lines = {}, ["## SmolLM2's attention, 9 heads on 3 of 64: tokens a second, forward and backward", ""]
    for title, tokens in (("32k", 32 << 10), ("1M", 1 << 20)):
        given = tensors(SMOLLM2, tokens)
        work = functools.partial(forward_and_backward, as_it_reads(tokens, SMOLLM2.dim), given)
        memory = gibibytes(work)
        taken = statistics.median(milliseconds_in_turn({title: work}, rounds)[title])
        speeds[title] = tokens / taken * 1e3
        parts = ", ".join(f"{part} {ms:.2f}" for part, ms in stage_times(work, 1).items())
        lines.append(f"{title}: {taken:.1f} ms, {speeds[title]:.0f} tokens/s, {memory:.2f} GiB; {parts}")
        del given, work
    lines.append(f"1M at {speeds['1M'] / speeds['32k']:.2f} of the speed at 32k (target 0.6 of whole steps)")
    return "\n".join(lines)


def kernels_choice(q: Tensor, k: Tensor, window: ReadingWindow) -> Tensor:
    """The blocks that the kernels choose, as `select_in_window` gives them."""
    settings, scale = window.settings, q.shape[-1] ** -0.5
    places = window.chunks, window.blocks, window.chunk_of, window.cos, window.sin, None, None
    numbers = settings.chunk, settings.block_size, settings.top_k, window.most_earlier, 0.0, False, scale
    q, k = (kernels.operand(x) for x in (q, k))
    call = kernels.WindowCall(q, k, k, kernels.Window(*places, *numbers))
    ages = kernels.select(call, kernels.landmark_keys_of(call), 0, call.key_heads)
    return ages.transpose(0, 1).flatten(1, 2).sort(dim=-1, descending=True).values


def check_row(rounds: int) -> str:
    """Kernels against the definition in float32, which reads the blocks that the kernels chose, and a hundred repeats
    against the first, bit by bit. Beside that, how many choices differ from those that float32 makes."""
    lines = ["## Check: norm of the difference to the float32 definition over the norm, bf16, of the same choices", ""]
    for shape in (Shape(4, 1, 128), Shape(3, 1, 64)):
        given = tensors(shape, CHECK_TOKENS)
        window = window_of(CHECK_TOKENS, shape.dim)
        dlse = torch.randn(1, shape.heads, CHECK_TOKENS, device=DEVICE)

        def outputs(function: Callable, leaves: list[Tensor], dout: Tensor, window=window, dlse=dlse) -> list[Tensor]:
            out, lse = function(*leaves, window, None, 1)
            lse = torch.where(lse == -torch.inf, 0.0, lse)
            return [out, lse, *torch.autograd.grad([out, lse], leaves, [dout, dlse])]

        fused = functools.partial(retrieve, backend="triton")
        found = outputs(fused, given[:3], given[3])
        exact = [x.detach().float().requires_grad_() for x in given[:3]]
        with torch.no_grad():
            chosen = kernels_choice(*given[:2], window)
            best = select_in_window(*exact[:2], window, None, 1)
        expected = outputs(functools.partial(retrieve_window, ages=chosen), exact, given[3].float())
        errors = ", ".join(
            f"{name} {whole_error(a, b):.2e}"
            for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True)
        )
        known = (chosen.unsqueeze(-1) == best.unsqueeze(-2)).any(-1)
        differ = (~known)[chosen > 0].float().mean().item()
        same = all(
            torch.equal(a, b)
            for _ in range(100)
            for a, b in zip(found, outputs(fused, given[:3], given[3]), strict=True)
        )
        lines.append(
            f"D {shape.dim}: {errors}; {differ:.2%} of choices are others than in float32; 100 repeats "
            f"{'are the same' if same else 'DIFFER'}"
        )
    return "\n".join(lines)


def compile_first(rows: list[str]) -> Callable[[], None]:
    """Begin to compile what the rows need, each process some of it. Returns what waits for them."""
    jobs = [("ours", LARGE), ("own", LARGE), ("dense", LARGE)] if {*rows} & {*TOKENS, "check", "llama-step"} else []
    jobs += [("ours", SMOLLM2), ("own", SMOLLM2)] if {*rows} & {"1m", "1m-step", "smollm2-step", "check"} else []
    jobs += [("loss", SMOLLM2)] if {*rows} & {"1m-step", "smollm2-step", "llama-step"} else []
    wanted = [["--compile", kind, str(shape.dim)] for kind, shape in jobs]
    command = [sys.executable, __file__]
    processes = [subprocess.Popen([*command, *job], stderr=subprocess.DEVNULL) for job in wanted]

    def wait() -> None:
        for process in processes:
            process.wait()

    return wait


def compile_one(kind: str, dim: str) -> None:
    """What a process of compile_first does: run it once, small."""
    shape = LARGE if int(dim) == LARGE.dim else SMOLLM2
    if kind == "loss":
        loss_once()
        return
    # A window has to be long for the kernels of dense landmark attention that serve long ones.
    tokens = 2 * CHUNK
    given = tensors(shape, tokens)
    if kind == "own":
        own_times(given, 0)
    elif kind == "dense":
        forward_and_backward(dense, given)
    else:
        forward_and_backward(as_it_reads(tokens, shape.dim), given)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--quick", action="store_true", help="one round of each")
    parser.add_argument("--output", type=Path, help="write the rows there, in Markdown")
    parser.add_argument("--seconds", type=float, default=math.inf, help="leave out of 1m-step what would take longer")
    parser.add_argument("--compile", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        compile_one(*options.compile)
        return
    start, rounds = time.perf_counter(), 1 if options.quick else 5
    compiled = compile_first(options.rows)

    def begun() -> float:
        return time.perf_counter() - start

    work: dict[str, Callable[[], str | Iterator[str]]] = {}
    for row in options.rows:
        work[row] = {
            "check": check_row, "1m": million_row, "smollm2-step": functools.partial(step_row, row),
            "llama-step": functools.partial(step_row, row),
            "1m-step": functools.partial(million_step_row, begun=begun, limit=options.seconds, compiled=compiled),
        }.get(row, functools.partial(attention_row, row))  # fmt: skip
        work[row] = functools.partial(work[row], rounds)
    heading = f"# Training at long windows, bf16: {torch.cuda.get_device_name()}\n\n"
    heading += f"torch {torch.__version__}, triton {triton.__version__}; `benchmarks/long_training.py`"
    print(heading, flush=True)
    report = [heading]
    for name, row in work.items():
        if name != "1m-step":
            compiled()
        print(f"\n({begun():.0f} s)\n", flush=True)
        report.append("")
        for said in saying(name, row):
            print(said, flush=True)
            report[-1] = "\n".join([report[-1], said]).strip("\n")
            if options.output:
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text("\n\n".join(report) + "\n", encoding="utf-8")
        torch.cuda.empty_cache()
    print(f"\n({begun():.0f} s)", flush=True)


def saying(name: str, row: Callable[[], str | Iterator[str]]) -> Iterator[str]:
    """What a row says, piece by piece if it comes so; one that fails loses neither what it said nor another row."""
    try:
        found = row()
        yield from [found] if isinstance(found, str) else found
    except Exception as error:
        yield f"## {name}: {type(error).__name__}: {str(error)[:300]}"


if __name__ == "__main__":
    main()
