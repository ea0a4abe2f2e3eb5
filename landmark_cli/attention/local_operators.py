"""Attention in layers with a sliding window, as an operator of PyTorch: see operators.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .operator_library import define_attention
from .operators import check_scale, check_sinks, check_softcap, refuse_transforms


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


local_attention, local_attention_backward = define_attention(
    "local_attention",
    "Tensor first, Tensor text, float scale, float? softcap, str backend",
    "local_forward",
    "local_backward",
    differentiable_lse=False,
)
