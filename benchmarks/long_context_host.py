"""Rows of long_context.py: blocks in host memory, the first steps after a prompt, and rows of unlike lengths.

Each row measures its bound in the same run: copies of pinned memory over the bus, and the same work where nothing is
offloaded, nothing was left to record, or no row ends before the others.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from long_context_steps import DEVICE, Run, fill, fresh, gibibytes, llama, seconds, step_times

from landmark_cli.attention.kernels.reading import launch
from landmark_cli.inference.block_reader import BlockReader

MILLION, CHUNK = 1 << 20, 2016


@dataclass
class Row:
    """One line of the table. met: whether ours meets the target, None where there is none. bound: what the machine
    allows, measured beside it."""

    work: str
    ours: str
    full: str = "-"
    eager: str = "-"
    target: str = "-"
    met: bool | None = None
    bound: str = "-"


def offload_read(run: Run) -> Iterator[Row]:
    """The end of a million tokens read, SmolLM2-135M's shape, with all blocks in host memory."""
    model = llama("smollm2", run)
    context = 6 * CHUNK if run.quick else MILLION
    with fresh():
        bus = bandwidth()
        at_once = 3 if run.quick else largest_passage(model)
        passages = 1 if run.quick else 3
        read = (passages + 1) * at_once * CHUNK
        reader = filled(model, context, read, offload="cpu")
        ids = text(read)
        for _ in reader.read([ids[: at_once * CHUNK]], last_only=True):
            pass
        taken = timed(lambda: list(reader.read([ids[at_once * CHUNK :]], last_only=True)))
        memory, speed = gibibytes(), passages * at_once * CHUNK / taken
        layers = reader.cache.layers.values()
        streamed = sum(x.blocks[:, :, : reader.cache.host_blocks[0] + 1].nbytes for x in layers)
        reader = layers = None
    with fresh():
        reader = filled(model, context, 12 * CHUNK)
        for _ in reader.read([ids[: 4 * CHUNK]], last_only=True):
            pass
        count = 1 if run.quick else 8
        here = count * CHUNK / timed(lambda: list(reader.read([ids[: count * CHUNK]], last_only=True)))
        reader.forward.recording = False
        with chosen_blocks() as chosen:
            next(reader.read([ids[:CHUNK]], last_only=True))
        block = next(iter(reader.cache.layers.values())).blocks[0, 0, 0].nbytes
        distinct = sum(int(x) for x in chosen) * block
    by_chunk, by_passage = (n / (size / bus) for n, size in ((CHUNK, distinct), (at_once * CHUNK, streamed)))
    yield Row(
        f"the last {passages * at_once * CHUNK // 1000}k of 1M tokens read, SmolLM2-135M's shape, k 4, --offload cpu "
        "(random landmarks before)",
        f"{speed / 1e3:.1f} k tokens/s, {memory:.1f} GiB on the GPU, {at_once} chunks a passage",
        target="40 k tokens/s, under 6 GiB on the GPU",
        met=speed >= 40e3 and memory < 6,
        bound=f"bus {bus / 1e9:.0f} GB/s: {by_passage / 1e3:.0f} k tokens/s a passage ({streamed / 1e9:.1f} GB); "
        f"distinct chosen blocks of one chunk {distinct / 1e9:.1f} GB: {by_chunk / 1e3:.1f} k; not offloaded "
        f"{here / 1e3:.1f} k",
    )


def offload_decode(run: Run) -> Iterator[Row]:
    """Steps after a million tokens, SmolLM2-135M's shape, with all blocks in host memory."""
    model = llama("smollm2", run)
    context = 4096 if run.quick else MILLION
    with fresh():
        bus = bandwidth()
        reader = filled(model, context, 4096, offload="cpu")
        step, loop = step_times(reader, run)
        memory = gibibytes()
        block = next(iter(reader.cache.layers.values())).blocks[0, 0, 0].nbytes
        reader = None
    with fresh():
        here_step, here_loop = step_times(filled(model, context, 4096), run)
    config = model.config
    chosen = config.num_hidden_layers * config.num_attention_heads * config.top_k_blocks * block
    yield Row(
        "decode after 1M tokens, SmolLM2-135M's shape, k 4, --offload cpu",
        f"{1 / loop:.0f} tokens/s ({loop * 1e3:.2f} ms, its graph {step * 1e3:.2f} ms), {memory:.1f} GiB on the GPU",
        target="200 tokens/s",
        met=1 / loop >= 200,
        bound=f"{chosen / 1e6:.0f} MB over the bus at {bus / 1e9:.0f} GB/s: {chosen / bus * 1e3:.2f} ms; not offloaded "
        f"{1 / here_loop:.0f} tokens/s (graph {here_step * 1e3:.2f} ms)",
    )


def first_steps(run: Run) -> Iterator[Row]:
    """The first tokens after a million, of which the last few chunks are read, SmolLM2-135M's shape."""
    model = llama("smollm2", run)
    context, read = (4096, 3 * CHUNK) if run.quick else (MILLION, 6 * CHUNK)
    with fresh():
        reader = filled(model, context, read + 512)
        ids, steps = text(read), run.times(100)
        reader.expect(read + 2 * steps, steps=2 * steps)
        for chunk in reader.read([ids], last_only=True):
            logits = chunk.logits
        torch.cuda.synchronize()
        before, tokens, speeds = len(reader.forward._recorded), logits[:, -1].argmax(-1).tolist(), []
        for _ in range(2):
            started = time.perf_counter()
            for _ in range(steps):
                tokens = reader.step(tokens).argmax(-1).tolist()
            speeds.append(steps / (time.perf_counter() - started))
        recorded = len(reader.forward._recorded) - before
    yield Row(
        "the first 100 tokens after 1M, SmolLM2-135M's shape, k 4",
        f"{speeds[0]:.0f} tokens/s, {recorded} graphs recorded in them",
        target="200 tokens/s from the first",
        met=speeds[0] >= 200,
        bound=f"the next 100: {speeds[1]:.0f} tokens/s",
    )


def unlike_rows(run: Run) -> Iterator[Row]:
    """64 prompts of 1k to 64k tokens, read beside each other, and as many of one length, as many tokens in all.

    SmolLM2-135M's shape with 8 layers: all 30 layers' blocks of such a batch take 97 GB.
    """
    model = llama("smollm2", Run(run.layers or 8, run.quick))
    count, longest = (4, 4096) if run.quick else (64, 65536)
    lengths = torch.linspace(longest // 64, longest, count).long().tolist()
    batches = {"unlike": lengths, "equal": [sum(lengths) // count] * count}
    first, read, steps, memory = {}, {}, {}, 0.0
    for name, rows in batches.items():
        with fresh():
            first[name], read[name], steps[name] = read_and_step(model, rows, run)
            memory = max(memory, gibibytes())
    share, of_steps = (speeds["unlike"] / speeds["equal"] for speeds in (read, steps))
    yield Row(
        f"{count} prompts of {lengths[0] // 1024}k to {longest // 1024}k tokens, SmolLM2-135M's shape, "
        f"{model.config.num_hidden_layers} layers",
        f"read {read['unlike'] / 1e3:.0f} k tokens/s ({share:.2f} of equal rows; by the process's first reader, which "
        f"meets kernels that are not compiled, {first['unlike'] / 1e3:.0f} k), {run.times(60)} steps of all "
        f"{steps['unlike'] / 1e3:.1f} k tokens/s ({of_steps:.2f}), {memory:.0f} GiB",
        target="0.8 of equal rows",
        met=share >= 0.8,
        bound=f"rows of {batches['equal'][0] // 1024}k tokens: {read['equal'] / 1e3:.0f} k tokens/s, steps "
        f"{steps['equal'] / 1e3:.1f} k",
    )


def read_and_step(model, lengths: list[int], run: Run) -> tuple[float, float, float]:
    """Tokens a second of prompts of these lengths, read beside each other: by a first reader, which compiles what has
    not been compiled, and by another one, which has graphs of its own still to record; and of the steps after them."""
    texts, count, taken = [text(length) for length in lengths], run.times(60), []
    for _ in range(2):
        reader = None
        reader = BlockReader(model, chunk=CHUNK, batch=len(lengths))
        reader.expect(max(lengths) + 256)
        # Makes room.
        for _ in reader.read([row[:CHUNK] for row in texts], last_only=True):
            pass
        reader.reset()
        taken.append(timed(lambda reader=reader: list(reader.read(texts, last_only=True))))

    def step() -> None:
        for _ in range(count):
            reader.step([1] * len(lengths))

    # Records the graphs.
    step()
    first, again = (sum(lengths) / seconds for seconds in taken)
    return first, again, count * len(lengths) / timed(step)


def filled(model, context: int, read: int, **options) -> BlockReader:
    """A reader that has read all but the last `read` tokens of a context."""
    reader = BlockReader(model, chunk=CHUNK, **options)
    fill(reader, max(CHUNK, context - read), room=read + 4096)
    return reader


def text(tokens: int) -> torch.Tensor:
    return torch.randint(0, 49000, (tokens,), generator=torch.Generator().manual_seed(0))


def timed(work) -> float:
    """Seconds until the device is done."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def largest_passage(model) -> int:
    """Chunks that one call reads where there are enough."""
    reader = BlockReader(model, chunk=CHUNK, offload="cpu")
    return reader.passage_tokens // (CHUNK // reader.landmark_freq * (reader.landmark_freq + 1) + 1)


def bandwidth() -> float:
    """Bytes a second of copies from pinned host memory to the device."""
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    here = torch.empty(len(host), dtype=torch.uint8, device=DEVICE)
    return len(host) / seconds(lambda: here.copy_(host, non_blocking=True), 8)


@contextmanager
def chosen_blocks() -> Iterator[list[torch.Tensor]]:
    """How many distinct blocks each layer's queries choose in each chunk that is read meanwhile."""
    found, find_pairs = [], launch.find_pairs

    def counting(call, ages):
        pairs = find_pairs(call, ages)
        found.append((pairs.count > 0).sum())
        return pairs

    launch.find_pairs = counting
    try:
        yield found
    finally:
        launch.find_pairs = find_pairs
