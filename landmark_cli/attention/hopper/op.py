"""The Hopper kernels as operators of PyTorch, beside those of the portable kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..fused.launch import empty_heads_last
from ..reference import check_shapes
from . import launch, support

# The copy engine takes addresses and strides that are multiples of this many bytes.
ALIGNMENT = 16


def landmark_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block_size: int, scale: float | None = None, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """`fused.landmark_attention` of plain blocks, where `support.why_not` and `why_not_for` have no objection.

    q: (B, H, Tq, D), k, v: (B, G, Tk, D) on a Hopper GPU in bfloat16 or float16. Gradients repeat bit by bit.

    Raises ValueError naming the argument that cannot be served.
    """
    check_shapes(q, k, v)
    reason = support.why_not(q.device.type, q.dtype, q.shape[3], block_size)
    reason = reason or support.why_not_for(q.shape[2], start=None, cu_seqlens=None, dropout_p=0.0)
    if reason is not None:
        raise ValueError(reason)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if not 0.0 < scale < float("inf"):
        raise ValueError(f"scale is {scale}; the Hopper kernels need a positive one")
    out, lse = attention(q, k, v, block_size, scale)
    return (out, lse) if return_lse else out


@torch.library.custom_op("landmark::hopper_attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, block_size: int, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) of checked arguments."""
    return launch.forward(_operand(q), _operand(k), _operand(v), block_size, scale)


@attention.register_fake
def _(q, k, v, block_size, scale):
    return empty_heads_last(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("landmark::hopper_attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from the gradients of out and lse."""
    dout, q, k, v, out = (_operand(x) for x in (dout, q, k, v, out))
    return launch.backward(dout, dlse, q, k, v, out, lse, block_size, scale)


@attention_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, block_size, scale):
    return empty_heads_last(q), empty_heads_last(k), empty_heads_last(v)


def _operand(x: Tensor) -> Tensor:
    """x as the copy engine takes it, copied only where it is not."""
    width = x.element_size()
    steps = [stride * width for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    fits = all(step > 0 and step % ALIGNMENT == 0 for step in steps)
    return (
        x
        if fits and x.stride(-1) == 1 and x.data_ptr() % ALIGNMENT == 0
        else x.clone(memory_format=torch.contiguous_format)
    )


def _setup_context(ctx, inputs, output):
    q, k, v, block_size, scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.settings = block_size, scale
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    q, k, v, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    return *attention_backward(dout, dlse, q, k, v, out, lse, *ctx.settings), None, None


attention.register_autograd(_backward, setup_context=_setup_context)
