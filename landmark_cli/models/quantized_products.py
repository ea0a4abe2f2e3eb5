"""Products with quantized weights, by device: torch's own on a CPU, those of Humming (of the vLLM project) on a GPU.

A product is made of codes and keeps them in the order that its kernels read. It takes rows (n, K) and gives (n, N),
both in the model's dtype. Humming compiles a kernel for each shape, and for each of the BUCKETS of rows, when it is
first used (seconds), and keeps it in a cache on the disk. Nothing waits for the GPU, and a call can be recorded as a
graph.
"""

from __future__ import annotations

import bisect
import json
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from landmark_cli.errors import UsageError, import_extra

if TYPE_CHECKING:
    from .quantization import Codes

HALVES = (torch.float16, torch.bfloat16)
# Rows up to which torch's kernel for 8 bits on a CPU is faster than a product with the weight as it is decoded.
FEW_ROWS = 32
# Rows that a kernel of Humming's is chosen for: decoding first, then chunks.
BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
# What Humming's tiles divide evenly; shapes in between are padded.
TILE = 128


class CpuProduct(nn.Module):
    """On a CPU. Few rows are multiplied in bfloat16, in which alone torch's kernels are fast; many, as reading a text
    has, in the model's dtype, with the weight as it is decoded. In 4 bits torch's kernel does many rows too: it alone
    knows the order in which it keeps codes."""

    def __init__(self, codes: Codes, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.bits = dtype, codes.bits
        if codes.bits == 8:
            self.register_buffer("codes", codes.codes)
            self.register_buffer("scales", codes.scales.squeeze(1))
            return
        self.group = codes.group
        self.register_buffer("codes", torch._convert_weight_to_int4pack_for_cpu(codes.codes.to(torch.int32) + 8, 1))
        scales = codes.scales.t()
        self.register_buffer("scales", torch.stack([scales, torch.zeros_like(scales)], -1).contiguous())

    @staticmethod
    def check(device: torch.device, dtype: str | torch.dtype) -> None:
        """All of them can be had."""

    @staticmethod
    def scale_dtype(dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16

    def forward(self, rows: Tensor) -> Tensor:
        if self.bits == 4:
            half = rows.to(torch.bfloat16)
            return torch._weight_int4pack_mm_for_cpu(half, self.codes, self.group, self.scales).to(rows.dtype)
        if len(rows) <= FEW_ROWS:
            half = rows.to(torch.bfloat16)
            return torch._weight_int8pack_mm(half, self.codes, self.scales).to(rows.dtype)
        # The scale of a row of the weight is that of a column of what comes out.
        return F.linear(rows, self.codes.to(rows.dtype)) * self.scales.to(rows.dtype)


class HummingProduct(nn.Module):
    """On an NVIDIA GPU."""

    def __init__(self, codes: Codes, dtype: torch.dtype):
        super().__init__()
        from humming.layer import HummingLayer

        out_features, in_features = codes.codes.shape
        self.chosen: dict[int, str] = {}
        device = codes.codes.device
        with torch.cuda.device(device), device:
            self.layer = HummingLayer(
                shape_n=out_features,
                shape_k=in_features,
                weight_config={"dtype": f"uint{codes.bits}", "group_size": 0 if codes.bits == 8 else codes.group},
                pad_n_to_multiple=TILE,
                pad_k_to_multiple=TILE,
                torch_dtype=dtype,
            )
            self.layer.load_from_tensors({"weight": packed(codes), "weight_scale": codes.scales})
            self.layer.transform()

    @staticmethod
    def check(device: torch.device, dtype: str | torch.dtype) -> None:
        """Raise UsageError for a dtype without products, LandmarkError where the package is missing."""
        import_extra("humming", "quantization")
        if dtype not in ("auto", "float16", "bfloat16", *HALVES):
            found = str(dtype).removeprefix("torch.")
            raise UsageError(
                f"--quantization with weights in {found}: on a GPU the products are in 16 bits; give --dtype bfloat16"
            )

    @staticmethod
    def scale_dtype(dtype: torch.dtype) -> torch.dtype:
        return dtype

    def forward(self, rows: Tensor) -> Tensor:
        return self.layer(rows.contiguous(), tuning_config=self._kernel(len(rows)))

    def _kernel(self, rows: int) -> str:
        """Humming's choice of a kernel for so many rows, or a few more."""
        bucket = BUCKETS[min(bisect.bisect_left(BUCKETS, rows), len(BUCKETS) - 1)]
        if bucket not in self.chosen:
            from humming.tune import get_heuristics_config

            device = self.layer.weight.device
            chosen: dict[str, Any] = get_heuristics_config(self.layer.humming_config, shape_m=bucket, device=device)
            self.chosen[bucket] = json.dumps(chosen)
        return self.chosen[bucket]


def packed(codes: Codes) -> Tensor:
    """Codes counted from 0, the first in the lowest bits: (N, K * bits / 32) int32."""
    unsigned = (codes.codes.to(torch.int16) + (1 << codes.bits - 1)).to(torch.uint8)
    if codes.bits == 4:
        unsigned = unsigned[:, ::2] | unsigned[:, 1::2] << 4
    return unsigned.contiguous().view(torch.int32)


class JoinedProduct(nn.Module):
    """Products of layers of the same input, as one, which is made when the first of them asks and kept for the others.

    product: with the weights (n_i, K), one behind another. sizes: n_i. x (..., K) -> of each layer (..., n_i), in x's
    dtype; those of several layers are views of one tensor.
    """

    def __init__(self, product: CpuProduct | HummingProduct, sizes: Sequence[int]):
        super().__init__()
        self.product, self.sizes = product, list(sizes)
        # What the layers were asked for last, and what they give.
        self._held: tuple[weakref.ref[Tensor], int, Sequence[Tensor]] | None = None

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        y = self.product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        return y.split(self.sizes, dim=-1)

    def part(self, x: Tensor, place: int) -> Tensor:
        """What one of the layers gives. Layers that are asked in their order, of one tensor that nobody has written to
        in between, share a product."""
        if len(self.sizes) == 1 or x.is_inference():
            return self(x)[place]
        held, self._held = self._held, None
        if held is None or held[0]() is not x or held[1] != x._version:
            held = weakref.ref(x), x._version, self(x)
        if place + 1 < len(self.sizes):
            self._held = held
        return held[2][place]

    def __getstate__(self) -> dict[str, Any]:
        """For copies, and what is written to a file: what is held is of this one's inputs."""
        return vars(self) | {"_held": None}


PRODUCTS = {"cpu": CpuProduct, "cuda": HummingProduct}


def product_class(device: torch.device) -> type[CpuProduct] | type[HummingProduct]:
    """The product of a device. Raises UsageError where it has none."""
    if device.type not in PRODUCTS:
        raise UsageError(f"--quantization: there are products for {' and '.join(PRODUCTS)}, and none for {device.type}")
    return PRODUCTS[device.type]
