"""What a soft cap of the logits and attention sinks cost in the Triton kernels, beside the kernels without them and the
definition.

    python benchmarks/bounded_logits.py --output benchmarks/results/bounded-logits-h200.md

Training is a forward and a backward pass over a whole input. Reading is one layer's chunk of 2048 tokens, and a step of
one, behind a cache of 1024 blocks of which each query and head retrieves 8. Times are medians of replayed CUDA graphs,
in turn; the definition runs on what fits and is scaled to the whole. Without a GPU it runs on toy shapes.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from attention_shapes import DEVICE, DTYPE, PHASES, Shape
from attention_timing import Timer, part, timers, times_of_part
from markdown_table import table
from timing import GPU, clocked, medians, synchronize
from torch import Tensor

from landmark_cli.attention.cache import BlockCache, RetrievalSettings
from landmark_cli.attention.functional import attend_chunk, landmark_attention
from landmark_cli.attention.reference import landmark_attention as definition
from landmark_cli.attention.rotary import default_inverse_frequencies

SHAPES = {
    "Gemma 2 9B": Shape(1, 16, 4096, 256, key_heads=8),
    "GPT-OSS 20B": Shape(1, 64, 8192, 64, key_heads=8),
    "32 heads on 8": Shape(1, 32, 8192, 128, key_heads=8),
}
TOY_SHAPES = {"toy": Shape(1, 4, 70, 16, block=16, key_heads=2)}
CHUNK, CACHED, TOP_K = (2048, 1024, 8) if GPU else (20, 6, 2)


def logits_of(shape: Shape) -> dict[str, dict]:
    """What is given beside queries, keys and values, by name."""
    sinks = torch.linspace(-1, 2, shape.heads, device=DEVICE).requires_grad_()
    return {
        "neither": {},
        "cap": {"softcap": 50.0},
        "sinks": {"sinks": sinks},
        "both": {"softcap": 50.0, "sinks": sinks},
    }


def training_row(name: str, shape: Shape, rounds: int) -> list[list[str]]:
    torch.manual_seed(0)
    sets = [shape.tensors()]
    calls = {}
    for given, more in logits_of(shape).items():
        attend = functools.partial(landmark_attention, backend="triton", **more)
        found = timers(lambda q, k, v, block, attend=attend: attend(q, k, v, block_size=block), shape, sets)
        calls |= {(given, phase): found[phase].run for phase in PHASES}
    times = medians(calls, rounds)
    times |= {("definition", phase): seconds for phase, seconds in by_definition(shape, sets[0]).items()}
    return [[f"{name}: {shape}, {phase}", *cells({key[0]: t for key, t in times.items() if key[1] == phase})]
            for phase in PHASES]  # fmt: skip


def by_definition(shape: Shape, given: list[Tensor]) -> dict[str, float]:
    """Seconds of the definition with both, on as much as it has memory for."""
    small, _ = part(shape)
    more = logits_of(small)["both"]
    times = times_of_part(lambda q, k, v, block: definition(q, k, v, block_size=block, **more), shape, given)
    return {phase: statistics.median(found) for phase, found in times.items()}


@torch.no_grad()
def reading_row(name: str, shape: Shape, tokens: int, rounds: int) -> list[str]:
    torch.manual_seed(0)
    settings = RetrievalSettings(shape.block, TOP_K)
    cache = BlockCache(settings, default_inverse_frequencies(shape.dim), batch=1, device=DEVICE)
    cache.host_blocks, cache.expected_blocks = [CACHED], CACHED + tokens // shape.block + 2
    q, k, v = (
        torch.randn(1, tokens, n, shape.dim, dtype=DTYPE, device=DEVICE).transpose(1, 2)
        for n in (shape.heads, shape.key_heads, shape.key_heads)
    )
    chunk = cache.begin_chunk([tokens])
    layer = cache.layer(0, k, chunk)
    layer.blocks.normal_()
    layer.landmark_keys.copy_(layer.keys[..., -1, :])

    def replayed(more: dict) -> Callable[[], float]:
        call = functools.partial(attend_chunk, 0, q, k, v, cache, chunk, backend="triton", **more)
        call()
        synchronize()
        return Timer([call] * (20 if GPU else 1), torch.cuda.Stream() if GPU else None).run

    given = logits_of(shape)
    times = medians({which: replayed(more) for which, more in given.items()}, rounds)
    defined = functools.partial(attend_chunk, 0, q, k, v, cache, chunk, backend="eager", **given["both"])
    times["definition"] = statistics.median(clocked(defined) for _ in range(3))
    return [f"{name}: {tokens} token{'s' * (tokens > 1)} behind {CACHED} blocks", *cells(times)]


def cells(times: dict[str, float]) -> list[str]:
    """Milliseconds, and those with a cap or sinks as multiples of those with neither."""
    plain = times["neither"]
    rest = [f"{seconds * 1e3:.3f} ({seconds / plain:.2f})" for seconds in list(times.values())[1:]]
    return [f"{plain * 1e3:.3f}", *rest]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, help="write the table there, in Markdown")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    rows = []
    for name, shape in (SHAPES if GPU else TOY_SHAPES).items():
        rows += training_row(name, shape, options.rounds)
        rows += [reading_row(name, shape, tokens, options.rounds) for tokens in (CHUNK, 1)]
    machine = torch.cuda.get_device_name() if GPU else "no GPU: toy shapes, interpreted"
    head = ["ms a layer (of neither)", "neither", "soft cap", "sinks", "both", "definition, both"]
    text = f"# Soft caps and attention sinks: {machine}, torch {torch.__version__}\n\n{table(head, rows)}\n"
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
