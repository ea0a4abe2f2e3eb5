"""Reading and generating over long inputs: the fused block cache beside full attention and the eager definition.

    python benchmarks/long_context.py --output benchmarks/results/long_context-MACHINE.md
    python benchmarks/long_context.py --rows prefill-8b --layers 8

Models have random weights in bfloat16. Where a context is longer than is worth reading for a measurement, the cache is
filled with random keys and values, which the kernels cannot tell from read ones. A decoding step's time is that of its
CUDA graph, replayed; "loop" is reader.step with a greedy choice of the token on the host, all told.

full attention: the same shape with SDPA. Decoding: the library's DynamicCache, and a best case of the same step with a
preallocated cache, in a CUDA graph. eager: the definition in plain PyTorch, over the same cache.

--warm compiles all kernels first, every row in a process of its own with one layer: that takes seconds where compiling
one after the other takes minutes.
"""

import argparse
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

# Rows differ in what they allocate by tens of GiB; set before torch asks for memory.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import transformers
import triton

# The script's own folder is on the path.
from long_context_host import Row, first_steps, offload_decode, offload_read, unlike_rows
from long_context_steps import (
    DEVICE,
    Run,
    copy_seconds,
    eager_attention,
    eager_step,
    fill,
    fresh,
    full_step,
    gibibytes,
    gpt,
    held_bytes,
    llama,
    other_step,
    seconds,
    step_times,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

import landmark_cli
from landmark_cli.evaluation.score import score
from landmark_cli.inference.block_reader import BlockReader


def evaluation(run: Run) -> Iterator[Row]:
    """The paper's evaluation: 4096 tokens, chunk 250, k = 4, batch 16, the 12 x 1024 model, cross-entropy included."""
    model = gpt(run)
    rows = torch.randint(0, 50000, (16, 4096), generator=torch.Generator().manual_seed(0))
    with fresh():
        reader = BlockReader(model, top_k_blocks=4, chunk=250, batch=16)
        reader.expect(4096)

        def read() -> None:
            reader.reset()
            for chunk in reader.read(list(rows), transient=True):
                score(chunk.logits, rows[:, : chunk.logits.shape[1]])

        for _ in range(run.times(3)):
            read()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(run.times(4)):
            read()
        torch.cuda.synchronize()
        taken = (time.perf_counter() - started) / run.times(4)
        memory = gibibytes()
    reader.forward.recording = False
    with fresh(), eager_attention():
        eager = seconds(lambda: next(reader.read(list(rows[:, :250]))), 1)
        eager_memory = gibibytes()
    reader = model = None
    with fresh(), torch.no_grad():
        baseline = gpt(run, landmark_freq=None, landmark_token_id=None)
        part = rows[:4].to(DEVICE)
        full = seconds(lambda: score(baseline(part).logits, part), run.times(3))
        full_memory = gibibytes()
    speed = rows.numel() / taken
    yield Row(
        "evaluation at 4096 (chunk 250, k 4, batch 16), 12 x 1024",
        f"{speed / 1e3:.0f} k tokens/s, {memory:.1f} GiB",
        f"{part.numel() / full / 1e3:.0f} k tokens/s, {full_memory:.1f} GiB (batch 4, one forward)",
        f"{16 * 250 / eager / 1e3:.1f} k tokens/s, {eager_memory:.1f} GiB (the last chunk)",
        "550 k tokens/s, under 8 GiB",
        speed >= 550e3 and memory < 8,
    )


def decode_gpt(run: Run) -> Iterator[Row]:
    """A step of the 12 x 1024 model, batch 1, at contexts up to a million tokens."""
    model, first = gpt(run), None
    full = {}
    for context in () if run.quick else (4096, 32768, 131072):
        with fresh():
            full[context] = full_step(llama("gpt-like", run), context, 1, run)
    for context in (4096, 32768, 131072, 1 << 20):
        with fresh():
            reader = BlockReader(model, top_k_blocks=4)
            fill(reader, context)
            step, loop = step_times(reader, run)
            eager = eager_step(reader, run)
            memory = gibibytes()
            reader = None
        first = first or step
        dynamic, preallocated = full.get(context, (float("nan"),) * 2)
        yield Row(
            f"decode, 12 x 1024, batch 1, {context // 1024}k tokens",
            f"{step * 1e3:.3f} ms ({step / first:.2f} x 4k), loop {loop * 1e3:.3f} ms, {memory:.1f} GiB",
            f"{dynamic * 1e3:.2f} ms, best {preallocated * 1e3:.2f} ms" if context in full else "-",
            f"{eager * 1e3:.1f} ms",
            "1.0 ms; 1M at most 1.6 x 4k",
            step <= 1e-3 and step <= 1.6 * first,
        )


def decode_gpt_batch(run: Run) -> Iterator[Row]:
    """A step of 16 rows with 128k tokens each. Their 103 GB of blocks do not fit: the layers share one layer's."""
    model = gpt(run)
    with fresh():
        reader = BlockReader(model, top_k_blocks=4, batch=16)
        fill(reader, 131072, share_storage=True)
        step, loop = step_times(reader, run)
        eager = eager_step(reader, run)
    yield Row(
        "decode, 12 x 1024, batch 16, 128k tokens each (blocks of one layer shared by all: 103 GB do not fit)",
        f"{step * 1e3:.3f} ms, loop {loop * 1e3:.3f} ms",
        "-",
        f"{eager * 1e3:.1f} ms",
        "1.5 ms",
        step <= 1.5e-3,
    )


def decode_8b(run: Run) -> Iterator[Row]:
    """A step of Llama-3-8B's shape at 128k tokens, k = 8."""
    model = llama("8b", run, top_k_blocks=8)
    with fresh():
        reader = BlockReader(model)
        fill(reader, 131072)
        step, loop = step_times(reader, run, 60)
        plain = other_step(reader, run, fused=False)
        libraries = other_step(reader, run, fused=True)
        eager = eager_step(reader, run)
        memory = gibibytes()
        reader = None
    with fresh():
        bound = copy_seconds(held_bytes(model))
        dynamic, preallocated = full_step(model, 131072, 1, run)
        full_memory = gibibytes()
    yield Row(
        "decode, Llama-3-8B's shape, k 8, 128k tokens",
        f"{step * 1e3:.2f} ms ({plain * 1e3:.2f} by the model's own modules; fused {libraries * 1e3:.2f} with a "
        f"library's products), loop {loop * 1e3:.2f} ms, {memory:.0f} GiB",
        f"{dynamic * 1e3:.1f} ms ({dynamic / loop:.1f} x), best {preallocated * 1e3:.1f} ms "
        f"({preallocated / step:.1f} x), {full_memory:.0f} GiB",
        f"{eager * 1e3:.0f} ms",
        "2 x faster; 1.3 x the bound",
        dynamic >= 2 * loop and step <= 1.3 * bound,
        bound=f"{bound * 1e3:.2f} ms, a copy of as many bytes as the weights ({step / bound:.2f} x)",
    )


def prefill_8b(run: Run) -> Iterator[Row]:
    """Reading 128k tokens with Llama-3-8B's shape, k = 8, in chunks of 32 blocks."""
    model, context = llama("8b", run, top_k_blocks=8), 8192 if run.quick else 131072
    ids = torch.randint(0, 100000, (1, context), generator=torch.Generator().manual_seed(0))
    with fresh():
        reader = BlockReader(model, chunk=2016)
        marks = []
        for _ in range(2):
            reader.reset()
            reader.expect(context)
            marks = [torch.cuda.Event(enable_timing=True)]
            marks[0].record()
            # The first time only compiles, the kernels of a short last chunk too.
            text = ids[0, : 3 * reader.chunk + context % reader.chunk if len(reader.cache.layers) == 0 else context]
            for _ in reader.read([text], last_only=True):
                marks.append(torch.cuda.Event(enable_timing=True))
                marks[-1].record()
            torch.cuda.synchronize()
        taken = marks[0].elapsed_time(marks[-1]) / 1e3
        memory = gibibytes()
        # Speed over the first 16k tokens and over the last 16k.
        early = 8 * 2016 / marks[0].elapsed_time(marks[min(8, len(marks) - 1)]) * 1e3
        late = 8 * 2016 / marks[max(0, len(marks) - 10)].elapsed_time(marks[-2]) * 1e3
        whole = context / taken
    with eager_attention():
        eager = seconds(lambda: next(reader.read([ids[0, :2016]], last_only=True)), 1)
    reader = None
    model.set_attn_implementation("sdpa")
    full = {}
    with fresh(), torch.no_grad():
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            with sdpa_kernel(backend):
                model(ids[:, :4096].to(DEVICE), use_cache=False, logits_to_keep=1)
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                model(ids.to(DEVICE), use_cache=False, logits_to_keep=1)
                end.record()
                torch.cuda.synchronize()
                full[backend] = begin.elapsed_time(end) / 1e3
    flash, cudnn = full.values()
    yield Row(
        "prefill of 128k tokens, Llama-3-8B's shape, k 8, chunk 2016",
        f"{taken:.2f} s, {whole / 1e3:.1f} k tokens/s, {memory:.0f} GiB",
        f"FA2 {flash:.2f} s ({flash / taken:.2f} x), cuDNN {cudnn:.2f} s ({cudnn / taken:.2f} x), "
        f"{gibibytes():.0f} GiB",
        f"{2016 / eager / 1e3:.2f} k tokens/s (the last chunk)",
        "3 x FA2, 2 x cuDNN",
        flash >= 3 * taken and cudnn >= 2 * taken,
    )
    yield Row(
        "the same: speed from 16k tokens to 128k",
        f"{early / 1e3:.1f} k tokens/s in the first 16k, {whole / 1e3:.1f} in all 128k ({whole / early - 1:+.0%}), "
        f"{late / 1e3:.1f} in the last 16k ({late / early - 1:+.0%})",
        target="falls by at most 25%",
        met=whole >= 0.75 * early,
    )


def million(run: Run) -> Iterator[Row]:
    """A million tokens read and 100 generated, SmolLM2-135M's shape."""
    model, context = llama("smollm2", run), 12288 if run.quick else 1 << 20
    ids = torch.randint(0, 49000, (context,), generator=torch.Generator().manual_seed(0))
    with fresh():
        reader = BlockReader(model, chunk=2016)
        reader.expect(context + 4096, steps=2 * run.times(100))
        started = time.perf_counter()
        for chunk in reader.read([ids], last_only=True):
            logits = chunk.logits
        torch.cuda.synchronize()
        reading = time.perf_counter() - started
        generated, tokens = [], logits[:, -1].argmax(-1).tolist()
        for _ in range(2):
            started = time.perf_counter()
            for _ in range(run.times(100)):
                tokens = reader.step(tokens).argmax(-1).tolist()
            generated.append(run.times(100) / (time.perf_counter() - started))
        memory = gibibytes()
    yield Row(
        "1M tokens read, 100 generated, SmolLM2-135M's shape, k 4",
        f"read {context / reading / 1e3:.0f} k tokens/s, generated {generated[0]:.0f} tokens/s, {memory:.1f} GiB",
        target="200 tokens/s from the first",
        met=generated[0] >= 200,
        bound=f"the next 100: {generated[1]:.0f} tokens/s",
    )


ROWS = {
    "evaluation": evaluation,
    "decode-gpt": decode_gpt,
    "decode-gpt-batch": decode_gpt_batch,
    "decode-8b": decode_8b,
    "prefill-8b": prefill_8b,
    "million": million,
    "first-steps": first_steps,
    "offload-read": offload_read,
    "offload-decode": offload_decode,
    "unlike": unlike_rows,
}


def warm(rows: list[str]) -> None:
    """Compile all kernels of the rows, in parallel."""
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--rows", row, "--layers", "1", "--quick"], stdout=subprocess.DEVNULL
        )
        for row in rows
    ]
    for row, process in zip(rows, processes, strict=True):
        if process.wait():
            print(f"warming {row} ended with status {process.returncode}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--layers", type=int, help="of every model, instead of its own number")
    parser.add_argument("--quick", action="store_true", help="measure nothing, only compile the kernels")
    parser.add_argument("--warm", action="store_true", help="compile the kernels of all rows in parallel first")
    parser.add_argument("--output", help="file for the table, Markdown")
    options = parser.parse_args()
    if options.warm:
        warm(options.rows)
    lines = [
        f"# Long contexts on {torch.cuda.get_device_name()}",
        "",
        f"landmark {landmark_cli.__version__}, torch {torch.__version__}, triton {triton.__version__}, "
        f"transformers {transformers.__version__}; {time.strftime('%Y-%m-%d')}. "
        f"By `{' '.join(['python', *sys.argv])}`.",
        "",
        *(line.strip() for line in __doc__.split("\n\n")[2:4] if line.strip()),
        "",
        "| work | ours | full attention | eager | bound, measured beside | target | met |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    failed = False
    for row in measured(options.rows, Run(options.layers, options.quick)):
        failed |= row.ours.startswith("failed")
        met = {True: "yes", False: "no", None: "-"}[row.met]
        lines.append(f"| {row.work} | {row.ours} | {row.full} | {row.eager} | {row.bound} | {row.target} | {met} |")
        print(lines[-1], flush=True)
        if options.output:
            Path(options.output).write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.exit(failed)


def measured(names: list[str], run: Run) -> Iterator[Row]:
    """The rows' lines as they come; what fails loses no other row."""
    for name in names:
        try:
            yield from ROWS[name](run)
        except Exception as error:
            traceback.print_exc()
            yield Row(name, f"failed: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}", met=False)


if __name__ == "__main__":
    main()
