"""Training at long windows: attention as it reads beside dense landmark attention and PyTorch's, and whole steps.

    python benchmarks/long_training.py --output benchmarks/results/long-training-h200.md
    python benchmarks/long_training.py --rows 64k --tune
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
import contextlib
import functools
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from landmark_cli.attention import functional
from landmark_cli.attention.kernels.common.choices import Choices
from landmark_cli.attention.kernels.common.configuration import Configuration
from landmark_cli.attention.kernels.reading import window as kernels
from landmark_cli.attention.retrieval_window import retrieve_window, select_in_window
from landmark_cli.attention.rotary import default_inverse_frequencies
from landmark_cli.attention.window import ReadingWindow, WindowSettings
from landmark_cli.attention.window_operators import retrieve
from tests.closeness import whole_error

DEVICE, DTYPE = "cuda", torch.bfloat16
BLOCK, CHUNK, TOP_K = 64, 2048, 8
CHECK_TOKENS = 8192


@dataclass(frozen=True)
class Shape:
    """heads on key_heads of dim numbers."""

    heads: int
    key_heads: int
    dim: int


LARGE, SMOLLM2 = Shape(32, 8, 128), Shape(9, 3, 64)
TOKENS = {"32k": 32 << 10, "64k": 64 << 10, "128k": 128 << 10}
# Of whole steps whose speeds are compared.
LENGTHS = 32 << 10, 1 << 20
TARGETS = {"32k": (3.0, 1.6), "64k": (5.0, 2.7), "128k": (8.0, 4.2)}
OURS, DENSE, FA2, CUDNN = "as it reads", "dense landmark", "FA2", "cuDNN"
# The most important first: device time may end.
ROWS = ("check", "64k", "128k", "32k", "1m", "smollm2-step", "llama-step", "1m-step")

# The stages of attention as it reads, as kernels/reading/window.py has them.
STAGES = ("landmark_keys_of", "select", "route", "attend", "merge", "own_gradient", "key_gradients", "sum_queries")

CANDIDATES = {
    "select": [Configuration(64, 64, 4, 2), Configuration(64, 64, 4, 1, 128), Configuration(64, 64, 8, 2),
               Configuration(128, 64, 8, 2), Configuration(128, 64, 8, 1, 128), Configuration(64, 64, 4, 3, 168)],
    "attend": [Configuration(64, 64, 4, 1), Configuration(64, 64, 4, 1, 168), Configuration(64, 64, 8, 1),
               Configuration(128, 64, 8, 1), Configuration(128, 64, 8, 1, 128)],
    "merge": [Configuration(8, 64, 4), Configuration(16, 64, 4), Configuration(64, 64, 8), Configuration(32, 64, 8)],
    "own_gradient": [Configuration(8, 64, 4), Configuration(16, 64, 4), Configuration(64, 64, 8)],
    "pair_gradient": [Configuration(64, 64, 8, 1), Configuration(64, 64, 8, 3), Configuration(128, 64, 8, 1),
                      Configuration(128, 64, 8, 2), Configuration(64, 64, 4, 1), Configuration(64, 64, 4, 2)],
    "sum_queries": [Configuration(8, 64, 4), Configuration(16, 64, 4), Configuration(64, 64, 8)],
}  # fmt: skip
STAGE_OF = {"pair_gradient": "key_gradients"}


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


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.landmark_attention(q, k, v, block_size=BLOCK)


def plain(backend: SDPBackend, repeat: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if repeat:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not repeat)

    return attend


def forward_and_backward(attention: Callable, given: list[Tensor]) -> None:
    torch.autograd.grad(attention(*given[:3]), given[:3], given[3])


def milliseconds(work: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def in_turn(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each, round after round; the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, call in work.items():
            taken = milliseconds(call)
            if number:
                times[name].append(taken)
    return times


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
    times = in_turn(contenders, rounds)
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
        taken = statistics.median(in_turn({title: work}, rounds)[title])
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


def training_step(shape: str, layers: int | None) -> Callable[..., Callable[[], None]]:
    """of(tokens, reads, keep_retrieved) -> a whole training step of one window, or, if it does not read, of windows of
    2048 tokens: forward, backward with checkpointed layers, AdamW."""
    from benchmarks.long_context_steps import Run, llama
    from landmark_cli.training.linear_cross_entropy import linear_cross_entropy
    from landmark_cli.training.setup import checkpoint_activations

    model = llama(shape, Run(layers=layers), top_k_blocks=TOP_K).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def of(tokens: int, reads: bool = True, keep_retrieved: bool = True) -> Callable[[], None]:
        ids = torch.randint(model.config.vocab_size - 1, (1, tokens), device=DEVICE)
        ids[:, BLOCK - 1 :: BLOCK] = model.config.landmark_token_id
        inputs = {"input_ids": ids if reads else ids.view(-1, 2048)}
        if reads:
            window = window_of(tokens, model.config.hidden_size // model.config.num_attention_heads)
            inputs |= {"position_ids": window.position_ids, "landmark_window": window}

        def step() -> None:
            checkpoint_activations(model, keep_retrieved and reads)
            hidden = model.model(**inputs, use_cache=False).last_hidden_state
            targets = inputs["input_ids"].roll(-1, dims=1)
            (linear_cross_entropy(hidden, model.lm_head.weight, targets) / tokens).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return of


def step_row(name: str, rounds: int) -> str:
    """Whole training steps of one window and of as many tokens dense."""
    shape, layers, tokens = {"smollm2-step": ("smollm2", None, 128 << 10), "llama-step": ("8b", 4, 64 << 10)}[name]
    of = training_step(shape, layers)
    reading = of(tokens)
    work = {
        f"as it reads, {tokens >> 10}k": reading,
        f"as it reads, {tokens >> 10}k, blocks chosen and read twice": of(tokens, keep_retrieved=False),
        "dense, 2k": of(tokens, reads=False),
    }
    memory = {title: gibibytes(call) for title, call in work.items()}
    times = in_turn(work, rounds)
    lines = [f"## {name}: whole steps of {tokens} tokens, layers checkpointed", ""]
    for title, found in times.items():
        taken = statistics.median(found)
        lines.append(f"{title}: {taken:.0f} ms, {tokens / taken * 1e3:.0f} tokens/s, {memory[title]:.1f} GiB")
    ours, _, theirs = times.values()
    lines.append(f"{statistics.median(b / a for a, b in zip(ours, theirs, strict=True)):.2f} of dense 2k's tokens/s")
    parts = ", ".join(f"{part} {taken:.1f}" for part, taken in stage_times(reading, 1).items())
    lines.append(f"Milliseconds by part, all layers: {parts}")
    return "\n".join(lines)


def million_step_row(
    rounds: int, begun: Callable[[], float], limit: float = math.inf, compiled: Callable[[], None] = lambda: None
) -> Iterator[str]:
    """Whole training steps of one window of a million tokens, SmolLM2's shape, beside those of 32k.

    Yields lines, each as soon as it is measured, since device time may end. The first step at a length allocates, and
    is said apart.

    begun: seconds since the script began; what would take longer than `limit` seconds of these is left out, and said.
    compiled: waits until the kernels are.
    """
    yield "## 1m-step: whole steps of one window, SmolLM2's shape, layers checkpointed, not compiled\n"
    of = training_step("smollm2", None)
    yield f"the model is there after {begun():.0f} s"
    compiled()
    yield f"kernels are compiled after {begun():.0f} s"
    short, long = LENGTHS
    speeds: dict[int, list[float]] = {short: [], long: []}
    taken = 0.0
    for tokens, keep_retrieved in ((short, True), (long, True), (long, False)):
        said = named(tokens) + ("" if keep_retrieved else ", blocks chosen and read twice")
        # A first step and another, which read twice: a third more than those before them, with some room.
        if not keep_retrieved and begun() + 3 * taken / 1e3 > limit:
            yield f"{said}: left out, there is no time for it"
            continue
        try:
            step = of(tokens, keep_retrieved=keep_retrieved)
            first: list[float] = []
            memory = gibibytes(lambda step=step, first=first: first.append(milliseconds(step)))
            yield f"{said}: first step {first[0]:.0f} ms, {memory:.1f} GiB ({begun():.0f} s)"
            taken = statistics.median(milliseconds(step) for _ in range(rounds if tokens == short else 1))
        except torch.cuda.OutOfMemoryError:
            yield f"{said}: out of memory"
            continue
        finally:
            step = None
            torch.cuda.empty_cache()
        speeds[tokens].append(tokens / taken * 1e3)
        yield f"{said}: {taken:.0f} ms, {speeds[tokens][-1]:.0f} tokens/s, {memory:.1f} GiB ({begun():.0f} s)"
        if tokens == long and speeds[short]:
            ratio = max(speeds[long]) / speeds[short][0]
            yield f"{named(long)} at {ratio:.2f} of the speed at {named(short)} (target 0.6)"


def named(tokens: int) -> str:
    return f"{tokens >> 20}M" if tokens >= 1 << 20 else f"{tokens >> 10}k"


def tune(tokens: int, rounds: int = 3) -> str:
    """Each kernel's time in each of its candidates, the others as usual."""
    given = tensors(LARGE, tokens)
    work = functools.partial(forward_and_backward, as_it_reads(tokens, LARGE.dim), given)
    usual, lines = kernels.window_choices, [f"## Configurations at {tokens} tokens, ms of the kernel's stage", ""]
    work()
    for kernel, candidates in CANDIDATES.items():
        stage, found = STAGE_OF.get(kernel, kernel), []
        for choice in [None, *candidates]:
            kernels.window_choices = functools.partial(chosen, usual, kernel, choice)
            try:
                work()
                found.append((stage_times(work, rounds, (stage,))[stage], choice or "as it is"))
            except Exception as error:
                lines.append(f"{kernel} {choice}: {type(error).__name__}")
            finally:
                kernels.window_choices = usual
        lines += [f"{kernel} {taken:.2f}: {choice}" for taken, choice in sorted(found, key=lambda pair: pair[0])]
        print("\n".join(lines[-len(found) :]), flush=True)
    for size in (512, 1024, 4096):
        before, kernels.ITEM = kernels.ITEM, size
        work()
        lines.append(f"items of {size} pairs: {stage_times(work, rounds, ('key_gradients',))['key_gradients']:.2f}")
        print(lines[-1], flush=True)
        kernels.ITEM = before
    return "\n".join(lines)


def chosen(usual: Callable, kernel: str, choice: Configuration | None, name: str, *given) -> Choices:
    return Choices([choice]) if choice is not None and name == kernel else usual(name, *given)


def compile_first(rows: list[str], tuned: bool) -> Callable[[], None]:
    """Begin to compile what the rows need, each process some of it. Returns what waits for them."""
    jobs = [("ours", LARGE), ("own", LARGE), ("dense", LARGE)] if {*rows} & {*TOKENS, "check", "llama-step"} else []
    jobs += [("ours", SMOLLM2), ("own", SMOLLM2)] if {*rows} & {"1m", "1m-step", "smollm2-step", "check"} else []
    jobs += [("loss", SMOLLM2)] if {*rows} & {"1m-step", "smollm2-step", "llama-step"} else []
    wanted = [["--compile", kind, str(shape.dim)] for kind, shape in jobs]
    if tuned:
        pairs = [(kernel, number) for kernel, found in CANDIDATES.items() for number in range(len(found))]
        wanted += [["--compile", kernel, str(LARGE.dim), str(number)] for kernel, number in pairs]
    command = [sys.executable, __file__]
    processes = [subprocess.Popen([*command, *job], stderr=subprocess.DEVNULL) for job in wanted]

    def wait() -> None:
        for process in processes:
            process.wait()

    return wait


def compile_one(kind: str, dim: str, number: str = "") -> None:
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
        if number:
            choice = CANDIDATES[kind][int(number)]
            kernels.window_choices = functools.partial(chosen, kernels.window_choices, kind, choice)
        forward_and_backward(as_it_reads(tokens, shape.dim), given)


def loss_once() -> None:
    """The kernel of a step's loss, of as many logits as SmolLM2's vocabulary has."""
    from benchmarks.long_context_steps import SHAPES
    from landmark_cli.training.linear_cross_entropy import linear_cross_entropy

    weight = torch.zeros(SHAPES["smollm2"]["vocab_size"], 64, dtype=DTYPE, device=DEVICE, requires_grad=True)
    hidden = torch.zeros(1, 16, 64, dtype=DTYPE, device=DEVICE, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.zeros(1, 16, dtype=torch.long, device=DEVICE)).backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--quick", action="store_true", help="one round of each")
    parser.add_argument("--tune", action="store_true", help="try other configurations of the kernels at 64k, first")
    parser.add_argument("--output", type=Path, help="write the rows there, in Markdown")
    parser.add_argument("--seconds", type=float, default=math.inf, help="leave out of 1m-step what would take longer")
    parser.add_argument("--compile", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        compile_one(*options.compile)
        return
    start, rounds = time.perf_counter(), 1 if options.quick else 5
    compiled = compile_first(options.rows, options.tune)

    def begun() -> float:
        return time.perf_counter() - start

    work: dict[str, Callable[[], str | Iterator[str]]] = {}
    if options.tune:
        work["tune"] = lambda: tune(TOKENS["64k"])
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
