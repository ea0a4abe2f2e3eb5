"""Rotation of queries and keys in one pass over memory: the twin of rotary.rotate."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, LaunchCache, launch
from .tensors import empty_heads_last

CALLS = LaunchCache()


@triton.jit
def move_heads(X, OUT, x_stride, out_stride, cos, sin, heads, ROTATED: tl.constexpr, HALF: tl.constexpr,
               REST: tl.constexpr, HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    """All heads of a token, the first 2 * HALF dimensions rotated or as they are. Strides: from head to head."""
    dim = tl.arange(0, HALF_PAD)[None, :]  # (1, HALF_PAD)
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)[:, None]  # (HEADS, 1), as x and out
        x, out = X + head * x_stride, OUT + head * out_stride
        # (HEADS, HALF_PAD), as one and two.
        mask = (head < heads) & (dim < HALF)
        one = tl.load(x + dim, mask=mask)
        two = tl.load(x + dim + HALF, mask=mask)
        if ROTATED:
            one, two = one.to(tl.float32), two.to(tl.float32)
            one, two = one * cos - two * sin, two * cos + one * sin
        tl.store(out + dim, one.to(OUT.dtype.element_ty), mask=mask)
        tl.store(out + dim + HALF, two.to(OUT.dtype.element_ty), mask=mask)
        if REST > 0:
            rest = 2 * HALF + tl.arange(0, REST_PAD)[None, :]  # (1, REST_PAD)
            mask = (head < heads) & (rest < 2 * HALF + REST)
            tl.store(out + rest, tl.load(x + rest, mask=mask), mask=mask)


@triton.jit
def angles_of(COS, SIN, strides, row, token, HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    """cos and sin of a token, (1, HALF_PAD): they serve all its heads."""
    dim = tl.arange(0, HALF_PAD)[None, :]  # (1, HALF_PAD), as at
    at = row * strides[0] + token * strides[2] + dim
    return tl.load(COS + at, mask=dim < HALF, other=0.0), tl.load(SIN + at, mask=dim < HALF, other=0.0)


@triton.jit(do_not_specialize=["heads"])
def rotate_kernel(X, COS, SIN, OUT, x_strides, cos_strides, out_strides, heads, HALF: tl.constexpr, REST: tl.constexpr,
                  HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    """OUT = X rotated, (B, H, T, D). Program (token, batch row)."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    cos, sin = angles_of(COS, SIN, cos_strides, row, token, HALF, HALF_PAD)
    x = X + row * x_strides[0] + token * x_strides[2]
    out = OUT + row * out_strides[0] + token * out_strides[2]
    move_heads(x, out, x_strides[1], out_strides[1], cos, sin, heads, True, HALF, REST, HALF_PAD, REST_PAD, HEADS)


@triton.jit(do_not_specialize=["heads"])
def join_kernel(Q, K, V, COS, SIN, OUT, q_strides, k_strides, v_strides, cos_strides, heads, HALF: tl.constexpr,
                REST: tl.constexpr, HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    """OUT (B, T, 3, H, D) = Q and K rotated and V as it is, (B, H, T, D) each. Program (token, batch row)."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    cos, sin = angles_of(COS, SIN, cos_strides, row, token, HALF, HALF_PAD)
    D: tl.constexpr = 2 * HALF + REST
    out = OUT + (row * tl.num_programs(0) + token) * 3 * heads * D
    q = Q + row * q_strides[0] + token * q_strides[2]
    k = K + row * k_strides[0] + token * k_strides[2]
    v = V + row * v_strides[0] + token * v_strides[2]
    move_heads(q, out, q_strides[1], D, cos, sin, heads, True, HALF, REST, HALF_PAD, REST_PAD, HEADS)
    move_heads(k, out + heads * D, k_strides[1], D, cos, sin, heads, True, HALF, REST, HALF_PAD, REST_PAD, HEADS)
    move_heads(v, out + 2 * heads * D, v_strides[1], D, cos, sin, heads, False, HALF, REST, HALF_PAD, REST_PAD, HEADS)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (B, H, T, D) with a dense last dimension; cos, sin: float32, broadcastable to (B, 1, T, rotary_dim / 2).

    Returns a tensor of x's shape and dtype that lies in memory as (B, T, H, D), differentiable by x.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return Rotation.apply(x, cos, sin)
    return _rotate(x, cos, sin)


def join_rotated(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """q and k, rotated, and v as it is, (B, H, T, D) each with a dense last dimension, in one: (B, T, 3, H, D)."""
    batch, heads, tokens, dim = q.shape
    joined = q.new_empty(batch, tokens, 3, heads, dim)
    _launch(join_kernel, (q, k, v, cos, sin, joined), ())
    return joined


class Rotation(torch.autograd.Function):
    """A rotation's gradient is rotated back."""

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
    _launch(rotate_kernel, (x, cos, sin, out), (out.stride()[:3],))
    return out


def _launch(kernel, tensors: tuple[Tensor, ...], out_strides: tuple) -> None:
    """Run a kernel, whose parameters are tensors (what is rotated, cos, sin, output), strides of these, heads."""
    # Both kernels' calls differ in their number of tensors; sin lies in memory as cos does.
    kind = tensors[0].device, *[(x.dtype, x.shape, x.stride()) for x in tensors]
    if not CALLS.repeat(kind, tensors):
        CALLS.make(kind, tensors, lambda: [_launch_anew(kernel, tensors, out_strides)])


def _launch_anew(kernel, tensors: tuple[Tensor, ...], out_strides: tuple) -> Launch | None:
    *parts, cos, _, _ = tensors
    batch, heads, tokens, dim = parts[0].shape
    half = cos.shape[-1]
    rest = dim - 2 * half
    cos = cos.expand(batch, 1, tokens, half)
    constants = {
        "HALF": half,
        "REST": rest,
        "HALF_PAD": triton.next_power_of_2(half),
        "REST_PAD": triton.next_power_of_2(max(1, rest)),
        "HEADS": min(16, triton.next_power_of_2(heads)),
    }
    arguments = *(x.stride()[:3] for x in (*parts, cos)), *out_strides, heads
    return launch(kernel, (tokens, batch), tensors, range(len(tensors)), arguments, constants, {"num_warps": 4})


def serves(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the kernel can do it: on a GPU, angles alike for all heads, alike in memory and not to be learned."""
    if not x.is_cuda or x.dtype == torch.float64:
        return False
    if cos.requires_grad or sin.requires_grad or torch._C._are_functorch_transforms_active():
        return False
    shapes = x.dim() == cos.dim() == 4 and cos.shape == sin.shape and cos.shape[1] == 1
    dense = x.stride(-1) == cos.stride(-1) == sin.stride(-1) == 1 and cos.stride() == sin.stride()
    return shapes and dense and cos.dtype == torch.float32
