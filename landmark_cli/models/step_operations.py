"""What a decoder does between its products, each of these as one: the definitions, in the order of roundings that
transformers' own modules have. step_kernels.py has the same as kernels, which a decoding step on a GPU runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .known_layers import Activation


def add_norm(
    x: Tensor,
    added: Tensor | None,
    weight: Tensor,
    eps: float,
    after: tuple[Tensor, float] | None = None,
    centered: bool = False,
) -> tuple[Tensor, Tensor]:
    """The residual x + added, (B, T, N), or x where nothing is added; and its root mean square norm times weight (N,),
    in x's dtype. after: weight (N,) and eps of a norm of what is added, before it is. centered: norms multiply by
    1 + weight, and round once."""
    if after is not None:
        added = _norm(added, *after, centered)
    total = x if added is None else x + added
    return total, _norm(total, weight, eps, centered)


def angles(positions: Tensor, frequencies: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of positions (B, T) times frequencies (D / 2,), times scaling: (B, T, D) each, both halves alike."""
    found = positions[..., None].float() * frequencies.float()
    found = torch.cat((found, found), dim=-1)
    return (found.cos() * scaling).to(dtype), (found.sin() * scaling).to(dtype)


def rotate_heads(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    centered: bool = False,
) -> tuple[Tensor, Tensor]:
    """q (B, T, H, D) and k (B, T, G, D), with a dense last dimension, rotated by half-split pairs, after a norm of each
    head where weights (D,) are given. cos, sin: (B, T, D). centered: as in `add_norm`. What q and k held before may be
    gone."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    rotated = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        x = x if weight is None else _norm(x, weight, eps, centered)
        one, two = x.chunk(2, dim=-1)
        rotated.append(x * cos + torch.cat((-two, one), dim=-1) * sin)
    return rotated[0], rotated[1]


def gated(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """silu(gate) * up, or gelu(gate) * up, approximated with tanh; (B, T, N) each with a dense last dimension."""
    if activation == "silu":
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="tanh") * up


def products(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (B, T, K) times weight (N, K), and a bias (N,): (B, T, N) in x's dtype, of sums in float32."""
    return functional.linear(x, weight, bias)


def gated_products(x: Tensor, weight: Tensor) -> Tensor:
    """`gated` of the two halves of the products with weight (2 N, K): (B, T, N)."""
    return gated(*products(x, weight).chunk(2, dim=-1))


def _norm(x: Tensor, weight: Tensor, eps: float, centered: bool) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * (1.0 + weight.float())).to(x.dtype) if centered else weight * wide.to(x.dtype)
