"""From products of queries and keys to logits: times a factor, or soft-capped where a model bounds its logits.

Kernels take both as `scaling`, (factor, inside). A logit is product * factor where inside is None, which is known when
a kernel is compiled: it then has no code for caps. Otherwise it is tanh(product * inside) * factor, and whatever a
kernel does with products it does with these tangents.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import LOG2E


def scaling_of(scale: float, softcap: float | None, unit: float = 1.0) -> tuple[float, float | None]:
    """What makes logits of products, in units of 1 / unit: product * scale, kept within -softcap .. softcap if there is
    one."""
    return (scale * unit, None) if softcap is None else (softcap * unit, scale / softcap)


@triton.jit
def capped(s, scaling):
    """Products, any shape, of which scaling[0] makes logits: as they are, or what is inside of a soft cap.

    In float32, to some units in the last place. The usual quotient is exact far from 0; near it, where a difference of
    two numbers close to 1 would lose digits, and scores that differ would become equal, the series is.
    """
    if scaling[1] is None:
        return s
    else:
        x = s * scaling[1]
        e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
        far = (1.0 - e) / (1.0 + e)
        square = x * x
        rest = square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0))))
        return tl.where(tl.abs(x) < 0.25, x + x * rest, tl.where(x < 0.0, -far, far))


@triton.jit
def logits_of(s, scaling):
    """Logits of products, any shape."""
    return capped(s, scaling) * scaling[0]


@triton.jit
def before_cap(ds, s, scaling):
    """The gradient of products, less the model's scale, of that of logits; s: the products as `capped` gives them."""
    if scaling[1] is None:
        return ds
    else:
        return ds * (1.0 - s * s)
