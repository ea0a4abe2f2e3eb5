"""The twins of step_operations.py, a kernel each: same roundings, no gradients. Rows are tokens, of a step or chunk."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from landmark_cli.attention.kernels.common.dependent import announcing, let_next_begin
from landmark_cli.attention.kernels.common.launch import on_device

from .known_layers import Activation

# Of a row of gated: a program's columns.
COLUMNS = 1024
# Heads that a program rotates, at most, and tokens from which on it rotates more than one.
MOST_HEADS, CHUNK_ROWS = 4, 512


@triton.jit
def weighted(x, weight, dtype: tl.constexpr, CENTERED: tl.constexpr):
    """x, float32 and of the size 1, times a norm's weight, rounded where transformers rounds: in dtype."""
    if CENTERED:
        return (x * (1.0 + weight.to(tl.float32))).to(dtype)
    else:
        return (weight.to(tl.float32) * x.to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def normed(x, weight, eps, width: tl.constexpr, dtype: tl.constexpr, CENTERED: tl.constexpr):
    """The norm of a row, x and weight (N_PAD,) with zeros behind its width."""
    x = x.to(tl.float32)
    return weighted(x * tl.rsqrt(tl.sum(x * x, 0) / width + eps), weight, dtype, CENTERED)


@triton.jit
def angles_kernel(POSITIONS, FREQUENCIES, COS, SIN, scaling, HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    """COS and SIN (rows, 2 * HALF), dense, of POSITIONS (rows,) and FREQUENCIES (HALF,). Program (row)."""
    row = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, HALF_PAD)  # (HALF_PAD,), as all below
    mask = dim < HALF
    angle = tl.load(POSITIONS + row).to(tl.float32) * tl.load(FREQUENCIES + dim, mask=mask, other=0.0).to(tl.float32)
    dtype = COS.dtype.element_ty
    cos, sin = (tl.cos(angle) * scaling).to(dtype), (tl.sin(angle) * scaling).to(dtype)
    at = row * 2 * HALF + dim
    tl.store(COS + at, cos, mask=mask)
    tl.store(COS + at + HALF, cos, mask=mask)
    tl.store(SIN + at, sin, mask=mask)
    tl.store(SIN + at + HALF, sin, mask=mask)


@triton.jit
def add_norm_kernel(X, ADDED, AFTER, WEIGHT, TOTAL, OUT, after_eps, eps, N: tl.constexpr, N_PAD: tl.constexpr,
                    CENTERED: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Rows (n, N), dense. ADDED and TOTAL: None where nothing is added. AFTER: (N,) weight of the norm of what is
    added, or None. Program (row)."""
    let_next_begin(PDL)
    column = tl.arange(0, N_PAD)  # (N_PAD,), as all below
    at = tl.program_id(0).to(tl.int64) * N + column
    mask = column < N
    x = tl.load(X + at, mask=mask, other=0.0)
    weight = tl.load(WEIGHT + column, mask=mask, other=0.0)
    if ADDED is not None:
        added = tl.load(ADDED + at, mask=mask, other=0.0)
        if AFTER is not None:
            after = tl.load(AFTER + column, mask=mask, other=0.0)
            added = normed(added, after, after_eps, N, OUT.dtype.element_ty, CENTERED)
        x = (x.to(tl.float32) + added.to(tl.float32)).to(OUT.dtype.element_ty)
        tl.store(TOTAL + at, x, mask=mask)
    tl.store(OUT + at, normed(x, weight, eps, N, OUT.dtype.element_ty, CENTERED), mask=mask)


# Chunks of any length are read by kernels that are compiled once.
@triton.jit(do_not_specialize=["tokens"])
def rotate_heads_kernel(Q, K, COS, SIN, Q_WEIGHT, K_WEIGHT, q_strides, k_strides, cos_strides, tokens, heads, key_heads,
                        eps, D: tl.constexpr, HALF_PAD: tl.constexpr, HEADS: tl.constexpr,
                        CENTERED: tl.constexpr):  # fmt: skip
    """Q (B, T, H, D) and K (B, T, G, D) in place. Program (token of a row, HEADS heads: those of Q, then those of
    K)."""
    row = tl.program_id(0).to(tl.int64)
    batch_row, token = row // tokens, row % tokens
    angles = batch_row * cos_strides[0] + token * cos_strides[1]
    first = tl.program_id(1) * HEADS
    behind = tl.cdiv(heads, HEADS) * HEADS
    if first < behind:
        at = batch_row * q_strides[0] + token * q_strides[1]
        _rotate_heads(Q + at, q_strides[2], first, heads, COS + angles, SIN + angles, Q_WEIGHT, eps, D, HALF_PAD, HEADS,
                      CENTERED)  # fmt: skip
    else:
        at = batch_row * k_strides[0] + token * k_strides[1]
        _rotate_heads(K + at, k_strides[2], first - behind, key_heads, COS + angles, SIN + angles, K_WEIGHT, eps, D,
                      HALF_PAD, HEADS, CENTERED)  # fmt: skip


@triton.jit
def _rotate_heads(X, stride, first, heads, COS, SIN, WEIGHT, eps, D: tl.constexpr, HALF_PAD: tl.constexpr,
                  HEADS: tl.constexpr, CENTERED: tl.constexpr):  # fmt: skip
    """HEADS heads of a token in place: normed, where WEIGHT is given, and rotated; the products are rounded before they
    are added. stride: from head to head."""
    HALF: tl.constexpr = D // 2
    dtype = X.dtype.element_ty
    head = first + tl.arange(0, HEADS)[:, None]  # (HEADS, 1)
    dim = tl.arange(0, HALF_PAD)[None, :]  # (1, HALF_PAD), as weight, cos and sin
    of_half = dim < HALF
    mask = (head < heads) & of_half  # (HEADS, HALF_PAD), as at and what is loaded from there
    at = X + head.to(tl.int64) * stride + dim
    one = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    two = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    if WEIGHT is not None:
        scale = tl.rsqrt((tl.sum(one * one, 1) + tl.sum(two * two, 1)) / D + eps)[:, None]
        weight = tl.load(WEIGHT + dim, mask=of_half, other=0.0)
        one = weighted(one * scale, weight, dtype, CENTERED).to(tl.float32)
        weight = tl.load(WEIGHT + HALF + dim, mask=of_half, other=0.0)
        two = weighted(two * scale, weight, dtype, CENTERED).to(tl.float32)
    cos = tl.load(COS + dim, mask=of_half, other=0.0).to(tl.float32)
    sin = tl.load(SIN + dim, mask=of_half, other=0.0).to(tl.float32)
    first_half = (one * cos).to(dtype).to(tl.float32) - (two * sin).to(dtype).to(tl.float32)
    cos = tl.load(COS + HALF + dim, mask=of_half, other=0.0).to(tl.float32)
    sin = tl.load(SIN + HALF + dim, mask=of_half, other=0.0).to(tl.float32)
    second_half = (two * cos).to(dtype).to(tl.float32) + (one * sin).to(dtype).to(tl.float32)
    tl.store(at, first_half.to(dtype), mask=mask)
    tl.store(at + HALF, second_half.to(dtype), mask=mask)


@triton.jit
def gated_kernel(GATE, UP, OUT, gate_stride, up_stride, N: tl.constexpr, COLS: tl.constexpr, GELU: tl.constexpr,
                 PDL: tl.constexpr):  # fmt: skip
    """Rows (n, N); strides from row to row, OUT dense. GELU: that, by tanh, of the gate, instead of silu. Program (row,
    tile of COLS columns)."""
    let_next_begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)  # (COLS,), as all below
    mask = column < N
    gate = tl.load(GATE + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(UP + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    # gelu by tanh is silu of something else: (1 + tanh(x)) / 2 = 1 / (1 + exp(-2 x)).
    x = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate) if GELU else gate
    gate = (gate / (1.0 + tl.exp(-x))).to(OUT.dtype.element_ty).to(tl.float32)
    tl.store(OUT + row * N + column, (gate * up).to(OUT.dtype.element_ty), mask=mask)


def add_norm(
    x: Tensor,
    added: Tensor | None,
    weight: Tensor,
    eps: float,
    after: tuple[Tensor, float] | None = None,
    centered: bool = False,
) -> tuple[Tensor, Tensor]:
    x, added = x.contiguous(), None if added is None else added.contiguous()
    out, total, width = torch.empty_like(x), None if added is None else torch.empty_like(x), x.shape[-1]
    pad, (after, after_eps) = triton.next_power_of_2(width), after or (None, 0.0)
    with on_device(x):
        add_norm_kernel[(x.numel() // width,)](
            x, added, after, weight, total, out, after_eps, eps, N=width, N_PAD=pad, CENTERED=centered,
            num_warps=max(1, min(16, pad // 512)), **announcing(x),
        )  # fmt: skip
    return x if total is None else total, out


def angles(positions: Tensor, frequencies: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    positions, half = positions.contiguous(), len(frequencies)
    cos, sin = (torch.empty(*positions.shape, 2 * half, dtype=dtype, device=positions.device) for _ in range(2))
    with on_device(positions):
        angles_kernel[(positions.numel(),)](
            positions, frequencies, cos, sin, float(scaling), HALF=half, HALF_PAD=triton.next_power_of_2(half),
            num_warps=1,
        )  # fmt: skip
    return cos, sin


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
    batch, tokens, heads, dim = q.shape
    cos, sin = (x.expand(batch, tokens, dim).contiguous() for x in (cos, sin))
    rows, key_heads = batch * tokens, k.shape[2]
    # In a chunk there are programs enough, and a token's angles are loaded once for some heads.
    at_once = min(MOST_HEADS, triton.next_power_of_2(heads)) if rows >= CHUNK_ROWS else 1
    groups = triton.cdiv(heads, at_once) + triton.cdiv(key_heads, at_once)
    with on_device(q):
        rotate_heads_kernel[(rows, groups)](
            q, k, cos, sin, q_weight, k_weight, q.stride()[:3], k.stride()[:3], cos.stride()[:2], tokens, heads,
            key_heads, eps, D=dim, HALF_PAD=triton.next_power_of_2(dim // 2), HEADS=at_once, CENTERED=centered,
            num_warps=1,
            # Else a product of 16-bit numbers and the sum it goes into become one instruction, which does not round it.
            enable_fp_fusion=False,
        )  # fmt: skip
    return q, k


def gated(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    width = gate.shape[-1]
    gate, up = gate.flatten(0, -2), up.flatten(0, -2)
    with on_device(gate):
        gated_kernel[(gate.shape[0], triton.cdiv(width, COLUMNS))](
            gate, up, out, gate.stride(0), up.stride(0), N=width, COLS=COLUMNS, GELU=activation == "gelu_tanh",
            **announcing(gate),
        )  # fmt: skip
    return out
