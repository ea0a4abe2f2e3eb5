"""Products of one to four rows, with the weights of Llama-3-8B's layers: the library's and ours, by tile.

    python benchmarks/row_products.py --output row_products.md

Each from weights that the GPU's cache does not hold, replayed as a CUDA graph. "gate and up" are followed by the gate:
a kernel of its own behind the library's product, the same kernel in ours. The best tile of each is marked: `tiles_for`
of landmark_cli/models/row_products.py should have it.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from long_context_steps import DEVICE, graph_seconds
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from landmark_cli.models import row_products, step_kernels, step_operations
from landmark_cli.models.row_products import Tiles
from tests.closeness import whole_error

# (out, in) features.
SHAPES = {
    "q, k, v": (6144, 4096),
    "o": (4096, 4096),
    "gate and up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
TILES = [
    Tiles(1, 2048), Tiles(1, 4096, 8), Tiles(2, 1024), Tiles(2, 2048), Tiles(4, 512), Tiles(4, 1024), Tiles(4, 2048, 8),
    Tiles(8, 512), Tiles(8, 1024, 8), Tiles(16, 256), Tiles(2, 1024, 4, 3), Tiles(4, 512, 4, 4), Tiles(4, 1024, 4, 3),
    Tiles(8, 512, 4, 3), Tiles(8, 512, 8, 4), Tiles(1, 1024, 1), Tiles(1, 1024, 2), Tiles(2, 512, 1), Tiles(2, 512, 2),
]  # fmt: skip
# More than a GPU's cache holds, several times.
UNCACHED = 1 << 28


@torch.no_grad()
def cells(name: str, rows: int) -> Iterator[str]:
    weights = [torch.randn(SHAPES[name], dtype=torch.bfloat16, device=DEVICE) * 0.02 for _ in range(2)]
    weights += [weights[0].clone() for _ in range(UNCACHED // weights[0].nbytes)]
    x = torch.randn(1, rows, SHAPES[name][1], dtype=torch.bfloat16, device=DEVICE)
    gates = name == "gate and up"
    ours = row_products.gated_products if gates else row_products.products
    expected = (step_operations.gated_products if gates else step_operations.products)(x, weights[1])

    def library(x: Tensor, weight: Tensor) -> Tensor:
        y = step_operations.products(x, weight)
        return step_kernels.gated(*y.chunk(2, dim=-1)) if gates else y

    def taken(product: Callable[[Tensor, Tensor], Tensor]) -> float:
        return graph_seconds(lambda: [product(x, weight) for weight in weights]) / len(weights)

    found = {"library": taken(library)}
    for tiles in TILES:
        try:
            error = whole_error(ours(x, weights[1], tiles=tiles), expected)
            assert error < 0.01, f"{tiles} is off by {error:.1e}"
            found[",".join(map(str, tiles))] = taken(lambda x, weight, tiles=tiles: ours(x, weight, tiles=tiles))
        except Exception as error:
            # One that does not compile, fit or agree loses no other.
            print(
                f"{name}, {rows} rows, {tiles}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}",
                file=sys.stderr,
            )
    best = min(found, key=found.get)
    for tiles, seconds in found.items():
        speed = f"{seconds * 1e6:.1f} us, {weights[0].nbytes / seconds / 1e12:.2f} TB/s"
        yield f"| {name} {SHAPES[name]} | {rows} | {tiles} | {f'**{speed}**' if tiles == best else speed} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    lines = [
        f"# Products of few rows on {torch.cuda.get_device_name()}",
        "",
        f"torch {torch.__version__}, triton {triton.__version__}; {time.strftime('%Y-%m-%d')}. Tiles: rows of the "
        "weight, columns, warps, stages.",
        "",
        "| layer | rows | tiles | |",
        "|---|---:|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for name in options.shapes:
        for rows in options.rows:
            for line in cells(name, rows):
                lines.append(line)
                print(line, flush=True)
                if options.output:
                    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
