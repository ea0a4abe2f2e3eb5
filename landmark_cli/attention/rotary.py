"""Rotary position embedding, half-split: dimension i is rotated together with dimension i + rotary_dim / 2.

Rotations compose and only differences of angles matter, so a cached key stays rotated by its offset in its block and a
query is rotated by whole blocks to stand at the wanted distance. Sources: arXiv 2104.09864; 2305.16300, section 3.2.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType

import torch
from torch import Tensor


def default_inverse_frequencies(rotary_dim: int, base: float = 10000.0) -> Tensor:
    """Angle per position of each rotated pair: (rotary_dim / 2,) float32."""
    return base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)


def rotation_table(positions: Tensor, inverse_frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position * inverse frequency, float32, shaped positions.shape + (rotary_dim / 2,).

    Angles are formed in float64: at a million positions a float32 angle would be off by 0.06.
    """
    table = _opaque_table if torch.compiler.is_compiling() else _table
    return table(positions, inverse_frequencies)


def _table(positions: Tensor, inverse_frequencies: Tensor) -> tuple[Tensor, Tensor]:
    angles = positions[..., None].double() * inverse_frequencies.double()
    return angles.cos().float(), angles.sin().float()


# To torch.compile one operator: it would else form the float64 cosines anew for every element of every layer's queries
# and keys, forward and backward.
_opaque_table = torch.library.custom_op("landmark::rotation_table", _table, mutates_args=())


@_opaque_table.register_fake
def _(positions: Tensor, inverse_frequencies: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*positions.shape, *inverse_frequencies.shape)
    cos, sin = (inverse_frequencies.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 * cos.shape[-1] dimensions of x; the rest passes through (partial rotary).

    x: (..., D); cos, sin: broadcastable to (..., rotary_dim / 2). Computed in float32 (float64 if x is), returned in
    x's dtype.
    """
    # A compiled model's rotations are part of its own kernels.
    if x.is_cuda and not torch.compiler.is_compiling():
        kernel = _kernel()
        if kernel is not None and kernel.serves(x, cos, sin):
            return kernel.rotate(x, cos, sin)
    half = cos.shape[-1]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    first, second, rest = x[..., :half].to(dtype), x[..., half : 2 * half].to(dtype), x[..., 2 * half :]
    # Rounded before they are put together, so that a compiled model writes each half once, in its own dtype.
    rotated = [(first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)]
    return torch.cat([*rotated, rest] if rest.shape[-1] else rotated, dim=-1)


def split_and_rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, rotated, and values, (B, H, T, D) each, of their common projection (B, T, 3, H, D).

    cos, sin: as in `rotate`, (B or 1, 1, T, rotary_dim / 2); no gradients reach them where qkv is on a GPU.
    """
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    if qkv.is_cuda and qkv.requires_grad and torch.is_grad_enabled() and not transformed:
        return SplitAndRotate.apply(qkv, cos, sin)
    return _split_and_rotate(qkv, cos, sin)


def _split_and_rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


class SplitAndRotate(torch.autograd.Function):
    """Forward is for torch.compile to fuse. Backward is one operator: the kernel that torch.compile makes of a stack of
    gradients rotated back takes more than twice the time that its bytes need."""

    @staticmethod
    def forward(ctx, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _split_and_rotate(qkv, cos, sin)

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return join_rotated(dq, dk, dv, cos, -sin), None, None


@torch.library.custom_op("landmark::join_rotated", mutates_args=())
def join_rotated(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """q and k, rotated, and v as it is, (B, H, T, D) each, put together: (B, T, 3, H, D)."""
    kernel = _kernel()
    if kernel is not None and all(kernel.serves(x, cos, sin) for x in (q, k, v)):
        return kernel.join_rotated(q, k, v, cos, sin)
    return torch.stack([rotate(q, cos, sin), rotate(k, cos, sin), v]).permute(1, 3, 0, 2, 4).contiguous()


@join_rotated.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, heads, tokens, dim = q.shape
    return q.new_empty(batch, tokens, 3, heads, dim)


@functools.cache
def _kernel() -> ModuleType | None:
    """The kernel that does the same in one pass, unless Triton is missing or plain PyTorch was asked for."""
    if os.environ.get("LANDMARK_ATTENTION") == "eager":
        return None
    try:
        from .kernels.common import rotary
    except ImportError:
        return None
    return rotary
