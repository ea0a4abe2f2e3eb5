"""Rotation of queries and keys in one pass over memory: the fused twin of rotary.rotate."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fused.launch import empty_heads_last


@triton.jit(do_not_specialize=["tokens", "heads"])
def rotate_kernel(X, COS, SIN, OUT, x_strides, cos_strides, out_strides, tokens, heads,
                  HALF: tl.constexpr, REST: tl.constexpr, HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr,
                  HEADS: tl.constexpr):  # fmt: skip
    """OUT = X turned, (B, H, T, D). Program (token, batch row): the angles of a token serve all its heads."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    dim = tl.arange(0, HALF_PAD)
    at = row * cos_strides[0] + token * cos_strides[2] + dim
    cos = tl.load(COS + at, mask=dim < HALF, other=0.0)[None, :]
    sin = tl.load(SIN + at, mask=dim < HALF, other=0.0)[None, :]
    x_row = X + row * x_strides[0] + token * x_strides[2]
    out_row = OUT + row * out_strides[0] + token * out_strides[2]
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)
        mask = (head < heads)[:, None] & (dim < HALF)[None, :]
        x = x_row + head[:, None] * x_strides[1] + dim[None, :]
        out = out_row + head[:, None] * out_strides[1] + dim[None, :]
        one = tl.load(x, mask=mask, other=0.0).to(tl.float32)
        two = tl.load(x + HALF, mask=mask, other=0.0).to(tl.float32)
        tl.store(out, (one * cos - two * sin).to(OUT.dtype.element_ty), mask=mask)
        tl.store(out + HALF, (two * cos + one * sin).to(OUT.dtype.element_ty), mask=mask)
        if REST > 0:
            rest = 2 * HALF + tl.arange(0, REST_PAD)
            mask = (head < heads)[:, None] & (rest < 2 * HALF + REST)[None, :]
            x = x_row + head[:, None] * x_strides[1] + rest[None, :]
            tl.store(out_row + head[:, None] * out_strides[1] + rest[None, :], tl.load(x, mask=mask), mask=mask)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (B, H, T, D) with a dense last dimension; cos, sin: float32, broadcastable to (B, 1, T, rotary_dim / 2).

    Returns a tensor of x's shape and dtype that lies in memory as (B, T, H, D), differentiable by x.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return Rotation.apply(x, cos, sin)
    return _rotate(x, cos, sin)


class Rotation(torch.autograd.Function):
    """A rotation's gradient is turned back."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
        return rotate(gradient, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, heads, tokens, dim = x.shape
    half = cos.shape[-1]
    cos, sin = (t.expand(batch, 1, tokens, half) for t in (cos, sin))
    out, rest = empty_heads_last(x), dim - 2 * half
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        rotate_kernel[(tokens, batch)](
            x, cos, sin, out, *(t.stride()[:3] for t in (x, cos, out)), tokens, heads, HALF=half, REST=rest,
            HALF_PAD=triton.next_power_of_2(half), REST_PAD=triton.next_power_of_2(max(1, rest)),
            HEADS=min(16, triton.next_power_of_2(heads)), num_warps=4,
        )  # fmt: skip
    return out


def serves(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the kernel can do it: on a GPU, angles alike for all heads, alike in memory and not to be learned."""
    if not x.is_cuda or x.dtype == torch.float64:
        return False
    if cos.requires_grad or sin.requires_grad or torch._C._are_functorch_transforms_active():
        return False
    shapes = x.dim() == cos.dim() == 4 and cos.shape == sin.shape and cos.shape[1] == 1
    dense = x.stride(-1) == cos.stride(-1) == sin.stride(-1) == 1 and cos.stride() == sin.stride()
    return shapes and dense and cos.dtype == torch.float32
