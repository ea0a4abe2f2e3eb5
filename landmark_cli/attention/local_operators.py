"""Attention in layers with a sliding window, as an operator of PyTorch: see operators.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import BACKENDS
from .kernels.common.tensors import empty_heads_last
from .operators import LIBRARY, check_scale, check_sinks, check_softcap, refuse_second_derivatives, refuse_transforms


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    text: Tensor,
    *,
    backend: str,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The twin of `local.attend` in the kernels of a backend that can serve, values and gradients: (B, H, Tq, D), which
    lies in memory as (B, Tq, H, D).

    q: (B, H, Tq, D), the last queries of the keys; k, v: (B, G, Tk, D); rotated, with any strides. first: (B or 1, Tq)
    int32, the number of the first key that each query sees, of those before itself; it sees itself in any case. Where
    gradients are asked for it never falls from query to query. text: (B or 1, Tk) bool, keys that later queries see.
    scale, softcap, sinks: see reference.landmark_attention. Gradients repeat bit by bit.

    Raises ValueError naming an argument that cannot be.
    """
    if not torch.compiler.is_compiling():
        refuse_transforms(q, k, v)
    scale, softcap = check_scale(scale, q), check_softcap(softcap)
    check_sinks(sinks, q)
    return local_attention(q, k, v, sinks, first, text, scale, softcap, backend)[0]


_SETTINGS = "Tensor first, Tensor text, float scale, float? softcap, str backend"
LIBRARY.define(
    f"local_attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, {_SETTINGS}) -> (Tensor out, Tensor lse)",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define(
    "local_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor out, Tensor lse, "
    f"{_SETTINGS}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
    tags=torch.Tag.pt2_compliant_tag,
)
local_attention = torch.ops.landmark.local_attention.default
local_attention_backward = torch.ops.landmark.local_attention_backward.default


@torch.library.impl(LIBRARY, "local_attention", "CompositeExplicitAutograd")
def _(q, k, v, sinks, *settings):
    """(out, lse) of checked arguments."""
    *settings, backend = settings
    return BACKENDS[backend].local_forward(q, k, v, sinks, *settings)


@torch.library.register_fake("landmark::local_attention", lib=LIBRARY)
def _(q, k, v, sinks, *settings):
    return empty_heads_last(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.impl(LIBRARY, "local_attention_backward", "CompositeExplicitAutograd")
def _(dout, q, k, v, sinks, out, lse, *settings):
    """(dq, dk, dv, dsinks) from the gradient of out; the last is empty where there are no sinks."""
    *settings, backend = settings
    *found, dsinks = BACKENDS[backend].local_backward(dout, q, k, v, sinks, out, lse, *settings)
    return *found, q.new_empty(0) if dsinks is None else dsinks


@torch.library.register_fake("landmark::local_attention_backward", lib=LIBRARY)
def _(dout, q, k, v, sinks, out, lse, *settings):
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return empty_heads_last(q), empty_heads_last(k), empty_heads_last(v), dsinks


class LocalAttention(torch.autograd.Function):
    """What autograd keeps between the two operators."""

    @staticmethod
    def forward(ctx, *inputs):
        q, k, v, sinks, first, text, *settings = inputs
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = local_attention(*inputs)
        ctx.save_for_backward(q, k, v, sinks, out, lse, first, text)
        ctx.settings = settings
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, _):
        q, k, v, sinks, out, lse, first, text = ctx.saved_tensors
        *found, dsinks = local_attention_backward(dout, q, k, v, sinks, out, lse, first, text, *ctx.settings)
        return *found, None if sinks is None else dsinks, *(None,) * (2 + len(ctx.settings))


@torch.library.impl(LIBRARY, "local_attention", "Autograd")
def _(*inputs):
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs[:4]):
        return LocalAttention.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return local_attention(*inputs)


refuse_second_derivatives(local_attention_backward)
