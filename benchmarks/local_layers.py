"""Decoders most of whose layers keep a sliding window: what these layers cost, and reading long texts with Gemma 3's
shapes.

    python benchmarks/local_layers.py --output benchmarks/results/local-layers-MACHINE.md

Random weights in bfloat16. Reading: a text of 64k tokens through the block cache, k = 4, beside transformers' own
forward in chunks with SDPA and its hybrid cache (all keys where layers see everything, the last ones where they have a
window), in turns; medians of the rounds. Both are tried with several chunks, of which the fastest counts. Logits are
of the last token alone.

Layers: attention of one layer with a window, landmarks in its stream: the kernels beside the definition in PyTorch.
Without a GPU everything runs on toy shapes, and says nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from timing import GPU, clocked, medians
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig

import landmark_cli
from landmark_cli.attention import local
from landmark_cli.attention.cache import BlockCache, RetrievalSettings
from landmark_cli.attention.rotary import default_inverse_frequencies
from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.models.decoders import attend_with_landmarks
from landmark_cli.models.support import Kinds

DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
FREQ = 63
TOKENS = 65536 if GPU else 700
# Text tokens of a chunk of ours: whole blocks, within the trained positions. Chunks of theirs.
CHUNKS, THEIR_CHUNKS = ((31 * FREQ, 63 * FREQ, 122 * FREQ), (2048, 4096, 8192)) if GPU else ((3 * FREQ,), (256,))

GEMMA = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144}
SHAPES = {
    "270M": GEMMA | {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "sliding_window": 512},
    "1B": GEMMA | {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "sliding_window": 512},
    "1B, window 1024": GEMMA
    | {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "sliding_window": 1024},
}
TOY = {"toy": {**GEMMA, "head_dim": 16, "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64,
               "num_hidden_layers": 6, "sliding_window": 100}}  # fmt: skip
# (query heads, key heads, head dim, window, more) of a layer.
LAYERS = {
    "Gemma 3 1B": (4, 1, 256, 512, {}),
    "Gemma 2 9B": (16, 8, 256, 4096, {"softcap": 50.0}),
    "GPT-OSS 20B": (64, 8, 64, 128, {"sinks": True}),
}
TOY_LAYERS = {"toy": (4, 1, 16, 100, {"softcap": 50.0, "sinks": True})}
LAYER_CHUNK, LAYER_TOKENS = (2048, 8192) if GPU else (64, 128)


def medians_of(contenders: dict[Any, Callable[[], object]], rounds: int) -> dict[Any, float]:
    """Median seconds of each; a round comes first, which compiles, chooses and records."""
    return medians({name: partial(clocked, work) for name, work in contenders.items()}, rounds, warm=1)


def gemma(shape: dict[str, Any], landmarks: bool) -> Gemma3ForCausalLM:
    count = shape["num_hidden_layers"]
    # Five layers with a window, then one that sees everything.
    types = ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(count)]
    config = Gemma3TextConfig(**shape, layer_types=types, max_position_embeddings=131072, attn_implementation="sdpa")
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPE)
    try:
        with DEVICE:
            model = Gemma3ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    if landmarks:
        config.landmark_freq, config.landmark_token_id = FREQ, shape["vocab_size"] - 1
        config.trained_length, config.top_k_blocks = 8192, 4
        attend_with_landmarks(
            model, Kinds([kind == "sliding_attention" for kind in types], ["halves"] * count, False, False)
        )
    return model


@torch.no_grad()
def reading(name: str, shape: dict[str, Any], rounds: int, chunks: Sequence[int]) -> str:
    ids = torch.randint(1, shape["vocab_size"] - 1, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    model, plain, there = gemma(shape, True), gemma(shape, False), ids.to(DEVICE)

    def ours(reader: BlockReader) -> None:
        reader.reset()
        for _ in reader.read([ids[0]], last_only=True):
            pass

    def theirs(size: int) -> None:
        cache = DynamicCache(config=plain.config)
        for begin in range(0, TOKENS, size):
            part = there[:, begin : begin + size]
            plain(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)

    readers = {size: BlockReader(model, chunk=size) for size in chunks}
    for reader in readers.values():
        reader.expect(TOKENS)
        # Graphs of the rarest chunks are recorded when they come a second time: in the second round.
        ours(reader)
    contenders = {("ours", size): partial(ours, reader) for size, reader in readers.items()}
    contenders |= {("theirs", size): partial(theirs, size) for size in THEIR_CHUNKS}
    times = medians_of(contenders, rounds)
    best = {whose: min(t for (who, _), t in times.items() if who == whose) for whose in ("ours", "theirs")}
    said = [
        ", ".join(f"{t:.3f} s in chunks of {size}" for (who, size), t in times.items() if who == whose)
        for whose in best
    ]
    ratio = best["theirs"] / best["ours"]
    return (
        f"| {name}, window {shape['sliding_window']} | {said[0]}: {TOKENS / best['ours'] / 1e3:.0f} k tokens/s "
        f"| {said[1]} | {ratio:.2f} x | 2 x | {'yes' if ratio >= 2 else 'no'} |"
    )


def layer(name: str, heads: int, key_heads: int, dim: int, window: int, more: dict, rounds: int) -> str:
    """A chunk that is read, a step of decoding, and a training step of one layer, kernels beside the definition."""
    frequencies = default_inverse_frequencies(dim).to(DEVICE)
    logits = {key: value for key, value in more.items() if key != "sinks"}
    if "sinks" in more:
        logits["sinks"] = torch.linspace(-1, 2, heads, device=DEVICE, dtype=DTYPE).requires_grad_()

    def tensors(tokens: int) -> list[torch.Tensor]:
        of_heads = heads, key_heads, key_heads
        made = [torch.randn(1, tokens, count, dim, device=DEVICE, dtype=DTYPE).transpose(1, 2) for count in of_heads]
        return [x.requires_grad_() for x in made]

    def read(tokens: int, backend: str) -> Callable[[], object]:
        cache = BlockCache(RetrievalSettings(FREQ + 1, 4), frequencies, device=DEVICE)
        chunk, (q, k, v) = cache.begin_chunk([tokens]), [x.detach() for x in tensors(tokens)]
        held = cache.window(0, k, window)
        held.real.fill_(True)
        given = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in logits.items()}
        return lambda: local.attend_chunk(q, k, v, held, chunk, frequencies, backend=backend, **given)

    leaves = tensors(LAYER_TOKENS)
    dout = torch.randn_like(leaves[0])

    def train(backend: str) -> None:
        given = {"block_size": FREQ + 1, "frequencies": frequencies, "backend": backend} | logits
        out = local.attend_input(*leaves, window, **given)
        torch.autograd.grad(out, leaves, dout)

    cells = []
    for works in (
        {backend: read(LAYER_CHUNK, backend) for backend in ("triton", "eager")},
        {backend: read(1, backend) for backend in ("triton", "eager")},
        {backend: lambda backend=backend: train(backend) for backend in ("triton", "eager")},
    ):
        # A call of a layer is so short that many are timed together.
        repeated = {name: lambda work=work: [work() for _ in range(10)] for name, work in works.items()}
        times = medians_of(repeated, rounds)
        ours, definition = times["triton"] / 10 * 1e3, times["eager"] / 10 * 1e3
        cells.append(f"{ours:.3f} / {definition:.3f} ms ({definition / ours:.1f} x)")
    said = f"{heads} heads on {key_heads}, D {dim}, window {window}{''.join(f', {key}' for key in more)}"
    return f"| {name}: {said} | {' | '.join(cells)} |"


def main() -> None:
    shapes, layers = (SHAPES, LAYERS) if GPU else (TOY, TOY_LAYERS)
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", nargs="*", choices=shapes, default=list(shapes), help="to read with")
    parser.add_argument("--layers", nargs="*", choices=layers, default=list(layers), help="to time alone")
    parser.add_argument("--chunks", nargs="+", type=int, default=CHUNKS, help="text tokens of a chunk of ours, to try")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", help="file for the tables, Markdown")
    options = parser.parse_args()
    machine = torch.cuda.get_device_name() if GPU else "a CPU, toy shapes"
    lines: list[str] = []

    def say(*more: str) -> None:
        lines.extend(more)
        print("\n".join(more), flush=True)
        if options.output:
            Path(options.output).write_text("\n".join(lines) + "\n", encoding="utf-8")

    say(
        f"# Layers with a sliding window on {machine}",
        "",
        f"landmark {landmark_cli.__version__}, torch {torch.__version__}, triton {triton.__version__}, "
        f"transformers {transformers.__version__}; {time.strftime('%Y-%m-%d')}. "
        f"By `{' '.join(['python', *sys.argv])}`.",
        "",
        *(part.strip() for part in __doc__.split("\n\n")[2:3]),
        "",
        f"| reading {TOKENS} tokens, Gemma 3's shape | ours | transformers' own | | target | met |",
        "|---|---|---|---|---|---|",
    )
    for name in options.shapes:
        say(reading(name, shapes[name], options.rounds, options.chunks))
        if GPU:
            torch.cuda.empty_cache()
    say(
        "",
        f"Attention of one layer, kernels / definition: a chunk of {LAYER_CHUNK} tokens read, a step of one token, "
        f"forward and backward of {LAYER_TOKENS} tokens. With the host's time: in a model, steps and most chunks are "
        "CUDA graphs.",
        "",
        "| layer | chunk | step | training |",
        "|---|---|---|---|",
    )
    for name in options.layers:
        say(layer(name, *layers[name], options.rounds))


if __name__ == "__main__":
    main()
