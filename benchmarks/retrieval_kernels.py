"""The retrieval kernels of one layer, one by one: time, and what other tile sizes would give.

    python benchmarks/retrieval_kernels.py --warm --tune
    python benchmarks/retrieval_kernels.py --shapes 8b --tune
    python benchmarks/retrieval_kernels.py --model runs/pg19-landmark --text novel.txt

Random queries choose nearly all blocks, those of a trained model far fewer: with --model, a model reads a text and the
kernels are timed on what its layers had in the last chunk (--save FILE keeps that; --load FILE times it elsewhere).

Times are medians of a CUDA graph of the kernel, in microseconds. "distinct" is how many blocks 64 neighbouring queries
of a head choose together.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TypeVar
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from triton.testing import do_bench_cudagraph

from landmark_cli.attention.cache import BlockCache, RetrievalSettings
from landmark_cli.attention.kernels.common.configuration import Configuration
from landmark_cli.attention.kernels.reading import launch, selection
from landmark_cli.attention.kernels.reading.call import Call
from landmark_cli.attention.rotary import default_inverse_frequencies

DEVICE, DTYPE = "cuda", torch.bfloat16
T = TypeVar("T")

# (batch, heads, key heads, head dim, block size, k, tokens, numbers of cached blocks)
SHAPES = {
    "evaluation": (16, 8, 8, 128, 51, 4, 255, (20, 40, 80)),
    "alone": (1, 8, 8, 128, 51, 4, 255, (80, 642, 2570, 20560)),
    "passkey": (3, 6, 6, 64, 51, 4, 255, (20560,)),
    "8b": (1, 32, 8, 128, 64, 8, 2048, (256, 1024, 2048)),
    "smollm2": (1, 9, 3, 64, 64, 4, 2048, (1024, 16384)),
    "step": (1, 8, 8, 128, 51, 4, 1, (80, 2570, 20560)),
    "step-16": (16, 8, 8, 128, 51, 4, 1, (80, 2570)),
    "step-8b": (1, 32, 8, 128, 64, 8, 1, (2048,)),
}

CHOICES = {
    "select": [Configuration(64, 64, 4), Configuration(64, 64, 8), Configuration(128, 64, 8), Configuration(128, 64, 4),
               Configuration(64, 64, 4, 1, 128), Configuration(32, 64, 4)],
    "attend": [Configuration(16, 64, 1, 1), Configuration(16, 64, 2, 1), Configuration(16, 64, 4, 1),
               Configuration(32, 64, 2, 1), Configuration(32, 64, 4, 1), Configuration(64, 64, 4, 1),
               Configuration(64, 64, 4, 1, 128), Configuration(64, 64, 8, 1), Configuration(128, 64, 8, 1)],
    "merge": [Configuration(64, 64, 4, 1), Configuration(64, 64, 4, 2), Configuration(64, 64, 4, 2, 128),
               Configuration(64, 64, 4, 3), Configuration(64, 64, 8, 2), Configuration(128, 64, 8, 1),
               Configuration(128, 64, 8, 2), Configuration(128, 64, 8, 3), Configuration(128, 64, 8, 2, 128)],
}  # fmt: skip

# A step's scoring of landmarks: how many a tile (a single query has no tile of rows), and programs at most.
STEP_CHOICES = [
    (Configuration(1, 128, 4, 1), 4096), (Configuration(1, 128, 4, 1), 1024), (Configuration(1, 128, 4, 1), 528),
    (Configuration(1, 64, 4, 1), 8192), (Configuration(1, 64, 2, 1), 8192), (Configuration(1, 256, 8, 1), 4096),
    (Configuration(1, 128, 8, 1), 4096), (Configuration(1, 128, 2, 1), 4096),
]  # fmt: skip
# The same where several query heads share a key head, in tiles of rows.
GROUPED_CHOICES = [(Configuration(16, cols, warps), 4096) for cols in (16, 32, 64, 128, 256) for warps in (1, 2, 4, 8)]
# Reading the selected blocks in a step: how many keys a tile.
DECODE_CHOICES = [Configuration(1, cols, warps, 1) for cols in (16, 32, 64) for warps in (1, 2, 4, 8)]


def random_call(shape: str, blocks: int) -> Call:
    """A chunk of random queries, keys and values in front of which `blocks` random blocks are cached."""
    batch, heads, key_heads, dim, block_size, k, tokens, _ = SHAPES[shape]
    cache = BlockCache(RetrievalSettings(block_size, k), default_inverse_frequencies(dim), batch=batch, device=DEVICE)
    cache.host_blocks, cache.expected_blocks = [blocks] * batch, blocks + tokens // block_size + 2
    torch.manual_seed(0)
    q, key, value = (
        torch.randn(batch, tokens, n, dim, dtype=DTYPE, device=DEVICE).transpose(1, 2)
        for n in (heads, key_heads, key_heads)
    )
    chunk = cache.begin_chunk([tokens] * batch)
    layer = cache.layer(0, key, chunk)
    layer.blocks.normal_()
    layer.landmark_keys.copy_(layer.keys[..., -1, :])
    return Call(q, key, value, layer, chunk, None)


def saved_calls(path: Path) -> Iterator[tuple[str, Call]]:
    """The calls that `save` has kept."""
    tensors = load_file(path, device=DEVICE)
    for name in sorted({key.split(".")[0] for key in tensors}, key=int):
        part = {key.split(".")[1]: value for key, value in tensors.items() if key.split(".")[0] == name}
        block_size, k, blocks, tail = part["numbers"].tolist()
        cache = BlockCache(RetrievalSettings(block_size, k), part["frequencies"], device=DEVICE)
        cache.host_blocks, cache.host_tail, cache.expected_blocks = [blocks], [tail], part["blocks"].shape[2]
        chunk = cache.begin_chunk([part["q"].shape[2]])
        layer = cache.layer(0, part["k"], chunk)
        used = part["blocks"].shape[2]
        layer.blocks[:, :, :used], layer.landmark_keys[:, :, :used] = part["blocks"], part["blocks"][:, :, :, 0, -1]
        yield f"layer {name}", Call(part["q"], part["k"], part["v"], layer, chunk, None)


def model_calls(directory: str, text: Path, tokens: int) -> Iterator[tuple[str, Call]]:
    """The last chunk of each layer of a model that reads the first `tokens` tokens of a text."""
    from landmark_cli.attention.kernels import reading as kernels
    from landmark_cli.inference.block_reader import BlockReader
    from landmark_cli.models.store import load

    model, tokenizer = load(directory, device=DEVICE, dtype=DTYPE)
    ids = tokenizer(text.read_text(encoding="utf-8"), verbose=False)["input_ids"][:tokens]
    calls: dict[int, Call] = {}
    attend, reader = kernels.attend_chunk, BlockReader(model)

    def keep(q: Tensor, k: Tensor, v: Tensor, blocks, chunk, scale, traced, softcap, sinks):
        (index,) = (index for index, layer in reader.cache.layers.items() if layer is blocks)
        calls[index] = Call(q, k, v, blocks, chunk, scale, softcap, sinks)
        return attend(q, k, v, blocks, chunk, scale, traced, softcap, sinks)

    kernels.attend_chunk = keep
    reader.forward.recording = False
    for _ in reader.read([ids[: len(ids) // reader.chunk * reader.chunk]], last_only=True):
        pass
    kernels.attend_chunk = attend
    return ((f"layer {index}", call) for index, call in sorted(calls.items()))


def save(calls: dict[str, Call], path: Path) -> None:
    """Keep calls for --load."""
    kept = {}
    for name, call in calls.items():
        (blocks,), (tail,) = call.chunk.host_blocks, call.chunk.host_tail
        numbers = torch.tensor([call.settings.block_size, call.top_k, blocks, tail])
        stored = call.blocks.blocks[:, :, : blocks + 1]
        tensors = {"q": call.q, "k": call.k, "v": call.v, "blocks": stored, "numbers": numbers}
        tensors["frequencies"] = call.blocks.rotations.frequencies(call.q.device)
        kept |= {f"{name.split()[1]}.{key}": value.contiguous().cpu() for key, value in tensors.items()}
    save_file(kept, path)


def time_of(work: Callable[[], object], rep: int = 20) -> float:
    return do_bench_cudagraph(work, rep=rep, return_mode="median") * 1e3


def distinct(call: Call, ages: Tensor) -> float:
    """Blocks that 64 neighbouring queries of a head choose together, on average."""
    size = min(64, ages.shape[2])
    tokens = ages.shape[2] // size * size
    groups = ages[:, :, :tokens].reshape(-1, size * call.top_k).tolist()
    return sum(len(set(group)) for group in groups) / len(groups)


def stages(call: Call) -> Iterator[tuple[str, Callable[[], object]]]:
    """The kernels of a call in their order, each ready to be run again and again."""
    yield "store", lambda: launch.store(call)
    if call.is_step:
        yield "select", lambda: selection.step_candidates(call)
        yield "all", lambda: launch.decode(call)
        return
    yield "select", lambda: selection.select(call)
    if selection.shares_of_landmarks(call, selection.select_configuration(call)) > 1:
        yield "select, landmarks not shared out", lambda: select_alone(call)
    ages = selection.select(call)
    yield "route", lambda: launch.find_pairs(call, ages)
    pairs = launch.find_pairs(call, ages)
    yield "attend", lambda: launch.attend(call, pairs)
    yield "merge", lambda: launch.merge(call, pairs)
    yield "merge without pairs", lambda: launch.merge(call)


def select_alone(call: Call) -> Tensor:
    """The selection with all landmarks scored by one program for each tile of queries."""
    with mock.patch.object(selection, "ENOUGH_PROGRAMS", 0):
        return selection.select(call)


def tune(call: Call, stage: str) -> Iterator[tuple[Configuration, float]]:
    """A stage's time in every configuration that compiles and fits."""
    module, name = (selection, "select_configuration") if stage == "select" else (launch, f"{stage}_configuration")
    for choice in CHOICES[stage]:
        taken = measured_with(module, lambda: time_of(dict(stages(call))[stage]), stage, choice, **{name: choice})
        if taken is not None:
            yield choice, taken


def tune_step(call: Call) -> Iterator[tuple[str, float, float]]:
    """(choice, time of scoring the landmarks, time of all) of a step."""

    def times() -> tuple[float, float]:
        found = dict(stages(call))
        return time_of(found["select"], rep=5), time_of(found["all"], rep=5)

    for choice, programs in STEP_CHOICES if call.query_rows == 1 else GROUPED_CHOICES:
        limits = {"MAX_SPLITS": programs, "MAX_PROGRAMS": programs}
        found = measured_with(selection, times, "select", choice, step_configuration=choice, **limits)
        if found is not None:
            yield f"{choice.cols} landmarks, {choice.warps} warps, {programs} programs", *found
    for choice in DECODE_CHOICES:
        found = measured_with(launch, times, "decode", choice, decode_configuration=choice)
        if found is not None:
            yield f"{choice.cols} keys of a block, {choice.warps} warps", *found


def measured_with(
    module: ModuleType, measure: Callable[[], T], stage: str, choice: Configuration, **instead: Configuration | int
) -> T | None:
    """What is measured while a module has other limits, and functions that choose these configurations; None, and a
    line that says so, where that does not compile or fit."""
    replaced = {name: (lambda *_, value=value: value) if isinstance(value, Configuration) else value
                for name, value in instead.items()}  # fmt: skip
    with mock.patch.multiple(module, **replaced):
        try:
            return measure()
        except Exception as error:
            print(f"  {stage} {choice}: {type(error).__name__}", file=sys.stderr)
            return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tune", nargs="?", const="select,attend,merge", help="stages to time in other configurations")
    parser.add_argument(
        "--warm", action="store_true", help="compile in parallel first, a process for every shape and stage"
    )
    parser.add_argument("--model", help="time the layers of this model, reading --text")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=32768, help="of the text")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--load", type=Path)
    options = parser.parse_args()
    tuned = options.tune.split(",") if options.tune else []
    if options.warm:
        command = [sys.executable, __file__, "--shapes"]
        jobs = [[*command, shape, *(["--tune", stage] if stage else [])] for shape in options.shapes
                for stage in (tuned if SHAPES[shape][6] > 1 else tuned[:1]) or [None]]  # fmt: skip
        for process in [subprocess.Popen(job, stdout=subprocess.DEVNULL) for job in jobs]:
            process.wait()
    if options.load:
        calls = dict(saved_calls(options.load))
    elif options.model:
        calls = dict(model_calls(options.model, options.text, options.tokens))
    else:
        calls = {}
        for shape in options.shapes:
            most = max(SHAPES[shape][-1])
            for blocks in SHAPES[shape][-1]:
                call = random_call(shape, blocks)
                measure(f"{shape}, {blocks} blocks", call, tuned if blocks == most or not call.is_step else [])
    if options.save:
        save(calls, options.save)
    for name, call in calls.items():
        measure(name, call, tuned)


def measure(name: str, call: Call, tuned: list[str]) -> None:
    times = {stage: time_of(work) for stage, work in stages(call)}
    spread = "" if call.is_step else f"; distinct {distinct(call, selection.select(call)):.0f}"
    print(f"{name}: " + ", ".join(f"{stage} {taken:.0f}" for stage, taken in times.items()) + spread, flush=True)
    if call.is_step:
        if "select" in tuned:
            for choice, select, everything in sorted(tune_step(call), key=lambda found: found[2]):
                print(f"  select {select:.1f}, all {everything:.1f}: {choice}", flush=True)
        return
    for stage in tuned:
        for choice, taken in sorted(tune(call, stage), key=lambda pair: pair[1]):
            print(f"  {stage} {taken:.0f}: {choice.launch_options()} rows {choice.rows}", flush=True)


if __name__ == "__main__":
    main()
