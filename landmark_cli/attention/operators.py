"""Landmark attention as operators of PyTorch: to autograd, torch.compile, checkpointing and FSDP they are like any.

An operator takes the name of the backend that was chosen; backends/ says how each goes forward and backward.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from .operator_library import define_attention
from .reference import check_joint


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    backend: str,
    block_size: int,
    scale: float | None = None,
    start: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    joint: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The twin of `reference.landmark_attention` in the kernels of a backend that can serve: values and gradients.

    q: (B, H, Tq, D), k, v: (B, G, Tk, D); who calls has checked these three. Any strides, as long as the head dim is
    contiguous (other inputs are copied). scale, softcap: positive. The random numbers of group dropout are the
    definition's; a dropout_seed that is a tensor compiles once for all seeds. Products of float32 are as exact as
    PyTorch is told that they have to be.

    The output (B, H, Tq, D) lies in memory as (B, Tq, H, D). The log-sum-exp can be differentiated too, and sinks have
    a gradient. Gradients repeat bit by bit; their workspace is at most 1.6 times the memory of q, in the Hopper kernels
    or 128 MiB if that is more. Those of "sdpa" on a GPU repeat so where torch.use_deterministic_algorithms(True) asks
    for it, for which they are left to the Triton kernels, and take some ten times the memory of q.

    Raises ValueError naming an argument that cannot be.
    """
    if not torch.compiler.is_compiling():
        refuse_transforms(q, k, v)
    scale = check_scale(scale, q)
    softcap = check_softcap(softcap)
    check_sinks(sinks, q)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; it must be in [0, 1)")
    if dropout_p > 0.0 and dropout_seed is None:
        raise ValueError("dropout_p needs dropout_seed, so that backward can repeat its random numbers")
    if joint:
        check_joint(dropout_p, None)
    start = _bounds("start", start, q, (q.shape[0],))
    cu_seqlens = _bounds("cu_seqlens", cu_seqlens, q, None)
    if start is not None and cu_seqlens is not None:
        raise ValueError("start and cu_seqlens exclude each other: packed rows have no padding")
    if cu_seqlens is not None and q.shape[0] != 1:
        raise ValueError(f"cu_seqlens packs documents into one row, but q has {q.shape[0]} rows")
    seed = seed_tensor(dropout_seed, q.device) if dropout_p > 0.0 else None
    out, lse = attention(q, k, v, sinks, block_size, scale, start, cu_seqlens, dropout_p, seed, softcap, joint, backend)
    return (out, lse) if return_lse else out


def check_scale(scale: float | None, q: Tensor) -> float:
    """The factor on the logits, by default 1 / sqrt(D). Raises ValueError where it is not positive."""
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; the kernels need a positive one")
    return scale


def check_softcap(softcap: float | None) -> float | None:
    """The bound of the logits, None for none. Raises ValueError where it is not positive."""
    softcap = None if softcap is None else float(softcap)
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap}; the kernels need a positive one, or None")
    return softcap


def check_sinks(sinks: Tensor | None, q: Tensor) -> None:
    """Raises ValueError where sinks are not one a query head, on the device of q."""
    if sinks is not None and (sinks.shape != q.shape[1:2] or not sinks.is_floating_point()):
        raise ValueError(f"sinks is {sinks.dtype} of shape {tuple(sinks.shape)}; it must be one logit for each head")
    if sinks is not None and sinks.device != q.device:
        raise ValueError(f"sinks is on {sinks.device} and q on {q.device}")


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
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


attention, attention_backward = define_attention(
    "attention",
    "int block_size, float scale, Tensor? start, Tensor? cu_seqlens, float dropout_p, Tensor? dropout_seed, "
    "float? softcap, bool joint, str backend",
    "forward",
    "backward",
    differentiable_lse=True,
)


def refuse_transforms(q: Tensor, k: Tensor, v: Tensor) -> None:
    if torch._C._are_functorch_transforms_active() or any(unpack_dual(x).tangent is not None for x in (q, k, v)):
        raise NotImplementedError(
            "landmark attention has no rules for torch.func (vmap, grad, jvp) nor for forward-mode differentiation: "
            "use torch.autograd, or LANDMARK_ATTENTION=eager"
        )
