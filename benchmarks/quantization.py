"""Weights in 8 and 4 bits beside bfloat16: products, decoding with Llama-3-8B's shape, and what a model loses by them.

    python benchmarks/quantization.py --output benchmarks/results/quantization-MACHINE.md
    python benchmarks/quantization.py --parts quality --model runs/mine --data data/mine

Products: one layer's, from weights that the GPU's cache does not hold, replayed as a CUDA graph; "off" is how far
outputs are from products with the weight that the codes stand for. Decoding: a step, as benchmarks/long_context.py
measures it, with random weights. "bound": a copy on the GPU that reads and writes as many bytes as the weights take
that a step reads, in the same run. Quality: perplexity on --data, and the mean score of RULER's tasks by length, of
--model as it is and quantized.

Needs the extra `quantization`.

--warm compiles all kernels first, with one layer, so that what follows measures alone.
"""

import argparse
import copy
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from long_context_steps import (
    DEVICE,
    Run,
    copy_seconds,
    fill,
    fresh,
    gibibytes,
    graph_seconds,
    held_bytes,
    llama,
    other_step,
    step_times,
)
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import landmark_cli
from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.models import quantization
from landmark_cli.models.quantization import QuantizedLinear, encode, quantize
from tests.closeness import whole_error

KINDS = ("none", "int8", "int4")
# (out, in) features of Llama-3-8B's linear layers.
SHAPES = {
    "q, o": (4096, 4096),
    "k, v": (1024, 4096),
    "gate, up": (14336, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
ROWS = (1, 4, 16, 2016)
# More than a GPU's cache holds, several times.
UNCACHED = 1 << 28
# Of the bfloat16 model's speed.
GOALS = {"int8": 1.5, "int4": 2.2}


@torch.no_grad()
def product_cells(name: str, kind: str, run: Run) -> list[str]:
    """What ROWS rows take with one layer's weights of a kind."""
    out_features, in_features = SHAPES[name]
    bits = {"none": 16, "int8": 8, "int4": 4}[kind]
    nbytes, cells = out_features * in_features * bits // 8, []
    linear = nn.Linear(in_features, out_features, False, DEVICE, torch.bfloat16)
    count = 1 if run.quick else max(2, UNCACHED // nbytes)
    if bits == 16:
        layers, weight = [copy.deepcopy(linear) for _ in range(count)], linear.weight.float()
    else:
        layers = [QuantizedLinear(linear, bits, DEVICE) for _ in range(count)]
        weight = encode(linear.weight, bits).weight()
    for rows in ROWS:
        x = torch.randn(rows, in_features, dtype=torch.bfloat16, device=DEVICE)
        expected = x.float() @ weight.T
        off = whole_error(layers[0](x), expected)
        taken = graph_seconds(lambda x=x: [layer(x) for layer in layers]) / count
        read, done = nbytes / taken / 1e12, 2 * rows * weight.numel() / taken / 1e12
        speed = f"{read:.2f} TB/s" if rows <= 16 else f"{done:.0f} TFLOP/s"
        cells.append(f"{taken * 1e6:.1f} us, {speed}, off {off:.0e}")
    return cells


def products(options: argparse.Namespace, run: Run) -> Iterator[str]:
    yield from ("## Products", "", "| layer | rows | bfloat16 | int8 | int4 |", "|---|---:|---|---|---|")
    for name, (out_features, in_features) in SHAPES.items():
        with fresh():
            kinds = [product_cells(name, kind, run) for kind in KINDS]
        for rows, *cells in zip(ROWS, *kinds, strict=True):
            yield f"| {name} ({out_features} x {in_features}) | {rows} | {' | '.join(cells)} |"


def decode(options: argparse.Namespace, run: Run) -> Iterator[str]:
    yield from ("", f"## Decoding, Llama-3-8B's shape, k 8, {options.context // 1024}k tokens", "")
    yield (
        "| weights | a step | x bfloat16 (goal) | by the model's own modules | greedy loop | weights read | bound | "
        "x bound | memory |"
    )
    yield "|---|---:|---|---:|---:|---:|---:|---:|---:|"
    first = None
    for kind in KINDS:
        with fresh():
            model = llama("8b", run, top_k_blocks=8)
            if kind != "none":
                quantize(model, kind, DEVICE)
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            reader = BlockReader(model)
            fill(reader, options.context)
            step, loop = step_times(reader, run, 60)
            plain = other_step(reader, run, fused=False)
            memory, nbytes = gibibytes(), held_bytes(model)
            reader = model = None
            torch.cuda.empty_cache()
            bound = copy_seconds(nbytes)
        first = first or step
        goal = f" ({GOALS[kind]})" if kind in GOALS else ""
        yield (
            f"| {'bfloat16' if kind == 'none' else kind} | {step * 1e3:.2f} ms | {first / step:.2f}{goal} | "
            f"{plain * 1e3:.2f} ms | {loop * 1e3:.2f} ms | {nbytes / 1e9:.2f} GB | {bound * 1e3:.2f} ms | "
            f"{step / bound:.2f} | {memory:.0f} GiB |"
        )


def quality(options: argparse.Namespace, run: Run) -> Iterator[str]:
    from landmark_cli.commands.evaluate import PerplexityOptions, run_perplexity
    from landmark_cli.commands.ruler import RulerOptions
    from landmark_cli.commands.ruler import run as run_ruler

    if options.model is None or run.quick:
        return
    yield from ("", f"## Quality: {Path(options.model).name}", "")
    yield "| weights | perplexity | " + " | ".join(f"RULER {length}" for length in options.lengths) + " |"
    yield "|---|---|" + "---|" * len(options.lengths)
    shared = {"model": options.model, "device": options.device, "dtype": "bfloat16"}
    for kind in KINDS:
        found = "-"
        if options.data is not None:
            asked = {"data": options.data, "eval_length": options.eval_length, "sample_tokens": options.sample_tokens}
            found = f"{run_perplexity(PerplexityOptions(**shared, **asked, quantization=kind))['perplexity']:.3f}"
        scores = ["-"] * len(options.lengths)
        if options.samples:
            with tempfile.TemporaryDirectory() as folder:
                asked = {"lengths": options.lengths, "samples": options.samples, "output": Path(folder)}
                asked |= {"tasks": options.tasks} if options.tasks else {}
                means = run_ruler(RulerOptions(**shared, **asked, quantization=kind))["means"]
            scores = [
                f"{mean['score']:.3f}" for length in options.lengths for mean in means if mean["tokens"] == length
            ]
        yield f"| {'bfloat16' if kind == 'none' else kind} | {found} | {' | '.join(scores)} |"


PARTS = {"products": products, "decode": decode, "quality": quality}


def measured(names: list[str], options: argparse.Namespace, run: Run) -> Iterator[str]:
    """The lines of the parts as they come; what fails loses no other part."""
    for name in names:
        try:
            yield from PARTS[name](options, run)
        except Exception as error:
            traceback.print_exc()
            yield f"\n{name} failed: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--layers", type=int, help="of the model that decodes, instead of its own number")
    parser.add_argument("--context", type=int, default=131072, help="tokens before the steps that are timed")
    parser.add_argument(
        "--group", type=int, help="input features that share a scale in 4 bits, instead of their number"
    )
    parser.add_argument("--warm", action="store_true", help="compile all kernels first")
    parser.add_argument("--model", help="a model whose quality is measured")
    parser.add_argument("--data", help="a token file or a prepared corpus, for its perplexity")
    parser.add_argument("--device", default="auto", help="where its quality is measured")
    parser.add_argument("--eval-length", type=int, default=4096)
    parser.add_argument("--sample-tokens", type=int, default=1 << 19)
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192])
    parser.add_argument("--samples", type=int, default=50, help="of each of RULER's tasks; 0 leaves it out")
    parser.add_argument("--tasks", nargs="+", help="of RULER, instead of all")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    quantization.GROUP = options.group or quantization.GROUP
    if options.warm:
        list(measured(options.parts, options, Run(1, True)))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    kernels = version("humming-kernels") if find_spec("humming") else "none"
    lines = [
        f"# Weights in 8 and 4 bits on {gpu}",
        "",
        f"landmark {landmark_cli.__version__}, torch {torch.__version__}, humming-kernels {kernels}; "
        f"{time.strftime('%Y-%m-%d')}. By `{' '.join(['python', *sys.argv])}`.",
        "",
        *__doc__.split("\n\n")[2].splitlines(),
        "",
    ]
    print("\n".join(lines), flush=True)
    for line in measured(options.parts, options, Run(options.layers)):
        lines.append(line)
        print(line, flush=True)
        if options.output:
            options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.exit(any("failed:" in line for line in lines))


if __name__ == "__main__":
    main()
