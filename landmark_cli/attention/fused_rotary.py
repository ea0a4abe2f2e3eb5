"""Rotation of queries and keys in one pass over memory: the fused twin of rotary.rotate."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fused.launch import empty_heads_last


@triton.jit
def _move(X, OUT, x_stride, out_stride, cos, sin, heads, TURNED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
          HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    """All heads of a token, the first 2 * HALF dimensions turned or as they are. Strides: from head to head."""
    dim = tl.arange(0, HALF_PAD)[None, :]
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)[:, None]
        x, out = X + head * x_stride, OUT + head * out_stride
        mask = (head < heads) & (dim < HALF)
        one = tl.load(x + dim, mask=mask)
        two = tl.load(x + dim + HALF, mask=mask)
        if TURNED:
            one, two = one.to(tl.float32), two.to(tl.float32)
            one, two = one * cos - two * sin, two * cos + one * sin
        tl.store(out + dim, one.to(OUT.dtype.element_ty), mask=mask)
        tl.store(out + dim + HALF, two.to(OUT.dtype.element_ty), mask=mask)
        if REST > 0:
            rest = 2 * HALF + tl.arange(0, REST_PAD)[None, :]
            mask = (head < heads) & (rest < 2 * HALF + REST)
            tl.store(out + rest, tl.load(x + rest, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["tokens", "heads"])
def rotate_kernel(Q, K, V, COS, SIN, Q_OUT, K_OUT, V_OUT, q_strides, k_strides, v_strides, cos_strides, out_strides,
                  tokens, heads, JOINED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HALF_PAD: tl.constexpr,
                  REST_PAD: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    """Q_OUT = Q turned, (B, H, T, D); if JOINED, K_OUT = K turned and V_OUT = V too. Program (token, batch row): the
    angles of a token serve all its heads."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    dim = tl.arange(0, HALF_PAD)
    at = row * cos_strides[0] + token * cos_strides[2] + dim
    cos = tl.load(COS + at, mask=dim < HALF, other=0.0)[None, :]
    sin = tl.load(SIN + at, mask=dim < HALF, other=0.0)[None, :]
    to = row * out_strides[0] + token * out_strides[2]
    x = Q + row * q_strides[0] + token * q_strides[2]
    _move(x, Q_OUT + to, q_strides[1], out_strides[1], cos, sin, heads, True, HALF, REST, HALF_PAD, REST_PAD, HEADS)
    if JOINED:
        x = K + row * k_strides[0] + token * k_strides[2]
        _move(x, K_OUT + to, k_strides[1], out_strides[1], cos, sin, heads, True, HALF, REST, HALF_PAD, REST_PAD, HEADS)
        x = V + row * v_strides[0] + token * v_strides[2]
        _move(
            x, V_OUT + to, v_strides[1], out_strides[1], cos, sin, heads, False, HALF, REST, HALF_PAD, REST_PAD, HEADS
        )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (B, H, T, D) with a dense last dimension; cos, sin: float32, broadcastable to (B, 1, T, rotary_dim / 2).

    Returns a tensor of x's shape and dtype that lies in memory as (B, T, H, D), differentiable by x.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return Rotation.apply(x, cos, sin)
    return _rotate(x, cos, sin)


def join_rotated(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """q and k, turned, and v as it is, (B, H, T, D) each with a dense last dimension, in one: (B, T, 3, H, D)."""
    batch, heads, tokens, dim = q.shape
    joined = q.new_empty(batch, tokens, 3, heads, dim)
    _launch([q, k, v], cos, sin, [part.transpose(1, 2) for part in joined.unbind(2)])
    return joined


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
    out = empty_heads_last(x)
    _launch([x], cos, sin, [out])
    return out


def _launch(parts: list[Tensor], cos: Tensor, sin: Tensor, outputs: list[Tensor]) -> None:
    """Turn one part; or, of three, turn two and copy the last."""
    batch, heads, tokens, dim = parts[0].shape
    half = cos.shape[-1]
    rest = dim - 2 * half
    cos, sin = (t.expand(batch, 1, tokens, half) for t in (cos, sin))
    # The kernel without the other two still has their arguments.
    q, k, v = parts * (3 // len(parts))
    q_out, k_out, v_out = outputs * (3 // len(parts))
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        rotate_kernel[(tokens, batch)](
            q, k, v, cos, sin, q_out, k_out, v_out, *(t.stride()[:3] for t in (q, k, v, cos, q_out)), tokens, heads,
            JOINED=len(parts) == 3, HALF=half, REST=rest, HALF_PAD=triton.next_power_of_2(half),
            REST_PAD=triton.next_power_of_2(max(1, rest)), HEADS=min(16, triton.next_power_of_2(heads)), num_warps=4,
        )  # fmt: skip


def serves(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the kernel can do it: on a GPU, angles alike for all heads, alike in memory and not to be learned."""
    if not x.is_cuda or x.dtype == torch.float64:
        return False
    if cos.requires_grad or sin.requires_grad or torch._C._are_functorch_transforms_active():
        return False
    shapes = x.dim() == cos.dim() == 4 and cos.shape == sin.shape and cos.shape[1] == 1
    dense = x.stride(-1) == cos.stride(-1) == sin.stride(-1) == 1 and cos.stride() == sin.stride()
    return shapes and dense and cos.dtype == torch.float32
