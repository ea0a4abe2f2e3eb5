"""Launching the kernels of landmarks' own queries: the twin of what sdpa.py defines in plain PyTorch."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..common.configuration import padded, product_precision
from ..common.launch import Launch, LaunchCache, launch
from ..common.operands import operand
from ..common.tensors import empty_heads_last
from .backward import key_gradient_kernel, query_gradient_kernel
from .forward import forward_kernel

# Landmarks and keys a tile. There are few landmarks, so tiles of them are small, to fill the GPU.
ROWS, COLS = 64, 64

FORWARD_CALLS, BACKWARD_CALLS = LaunchCache(), LaunchCache()


def forward(q: Tensor, k: Tensor, v: Tensor, text: int, scale: float) -> tuple[Tensor, Tensor]:
    """See sdpa.attend_landmarks: any strides, as long as the head dim is contiguous (other inputs are copied)."""
    dtype = q.dtype
    q, k, v = (operand(x) for x in (q, k, v))
    tensors = q, k, v, empty_heads_last(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    kind = _kind(tensors[:3], text, scale)
    if not FORWARD_CALLS.repeat(kind, tensors):
        FORWARD_CALLS.make(kind, tensors, lambda: [launch_forward(tensors, text, scale)])
    return tensors[3].to(dtype), tensors[4]


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, text: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See sdpa.attend_landmarks_backward."""
    dtype = q.dtype
    delta = (dout.float() * out.float()).sum(-1).contiguous()
    dout, q, k, v = (operand(x) for x in (dout, q, k, v))
    gradients = [empty_heads_last(x) for x in (q, k, v)]
    tensors = q, k, v, dout, lse.contiguous(), delta, *gradients
    kind = _kind(tensors[:4], text, scale)
    if not BACKWARD_CALLS.repeat(kind, tensors):
        BACKWARD_CALLS.make(
            kind,
            tensors,
            lambda: [launch_query_gradient(tensors, text, scale), launch_key_gradient(tensors, text, scale)],
        )
    return tuple(x.to(dtype) for x in gradients)


def launch_forward(tensors: tuple[Tensor, ...], text: int, scale: float) -> Launch | None:
    """Launch the forward kernel."""
    q, k, v, out, _ = tensors
    batch, heads, landmarks, _ = q.shape
    programs = triton.cdiv(landmarks, ROWS), batch * heads
    arguments = *_strides(q, k, v, out), scale, landmarks, heads
    return launch(forward_kernel, programs, tensors, range(5), arguments, *_constants(q, k, text))


def launch_query_gradient(tensors: tuple[Tensor, ...], text: int, scale: float) -> Launch | None:
    """Launch the backward kernel that goes by landmarks."""
    q, k, v, dout, _, _, dq, _, _ = tensors
    batch, heads, landmarks, _ = q.shape
    programs = triton.cdiv(landmarks, ROWS), batch * heads
    arguments = *_strides(q, k, v, dout, dq), scale, landmarks, heads
    return launch(query_gradient_kernel, programs, tensors, range(7), arguments, *_constants(q, k, text))


def launch_key_gradient(tensors: tuple[Tensor, ...], text: int, scale: float) -> Launch | None:
    """Launch the backward kernel that goes by text."""
    q, k, v, dout, _, _, _, dk, dv = tensors
    batch, heads, landmarks, _ = q.shape
    programs = triton.cdiv(landmarks * text, COLS), batch * k.shape[1]
    arguments = *_strides(q, k, v, dout, dk, dv), scale, landmarks, heads, k.shape[1]
    which = 0, 1, 2, 3, 4, 5, 7, 8
    return launch(key_gradient_kernel, programs, tensors, which, arguments, *_constants(q, k, text))


def _constants(q: Tensor, k: Tensor, text: int) -> tuple[dict, dict]:
    """What the kernels are compiled for, and how they run: in more warps where the registers of four do not suffice."""
    dim = q.shape[-1]
    constants = {
        "HEADS_PER_KEY": q.shape[1] // k.shape[1],
        "TEXT": text,
        "D": dim,
        "DIM": padded(dim),
        "ROWS": ROWS,
        "COLS": COLS,
        "PRECISION": product_precision(q.dtype),
    }
    return constants, {"num_warps": 4 if dim <= 64 else 8, "num_stages": 3}


def _strides(*tensors: Tensor) -> list[tuple[int, int, int]]:
    return [x.stride()[:3] for x in tensors]


def _kind(tensors: tuple[Tensor, ...], text: int, scale: float) -> tuple:
    """All that a call's launches depend on beside addresses. tensors: q, k and what else comes with strides of its
    own."""
    q, k = tensors[:2]
    return q.dtype, q.device, product_precision(q.dtype), q.shape, k.shape, *[x.stride() for x in tensors], text, scale
