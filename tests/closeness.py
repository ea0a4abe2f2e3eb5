"""When two results of floating-point work are the same: by their dtype and their size, never by an absolute guess.

How far sums in another order are apart depends on the processor, the number of threads and the size of what is summed.
So the difference is measured against the size of the rows themselves, row by row: one wrong token, head or weight row
cannot hide behind many right ones, and a row that happens to be small is judged by the size of its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

# How far apart two right ways of a few thousand roundings may be, as a share of a row's size. float32 and float64: a
# few hundred units in the last place, where up to forty are seen; 16-bit types: two, for the result itself is rounded,
# and so is what it was computed from.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference of a row, which is the last dimension, as a share of the row's norm or of the root mean
    square of all rows' norms, whichever is larger. nan where one of them has a nan, inf where infinities differ."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    a, b = (x.detach().to("cpu", torch.float64) for x in (actual, expected))
    infinite = b.isinf()
    if not torch.equal(a.isinf(), infinite) or not torch.equal(a[infinite], b[infinite]):
        return math.nan if a.isnan().any() or b.isnan().any() else math.inf
    a, b = (torch.atleast_1d(x.masked_fill(infinite, 0.0)) for x in (a, b))
    differences, sizes = (a - b).norm(dim=-1), b.norm(dim=-1)
    allowed = sizes.maximum(sizes.square().mean().sqrt())
    errors = torch.where(differences == 0, 0.0, differences / allowed)
    return math.nan if errors.isnan().any() else errors.max().item()


def whole_error(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference as a share of the norm of what is expected, all rows together, worked out where the
    tensors are. 0 where both are the same, such as empty; inf where all that is expected is 0, and nan as it comes."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
    a, b = (x.detach().float() for x in (actual, expected))
    difference, size = (a - b).norm().item(), b.norm().item()
    if difference == 0:
        return 0.0
    return difference / size if size else math.inf * difference


def tolerance(*dtypes: torch.dtype) -> float:
    """What is allowed between results of these dtypes: the coarsest one's."""
    return max(TOLERANCE[dtype] for dtype in dtypes)


def assert_close_norm(
    actual: Any, expected: Any, dtype: torch.dtype | None = None, *, within: float | None = None
) -> None:
    """Assert that two tensors are the same but for rounding; of lists, tuples and dicts, all that they hold.
    A list of numbers, such as a curve of losses, is one row.

    dtype: of the coarsest arithmetic that made them; by default, their own. within: the share of a row's size that is
    allowed in place of the dtype's, where something is known that makes it more or less.
    """
    if isinstance(expected, Mapping):
        assert actual.keys() == expected.keys()
        pairs: Iterable = ((f"[{name!r}]", actual[name], expected[name]) for name in expected)
    elif isinstance(expected, (list, tuple)) and not all(isinstance(value, float) for value in expected):
        assert len(actual) == len(expected)
        pairs = ((f"[{i}]", a, b) for i, (a, b) in enumerate(zip(actual, expected, strict=True)))
    else:
        # Python's numbers hold what float32 arithmetic made.
        pairs = [
            ("", *(x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float32) for x in (actual, expected)))
        ]
    for name, a, b in pairs:
        if not isinstance(a, Tensor):
            assert_close_norm(a, b, dtype, within=within)
            continue
        error, allowed = relative_error(a, b), within or tolerance(*((a.dtype, b.dtype) if dtype is None else (dtype,)))
        # A nan is no agreement either.
        assert error <= allowed, f"{name} differs by {error:.2e} of a row's size, where {allowed:.0e} is rounding"
