"""What a fused step does between and beside a library's products: each kernel with its definition, on inputs as a step
has them, views of joined products among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from landmark_cli.models import row_products, step_kernels, step_operations
from landmark_cli.models.known_layers import Activation
from tests.closeness import relative_error, tolerance

# Errors of a kernel against float32, as a multiple of its definition's in the same dtype; to it an eighth of a unit in
# the last place is added, or what sums in another order are apart in float32.
TIMES = 1.5
# Triton's interpreter cuts bfloat16 off where a GPU rounds, as often as a kernel rounds on its way.
CUT_OFF = 0.02


class Case(NamedTuple):
    """kernel: is given what `inputs` makes of random float32 numbers, in a dtype; so is its definition."""

    kernel: Callable
    definition: Callable
    inputs: Callable[[], tuple]


def _norms(width: int, tokens: int, adds: bool, after: bool = False, centered: bool = False) -> Callable[[], tuple]:
    def inputs() -> tuple:
        x, added = torch.randn(2, 2, tokens, width)
        behind = (torch.randn(width), 1e-5) if after else None
        return x, 3 * added if adds else None, torch.randn(width), 1e-6, behind, centered

    return inputs


def _heads(
    heads: int, key_heads: int, dim: int, tokens: int, normed: bool, centered: bool = False
) -> Callable[[], tuple]:
    def inputs() -> tuple:
        joined = torch.randn(2, tokens, (heads + 2 * key_heads) * dim)
        angles = torch.rand(2, tokens, dim // 2).repeat(1, 1, 2) * 7
        norms = (*torch.randn(2, dim), 1e-6, centered) if normed else ()
        return Parts(joined, (heads * dim, key_heads * dim), dim), angles.cos(), angles.sin(), *norms

    return inputs


def _gates(width: int, tokens: int, *activation: Activation) -> Callable[[], tuple]:
    return lambda: (Parts(torch.randn(2, tokens, 2 * width) * 4, (width, width)), *activation)


def _products(out_features: int, in_features: int, rows: tuple[int, int], bias: bool) -> Callable[[], tuple]:
    def inputs() -> tuple:
        weight = torch.randn(out_features, in_features) * in_features**-0.5
        return torch.randn(*rows, in_features), weight, *([torch.randn(out_features)] if bias else ())

    return inputs


class Parts(NamedTuple):
    """Arguments that are views of one tensor: its first columns, so many each; of heads of a width, if any."""

    joined: Tensor
    widths: tuple[int, ...]
    dim: int | None = None

    def views(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        joined = self.joined.to(device, dtype, copy=True)
        rest = joined.shape[-1] - sum(self.widths)
        views = joined.split([*self.widths, rest], -1)[: len(self.widths)]
        return [view if self.dim is None else view.unflatten(-1, (-1, self.dim)) for view in views]


def _cases(norms: list, heads: list, gates: list, products: list) -> dict[str, Case]:
    found = {}
    for width, tokens in norms:
        for adds in (False, True):
            name = f"add_norm-{width}-T{tokens}{'-added' if adds else ''}"
            found[name] = Case(step_kernels.add_norm, step_operations.add_norm, _norms(width, tokens, adds))
        both = Case(step_kernels.add_norm, step_operations.add_norm, _norms(width, tokens, True, True, True))
        found[f"add_norm-{width}-T{tokens}-added-after-centered"] = both
    for given in heads:
        for kind, more in {"": (False,), "-normed": (True,), "-centered-normed": (True, True)}.items():
            name = "rotate_heads-H{}on{}-D{}-T{}".format(*given) + kind
            found[name] = Case(step_kernels.rotate_heads, step_operations.rotate_heads, _heads(*given, *more))
    for given in gates:
        for kind in ("silu", "gelu_tanh"):
            name = "gated-{}-T{}".format(*given) + ("" if kind == "silu" else f"-{kind}")
            found[name] = Case(step_kernels.gated, step_operations.gated, _gates(*given, kind))
    for out_features, in_features, rows in products:
        shape = f"{out_features}x{in_features}-{rows[0]}x{rows[1]}"
        for name, bias in (("products", False), ("products", True), ("gated_products", False)):
            kernel, definition = getattr(row_products, name), getattr(step_operations, name)
            case = Case(kernel, definition, _products(out_features, in_features, rows, bias))
            found[f"{name}-{shape}{'-bias' if bias else ''}"] = case
    return found


# Widths that fit a power of 2 and that do not, as far as an interpreter takes seconds for them all.
SMALL = _cases(
    norms=[(48, 1), (1024, 1), (2880, 2)],
    heads=[(4, 2, 16, 3), (2, 1, 24, 1), (3, 1, 128, 2)],
    gates=[(48, 1), (1024, 2), (2880, 1)],
    products=[],
)
# Those of the tests' models, of SmolLM2-135M and of Llama-3-8B, and a chunk of Gemma 3 270M.
LARGE = _cases(
    norms=[(128, 1), (128, 2), (576, 1), (640, 1000), (4096, 2)],
    heads=[(2, 1, 64, 1), (2, 1, 64, 2), (4, 1, 256, 1000), (9, 3, 64, 1), (32, 8, 128, 2)],
    gates=[(256, 1), (256, 2), (1536, 1), (2048, 1000), (14336, 2)],
    products=[(256, 128, (2, 1)), (960, 576, (1, 2)), (6144, 4096, (2, 2))],
)


class Found(NamedTuple):
    """Errors of a kernel and of its definition against float32, the largest of a row; outputs: the kernel's and the
    definition's."""

    kernel: float
    definition: float
    outputs: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]

    @property
    def why_not_alike(self) -> str | None:
        """What is further from float32 than rounding makes it, or None."""
        kernel = self.outputs[0][0]
        allowed = TIMES * self.definition + max(torch.finfo(kernel.dtype).eps / 8, tolerance(torch.float32))
        if not kernel.is_cuda and kernel.dtype == torch.bfloat16:
            allowed = CUT_OFF
        return None if self.kernel <= allowed else f"off by {self.kernel:.1e} of a row, allowed {allowed:.1e}"


def measure(case: Case, dtype: torch.dtype, device: str) -> Found:
    """Of random inputs, rounded to a dtype before anything else."""
    torch.manual_seed(0)
    given = case.inputs()
    outputs = [
        _tuple(function(*_arguments(given, dtype, to, device)))
        for function, to in ((case.kernel, dtype), (case.definition, dtype), (case.definition, torch.float32))
    ]
    found, definition, exact = outputs
    assert all(x.dtype == dtype for x in (*found, *definition))
    worst = (max(relative_error(a, b) for a, b in zip(x, exact, strict=True)) for x in (found, definition))
    return Found(*worst, (found, definition))


def _arguments(given: tuple, dtype: torch.dtype, to: torch.dtype, device: str) -> list:
    """Made anew for who is called, since a kernel may write to what it is given."""
    found = []
    for x in given:
        if isinstance(x, Parts):
            found += x._replace(joined=x.joined.to(dtype)).views(to, device)
        elif isinstance(x, tuple):
            found.append(tuple(_arguments(x, dtype, to, device)))
        else:
            found.append(x.to(device, dtype).to(to) if isinstance(x, Tensor) else x)
    return found


def _tuple(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)
