"""Landmark attention as operators of PyTorch: to autograd, torch.compile, checkpointing and FSDP they are like any."""

import math

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from ...reference import check_shapes
from ..common.configuration import INTERPRETED
from ..common.tensors import empty_heads_last
from ..hopper import support
from .launch import Layout, backward, forward

MAX_HEAD_DIM = 256
MAX_BLOCK_SIZE = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    start: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    hopper: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The fused twin of `landmark_cli.attention.reference.landmark_attention`: same arguments, values and gradients.

    q: (B, H, Tq, D), k, v: (B, G, Tk, D) on an NVIDIA GPU in bfloat16, float16 or float32; D a multiple of 8 up to 256;
    block_size 2 to 256; scale positive. Any strides, as long as the head dim is contiguous (other inputs are copied).
    The random numbers of group dropout are the definition's; a dropout_seed that is a tensor compiles once for all
    seeds. Under autocast q, k and v are cast to its dtype; float32 follows torch.set_float32_matmul_precision.

    The output (B, H, Tq, D) lies in memory as (B, Tq, H, D). The log-sum-exp is differentiable too. Gradients repeat
    bit by bit; their workspace is at most 1.6 times the memory of q. hopper: run the Hopper kernels, where
    `hopper.support` has no objection.

    Raises ValueError naming the argument that cannot be served.
    """
    if not torch.compiler.is_compiling():
        _refuse_transforms(q, k, v)
    if q.device.type in ("cuda", "cpu") and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    check_shapes(q, k, v)
    if hopper:
        reason = support.why_not(str(q.device), q.dtype, q.shape[3], block_size)
        reason = reason or support.why_not_for(q.shape[2], start, cu_seqlens, dropout_p)
    else:
        reason = why_not(q.device.type, q.dtype, q.shape[3], block_size)
    if reason is not None:
        raise ValueError(reason)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; the fused kernels need a positive one")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; it must be in [0, 1)")
    if dropout_p > 0.0 and dropout_seed is None:
        raise ValueError("dropout_p needs dropout_seed, so that backward can repeat its random numbers")
    start = _bounds("start", start, q, (q.shape[0],))
    cu_seqlens = _bounds("cu_seqlens", cu_seqlens, q, None)
    if start is not None and cu_seqlens is not None:
        raise ValueError("start and cu_seqlens exclude each other: packed rows have no padding")
    if cu_seqlens is not None and q.shape[0] != 1:
        raise ValueError(f"cu_seqlens packs documents into one row, but q has {q.shape[0]} rows")
    seed = _seed(dropout_seed, q.device) if dropout_p > 0.0 else None
    out, lse = attention(q, k, v, block_size, scale, start, cu_seqlens, dropout_p, seed, hopper)
    return (out, lse) if return_lse else out


def why_not(device: str, dtype: torch.dtype, head_dim: int, block_size: int) -> str | None:
    """Why the fused kernels cannot serve, naming the argument and what is allowed; None if they can."""
    if device != "cuda" and not (device == "cpu" and INTERPRETED):
        return f"q is on {device}; the fused kernels need an NVIDIA GPU"
    if dtype not in DTYPES:
        return f"q is {dtype}; the fused kernels take {', '.join(map(str, DTYPES))}"
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        return f"q has head dim {head_dim}; the fused kernels take multiples of 8 up to {MAX_HEAD_DIM}"
    if not 2 <= block_size <= MAX_BLOCK_SIZE:
        return f"block_size is {block_size}; the fused kernels take 2 to {MAX_BLOCK_SIZE}"
    return None


def _seed(seed: int | Tensor, device: torch.device) -> Tensor:
    """The seed as one signed 64-bit number on the device."""
    if isinstance(seed, int):
        seed = torch.tensor((seed + (1 << 63)) % (1 << 64) - (1 << 63))
    return seed.reshape(()).to(device=device, dtype=torch.int64)


def _bounds(name: str, bounds: Tensor | None, q: Tensor, shape: tuple[int, ...] | None) -> Tensor | None:
    if bounds is None:
        return None
    if bounds.is_floating_point() or bounds.dim() != 1 or bounds.numel() == 0:
        raise ValueError(f"{name} is a row of integers; found {bounds.dtype} of shape {tuple(bounds.shape)}")
    if shape is not None and tuple(bounds.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(bounds.shape)}; it must be {shape}, one number a row of q")
    return bounds.to(device=q.device, dtype=torch.int32)


# Defined by schemas and with autograd's part written out: torch.library.custom_op and register_autograd, which are
# simpler to write, take the host three times as long for each call.
LIBRARY = torch.library.Library("landmark", "FRAGMENT")
_SETTINGS = (
    "int block_size, float scale, Tensor? start, Tensor? cu_seqlens, float dropout_p, Tensor? dropout_seed, bool hopper"
)
LIBRARY.define(
    f"attention(Tensor q, Tensor k, Tensor v, {_SETTINGS}) -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag
)
LIBRARY.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
attention = torch.ops.landmark.attention.default
attention_backward = torch.ops.landmark.attention_backward.default


@torch.library.impl(LIBRARY, "attention", "CompositeExplicitAutograd")
def _(q, k, v, block_size, scale, start, cu_seqlens, dropout_p, dropout_seed, hopper):
    """(out, lse) of checked arguments."""
    found = support.run(lambda: _hopper().forward(q, k, v, block_size, scale)) if hopper else None
    if found is not None:
        return found
    layout = Layout(block_size, scale, start, cu_seqlens, dropout_p, dropout_seed)
    out, lse = forward(_operand(q), _operand(k), _operand(v), layout)
    return out.to(q.dtype), lse


@torch.library.register_fake("landmark::attention", lib=LIBRARY)
def _(q, k, v, block_size, scale, start, cu_seqlens, dropout_p, dropout_seed, hopper):
    return empty_heads_last(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.impl(LIBRARY, "attention_backward", "CompositeExplicitAutograd")
def _(dout, dlse, q, k, v, out, lse, block_size, scale, start, cu_seqlens, dropout_p, dropout_seed, hopper):
    """(dq, dk, dv) from the gradients of out and lse."""
    given = dout, dlse, q, k, v, out, lse, block_size, scale
    found = support.run(lambda: _hopper().backward(*given)) if hopper else None
    if found is not None:
        return found
    layout = Layout(block_size, scale, start, cu_seqlens, dropout_p, dropout_seed)
    dlse = None if dlse is None else dlse.contiguous()
    dtype = q.dtype
    dout, q, k, v, out = (_operand(x) for x in (dout, q, k, v, out))
    dq, dk, dv = backward(dout, dlse, q, k, v, out, lse.contiguous(), layout)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


@torch.library.register_fake("landmark::attention_backward", lib=LIBRARY)
def _(dout, dlse, q, k, v, out, lse, block_size, scale, start, cu_seqlens, dropout_p, dropout_seed, hopper):
    return empty_heads_last(q), empty_heads_last(k), empty_heads_last(v)


def _hopper():
    """The Hopper kernels, imported where they are wanted: not every Triton has their language."""
    from ..hopper import launch

    return launch


def _operand(x: Tensor) -> Tensor:
    """x with a contiguous head dim, copied only where it is not; in float32 for Triton's interpreter if bfloat16."""
    if x.dtype == torch.bfloat16 and INTERPRETED:
        x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


class Attention(torch.autograd.Function):
    """What autograd keeps between the two operators."""

    @staticmethod
    def forward(ctx, *inputs):
        q, k, v, block_size, scale, start, cu_seqlens, dropout_p, dropout_seed, hopper = inputs
        with torch._C._AutoDispatchBelowAutograd():
            output = attention(*inputs)
        ctx.save_for_backward(q, k, v, *output, start, cu_seqlens, dropout_seed)
        ctx.settings = block_size, scale, dropout_p, hopper
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, start, cu_seqlens, dropout_seed = ctx.saved_tensors
        block_size, scale, dropout_p, hopper = ctx.settings
        dout = torch.zeros_like(out) if dout is None else dout
        settings = block_size, scale, start, cu_seqlens, dropout_p, dropout_seed, hopper
        return *attention_backward(dout, dlse, q, k, v, out, lse, *settings), *(None,) * 7


@torch.library.impl(LIBRARY, "attention", "Autograd")
def _(*inputs):
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs[:3]):
        return Attention.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return attention(*inputs)


class AttentionBackward(torch.autograd.Function):
    """Tells who asks for second derivatives that there are none."""

    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return attention_backward(*inputs)

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError("fused landmark attention has no second derivatives: use LANDMARK_ATTENTION=eager")


@torch.library.impl(LIBRARY, "attention_backward", "Autograd")
def _(*inputs):
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return AttentionBackward.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return attention_backward(*inputs)


def _refuse_transforms(q: Tensor, k: Tensor, v: Tensor) -> None:
    if torch._C._are_functorch_transforms_active() or any(unpack_dual(x).tangent is not None for x in (q, k, v)):
        raise NotImplementedError(
            "landmark attention has no rules for torch.func (vmap, grad, jvp) nor for forward-mode differentiation: "
            "use torch.autograd, or LANDMARK_ATTENTION=eager"
        )
