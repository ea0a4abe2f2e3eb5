"""Products of one to four rows with a weight in 8 or 4 bits, which is read once, as a stream, in the order in which
Humming keeps it for products of more rows.

A library's kernels for matrices take some microseconds of every product beside reading the weight, and a step has a
hundred products. What `Packed` says of the order is looked up in what Humming has made (see quantized_products.py):
where a version of it keeps another order, its own kernels are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from landmark_cli.attention.kernels.common.dependent import dependent_launch, let_next_begin, wait_for_previous
from landmark_cli.attention.kernels.common.launch import on_device

if TYPE_CHECKING:
    from .quantization import Codes

MOST_ROWS = 4
# Output features of a program.
BLOCK = tl.constexpr(64)
# Programs that keep a GPU reading.
ENOUGH_PROGRAMS = 512
# Of a float32 whose last bits then count as a whole number.
EXPONENT_23 = 0x4B000000


class Packed(NamedTuple):
    """A weight (N, K), N a multiple of 64 and K of 32, in Humming's order.

    codes: int32 words. In 4 bits [K / 16][N / 64][32][4]: word (k, n, t, j) holds the codes of output features
    64 n + 16 j + 8 a + t // 4 and input features 16 k + 8 b + 2 (t % 4) + c in its nibble 4 c + 2 a + b, counted from 0
    on. In 8 bits [K / 16][N / 64][32][8]: those of 64 n + 8 j + t // 4 and 16 k + 8 b + 2 (t % 4) + c in its byte
    2 c + b, below 0 as the complement of what lies above -1.
    scales: in 4 bits (K / 32, N), a block of 64 as [8][8], transposed; in 8 bits (1, N), each 32 as [4][4][2],
    the first two transposed.
    out_features, in_features: without what is padded.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    out_features: int
    in_features: int

    @property
    def depth(self) -> int:
        """K."""
        return self.codes.shape[0] * 16

    @property
    def width(self) -> int:
        """N."""
        return self.codes.shape[1] * 2 // self.bits


def in_order(codes: Codes) -> Packed:
    """Codes as `Packed` describes it."""
    width, depth, bits = *codes.codes.shape, codes.bits
    unsigned = codes.codes.int() + (1 << bits - 1)
    if bits == 8:
        unsigned = torch.where(unsigned >= 128, unsigned - 128, 255 - unsigned)
    # (k, n, t // 4, t % 4, j, a, b, c), where in 8 bits j and a are one.
    apart = unsigned.view(width // 64, 4, 2, 8, depth // 16, 2, 4, 2).permute(4, 0, 3, 6, 1, 2, 5, 7)
    # What is to be in one word, by place in it: nibbles (c, a, b), bytes (c, b).
    order = (0, 1, 2, 3, 4, 7, 5, 6) if bits == 4 else (0, 1, 2, 3, 4, 5, 7, 6)
    places = torch.arange(0, 32, bits, device=unsigned.device)
    words = (apart.permute(order).reshape(depth // 16, -1, 32 // bits) << places).sum(-1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    scales = codes.scales.t()
    blocks = scales.reshape(-1, 8, 8) if bits == 4 else scales.reshape(-1, 4, 4, 2)
    return Packed(words, blocks.transpose(1, 2).reshape(scales.shape), bits, width, depth)


class Split(NamedTuple):
    """splits: programs that share a block's input features; groups: of 32 (16 in 8 bits), read at a time."""

    splits: int
    groups: int
    warps: int = 4


@triton.jit
def unpacked_pair(pair, dtype: tl.constexpr):
    """The two 16-bit numbers of int32 words, in float32."""
    if dtype == tl.bfloat16:
        return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
    else:
        low = (pair & 65535).to(tl.int16).to(dtype, bitcast=True)
        return low.to(tl.float32), (pair >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def nibble_products(x, words, exponent, NIBBLE: tl.constexpr):
    """x (G, 32) times the codes in a nibble of words (G, 32, 4), less 8. A nibble becomes a number where it stands: as
    the last bits of a float32 of exponent 23, if it stands low enough."""
    AT: tl.constexpr = 4 * NIBBLE if NIBBLE < 5 else 4 * NIBBLE - 12
    words = words if NIBBLE < 5 else words >> 12
    code = ((words & (15 << AT)) | exponent).to(tl.float32, bitcast=True) - (8388608.0 + (8 << AT))
    return (x * (1.0 / (1 << AT)))[:, :, None] * code


@triton.jit
def sums_of_4_bits(X, CODES, SCALES, block, split, x_stride, width, in_features, exponent, K: tl.constexpr,
                   ROWS: tl.constexpr, SPLITS: tl.constexpr, GROUPS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Of each of ROWS rows of X (ROWS, in_features) its products with a block of 64 rows of W (width, K), by the input
    features of a split: (64,) sums in float32. CODES and SCALES: W as `Packed` says, int32 words. The first codes are
    on their way before the kernel that makes X has ended."""
    COUNT: tl.constexpr = K // 32
    EACH: tl.constexpr = (COUNT + SPLITS - 1) // SPLITS
    lane, word, group = tl.arange(0, 32), tl.arange(0, 4), tl.arange(0, GROUPS)
    first = split * EACH
    stop = tl.minimum(first + EACH, COUNT)
    row = 2 * width  # words of 16 input features
    codes = CODES + first.to(tl.int64) * 2 * row + block * (2 * BLOCK)
    codes += group[:, None, None] * (2 * row) + lane[None, :, None] * 4 + word[None, None, :]  # (GROUPS, 32, 4)
    scales = SCALES + first.to(tl.int64) * (width // 2) + block * (BLOCK // 2)
    scales += group[:, None, None] * (width // 2) + (lane // 4)[None, :, None] * 4 + word[None, None, :]
    ok = (first + group < stop)[:, None, None]
    one = tl.load(codes, mask=ok, other=0, eviction_policy="evict_first")
    two = tl.load(codes + row, mask=ok, other=0, eviction_policy="evict_first")
    pair = tl.load(scales, mask=ok, other=0, eviction_policy="evict_first")
    let_next_begin(PDL)
    wait_for_previous(PDL)
    evens = (tl.zeros([GROUPS, 32, 4], tl.float32),) * ROWS
    odds = (tl.zeros([GROUPS, 32, 4], tl.float32),) * ROWS
    for begin in range(first, first + EACH, GROUPS):
        halves = (one, two)
        even_scale, odd_scale = unpacked_pair(pair, X.dtype.element_ty)
        codes += GROUPS * 2 * row
        scales += GROUPS * (width // 2)
        ok = (begin + GROUPS + group < stop)[:, None, None]
        one = tl.load(codes, mask=ok, other=0, eviction_policy="evict_first")
        two = tl.load(codes + row, mask=ok, other=0, eviction_policy="evict_first")
        pair = tl.load(scales, mask=ok, other=0, eviction_policy="evict_first")
        feature = (begin + group)[:, None] * 32 + (lane % 4)[None, :] * 2  # (GROUPS, 32)
        real = (begin + group < stop)[:, None]
        new_evens = ()
        new_odds = ()
        for r in tl.static_range(ROWS):
            even = tl.zeros([GROUPS, 32, 4], tl.float32)
            odd = tl.zeros([GROUPS, 32, 4], tl.float32)
            for half in tl.static_range(2):
                for part in tl.static_range(4):
                    at = feature + (16 * half + 8 * (part % 2) + part // 2)
                    x = tl.load(X + r * x_stride + at, mask=real & (at < in_features), other=0.0).to(tl.float32)
                    even += nibble_products(x, halves[half], exponent, part // 2 * 4 + part % 2)
                    odd += nibble_products(x, halves[half], exponent, part // 2 * 4 + part % 2 + 2)
            new_evens = new_evens + (evens[r] + even * even_scale,)
            new_odds = new_odds + (odds[r] + odd * odd_scale,)
        evens = new_evens
        odds = new_odds
    found = ()
    for r in tl.static_range(ROWS):
        even = tl.sum(tl.reshape(tl.sum(evens[r], 0), [8, 4, 4]), 1)  # (8, 4), as odd
        odd = tl.sum(tl.reshape(tl.sum(odds[r], 0), [8, 4, 4]), 1)
        found = found + (tl.reshape(tl.permute(tl.join(even, odd), (1, 2, 0)), [BLOCK]),)
    return found


@triton.jit
def sums_of_8_bits(X, CODES, SCALES, block, split, x_stride, width, in_features, K: tl.constexpr, ROWS: tl.constexpr,
                   SPLITS: tl.constexpr, GROUPS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """The same in 8 bits; SCALES (width,) as they are."""
    COUNT: tl.constexpr = K // 16
    EACH: tl.constexpr = (COUNT + SPLITS - 1) // SPLITS
    lane, word, group = tl.arange(0, 32), tl.arange(0, 8), tl.arange(0, GROUPS)
    first = split * EACH
    stop = tl.minimum(first + EACH, COUNT)
    row = 4 * width  # words of 16 input features
    codes = CODES + first.to(tl.int64) * row + block * (4 * BLOCK)
    codes += group[:, None, None] * row + lane[None, :, None] * 8 + word[None, None, :]  # (GROUPS, 32, 8)
    following = tl.load(codes, mask=(first + group < stop)[:, None, None], other=0, eviction_policy="evict_first")
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index % 32
    scale = tl.load(SCALES + index - inside + inside % 8 // 2 * 8 + inside // 8 * 2 + inside % 2).to(tl.float32)
    let_next_begin(PDL)
    wait_for_previous(PDL)
    sums = (tl.zeros([GROUPS, 32, 8], tl.float32),) * ROWS
    for begin in range(first, first + EACH, GROUPS):
        # As numbers of 8 bits.
        words = following ^ (((following >> 7) & 0x01010101) * 127)
        codes += GROUPS * row
        ok = (begin + GROUPS + group < stop)[:, None, None]
        following = tl.load(codes, mask=ok, other=0, eviction_policy="evict_first")
        feature = (begin + group)[:, None] * 16 + (lane % 4)[None, :] * 2  # (GROUPS, 32)
        new = ()
        for r in tl.static_range(ROWS):
            total = sums[r]
            for part in tl.static_range(4):
                at = feature + (8 * (part % 2) + part // 2)
                x = tl.load(X + r * x_stride + at, mask=at < in_features, other=0.0).to(tl.float32)
                total += x[:, :, None] * ((words << 24 - 8 * part) >> 24).to(tl.float32)
            new = new + (total,)
        sums = new
    found = ()
    for r in tl.static_range(ROWS):
        total = tl.sum(tl.reshape(tl.sum(sums[r], 0), [8, 4, 8]), 1)  # (8, 8)
        found = found + (tl.reshape(tl.trans(total), [BLOCK]) * scale,)
    return found


@triton.jit
def block_sums(X, CODES, SCALES, block, split, x_stride, width, in_features, exponent, K: tl.constexpr,
               ROWS: tl.constexpr, SPLITS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
               PDL: tl.constexpr):  # fmt: skip
    """What the two above give."""
    if BITS == 4:
        return sums_of_4_bits(X, CODES, SCALES, block, split, x_stride, width, in_features, exponent, K, ROWS, SPLITS,
                              GROUPS, PDL)  # fmt: skip
    else:
        return sums_of_8_bits(X, CODES, SCALES, block, split, x_stride, width, in_features, K, ROWS, SPLITS, GROUPS,
                              PDL)  # fmt: skip


@triton.jit
def store_row(OUT, sums, r: tl.constexpr, index, columns, ROWS: tl.constexpr, GATED: tl.constexpr):
    """A row's sums into OUT (ROWS, columns), or silu of it times the sums that follow those of all rows."""
    dtype = OUT.dtype.element_ty
    out = sums[r].to(dtype)
    if GATED:
        gate = out.to(tl.float32)
        gate = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        out = (gate * sums[ROWS + r].to(dtype).to(tl.float32)).to(dtype)
    tl.store(OUT + r * columns + index, out, mask=index < columns)


@triton.jit(do_not_specialize=["exponent"])
def code_products_kernel(X, CODES, SCALES, PARTS, ARRIVED, OUT, x_stride, width, columns, in_features, exponent,
                         K: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, GROUPS: tl.constexpr,
                         BITS: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """OUT (ROWS, columns) = X W^T or, GATED, silu(X GATE^T) * (X UP^T), where W is GATE (columns, K) and UP.

    Program (block of 64 columns, split of the input features). The program of a block that comes last adds up what all
    splits have left in PARTS (SPLITS, ROWS or twice as many, width), in their order, and leaves the count in ARRIVED
    (blocks,) at 0. Other arguments: see sums_of_4_bits.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    sums = block_sums(X, CODES, SCALES, block, split, x_stride, width, in_features, exponent, K, ROWS, SPLITS, GROUPS,
                      BITS, PDL)  # fmt: skip
    if GATED:
        sums = sums + block_sums(X, CODES, SCALES, block + columns // BLOCK, split, x_stride, width, in_features,
                                 exponent, K, ROWS, SPLITS, GROUPS, BITS, PDL)  # fmt: skip
    index = block * BLOCK + tl.arange(0, BLOCK)  # (64,)
    if SPLITS == 1:
        for r in tl.static_range(ROWS):
            store_row(OUT, sums, r, index, columns, ROWS, GATED)
    else:
        for i in tl.static_range(len(sums)):
            tl.store(PARTS + (split * len(sums) + i) * width + index, sums[i])
        tl.debug_barrier()
        if tl.atomic_add(ARRIVED + block, 1, sem="acq_rel") == SPLITS - 1:
            tl.debug_barrier()
            totals = ()
            for i in tl.static_range(len(sums)):
                total = tl.zeros([BLOCK], tl.float32)
                for part in tl.static_range(SPLITS):
                    total += tl.load(PARTS + (part * len(sums) + i) * width + index, cache_modifier=".cg")
                totals = totals + (total,)
            for r in tl.static_range(ROWS):
                store_row(OUT, totals, r, index, columns, ROWS, GATED)
            tl.store(ARRIVED + block, 0)


def split_for(packed: Packed, gated: bool = False) -> Split:
    """So many programs that a GPU is kept reading, each with a few reads of its own."""
    groups, count = 4, packed.depth // (32 if packed.bits == 4 else 16)
    blocks = packed.width // (128 if gated else 64)
    return Split(max(1, min(triton.next_power_of_2(triton.cdiv(ENOUGH_PROGRAMS, blocks)), count // groups)), groups)


def products(rows: Tensor, packed: Packed, arrived: Tensor, split: Split | None = None) -> Tensor:
    """rows (n, in_features), n up to MOST_ROWS, times a weight: (n, out_features) in their dtype, of sums in float32.
    arrived: (N / 64,) int32 zeros, which are that again when all is done."""
    return _launch(rows, packed, arrived, split, False)


def gated_products(rows: Tensor, packed: Packed, arrived: Tensor, split: Split | None = None) -> Tensor:
    """`gated` (see step_operations.py) of the two halves of the products, (n, out_features / 2); `gates` says of which
    weights."""
    return _launch(rows, packed, arrived, split, True)


def gates(packed: Packed) -> bool:
    """Whether both halves of a weight begin where a program's block does."""
    return packed.out_features % (2 * BLOCK.value) == 0


def _launch(rows: Tensor, packed: Packed, arrived: Tensor, split: Split | None, gated: bool) -> Tensor:
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    split = split or split_for(packed, gated)
    columns = packed.out_features // 2 if gated else packed.out_features
    out, sums = rows.new_empty(len(rows), columns), len(rows) * (1 + gated)
    parts = rows.new_empty(split.splits, sums, packed.width, dtype=torch.float32) if split.splits > 1 else None
    scales = packed.scales.view(torch.int32) if packed.bits == 4 else packed.scales
    with on_device(rows):
        code_products_kernel[(triton.cdiv(columns, BLOCK.value), split.splits)](
            rows, packed.codes, scales, parts, arrived, out, rows.stride(0), packed.width, columns, packed.in_features,
            EXPONENT_23, K=packed.depth, ROWS=len(rows), SPLITS=split.splits, GROUPS=split.groups, BITS=packed.bits,
            GATED=gated, num_warps=split.warps, **dependent_launch(rows),
        )  # fmt: skip
    return out
