"""Launching the kernels of landmarks' own queries: the twin of what sdpa.py defines in plain PyTorch."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..common.configuration import padded, product_precision
from ..common.launch import on_device
from ..common.operands import operand
from ..common.tensors import empty_heads_last
from .backward import key_gradient_kernel, query_gradient_kernel
from .forward import forward_kernel

# Landmarks and keys a tile. There are few landmarks, so tiles of them are small, to fill the GPU.
ROWS, COLS = 64, 64


def forward(q: Tensor, k: Tensor, v: Tensor, text: int, scale: float) -> tuple[Tensor, Tensor]:
    """See sdpa.attend_landmarks: any strides, as long as the head dim is contiguous (other inputs are copied)."""
    dtype = q.dtype
    q, k, v = (operand(x) for x in (q, k, v))
    batch, heads, landmarks, _ = q.shape
    out, lse = empty_heads_last(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    with on_device(q):
        forward_kernel[triton.cdiv(landmarks, ROWS), batch * heads](
            q, k, v, out, lse, *_strides(q, k, v, out), scale, landmarks, heads, **_constants(q, k, text)
        )
    return out.to(dtype), lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, text: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See sdpa.attend_landmarks_backward."""
    dtype = q.dtype
    delta = (dout.float() * out.float()).sum(-1).contiguous()
    dout, q, k, v = (operand(x) for x in (dout, q, k, v))
    batch, heads, landmarks, _ = q.shape
    lse = lse.contiguous()
    dq, dk, dv = empty_heads_last(q), empty_heads_last(k), empty_heads_last(v)
    given, constants = (q, k, v, dout), _constants(q, k, text)
    with on_device(q):
        query_gradient_kernel[triton.cdiv(landmarks, ROWS), batch * heads](
            *given, lse, delta, dq, *_strides(*given, dq), scale, landmarks, heads, **constants
        )
        key_gradient_kernel[triton.cdiv(landmarks * text, COLS), batch * k.shape[1]](
            *given, lse, delta, dk, dv, *_strides(*given, dk, dv), scale, landmarks, heads, k.shape[1],
            **constants,
        )  # fmt: skip
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _constants(q: Tensor, k: Tensor, text: int) -> dict:
    """What the kernels are compiled for, and how they run: in more warps where the registers of four do not suffice."""
    dim = q.shape[-1]
    return {
        "HEADS_PER_KEY": q.shape[1] // k.shape[1],
        "TEXT": text,
        "D": dim,
        "DIM": padded(dim),
        "ROWS": ROWS,
        "COLS": COLS,
        "PRECISION": product_precision(q.dtype),
        "num_warps": 4 if dim <= 64 else 8,
        "num_stages": 3,
    }


def _strides(*tensors: Tensor) -> list[tuple[int, int, int]]:
    return [x.stride()[:3] for x in tensors]
