"""The shapes on which attention in training is measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from timing import GPU
from torch import Tensor

DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16
PHASES = "forward", "backward"


@dataclass(frozen=True)
class Shape:
    """One row of the table. targets, hopper_targets: least speed (forward, backward) of the portable and of the Hopper
    kernels, against FA2, or against themselves on `beside` if there is one.

    beside: a shape that is timed with it in the same rounds; speeds are then compared per FLOP.
    """

    batch: int
    heads: int
    tokens: int
    dim: int
    block: int = 64
    key_heads: int = 0
    targets: tuple[float, float] = (0.0, 0.0)
    hopper_targets: tuple[float, float] = (0.0, 0.0)
    beside: Shape | None = None

    def __str__(self) -> str:
        heads = f"H{self.heads}" + (f" on {self.key_heads}" if self.key_heads else "")
        return f"B{self.batch} {heads} T{self.tokens} D{self.dim} block {self.block}"

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.heads // (self.key_heads or self.heads)

    def flops(self, phase: str) -> float:
        return 2 * self.batch * self.heads * self.tokens**2 * self.dim * {"forward": 1.0, "backward": 2.5}[phase]

    def tensors(self) -> list[Tensor]:
        """Fresh q, k, v and dout, in memory as a model has them."""
        heads = self.heads, self.key_heads or self.heads, self.key_heads or self.heads, self.heads
        found = [torch.randn(self.batch, self.tokens, n, self.dim, dtype=DTYPE, device=DEVICE) for n in heads]
        *leaves, dout = (x.transpose(1, 2) for x in found)
        return [x.requires_grad_() for x in leaves] + [dout]


def shapes() -> list[Shape]:
    """The tables' rows."""
    wide = Shape(4, 32, 2048, 128), Shape(2, 32, 4096, 128), Shape(1, 32, 8192, 128), Shape(1, 32, 16384, 128)
    found = [
        replace(shape, targets=(1.15, 1.05), hopper_targets=(1.5, 1.4) if shape.tokens == 2048 else (1.7, 1.35))
        for shape in wide
    ]
    found.append(Shape(4, 16, 4096, 64, targets=(1.2, 1.1), hopper_targets=(1.3, 1.25)))
    found.append(Shape(16, 8, 512, 128, targets=(1.25, 1.3), hopper_targets=(1.4, 1.3)))
    for shape, tokens in zip(wide, (2040, 4080, 8160), strict=False):
        both = {"targets": (0.8, 0.8), "hopper_targets": (0.8, 0.8)}
        found.append(replace(shape, tokens=tokens, block=51, beside=shape, **both))
    found.append(replace(wide[2], key_heads=8, targets=(1.0, 1.0), hopper_targets=(1.0, 1.0), beside=wide[2]))
    # SmolLM2-135M's, as it is distilled.
    found.append(Shape(4, 9, 8192, 64, key_heads=3))
    return found


TOY_SHAPES = [
    Shape(1, 2, 64, 16, 16, targets=(1.0, 1.0)),
    Shape(1, 4, 60, 16, 15, targets=(0.8, 0.8), beside=Shape(1, 4, 64, 16, 16)),
    Shape(1, 4, 64, 16, 16, key_heads=2, targets=(1.0, 1.0), beside=Shape(1, 4, 64, 16, 16)),
]
