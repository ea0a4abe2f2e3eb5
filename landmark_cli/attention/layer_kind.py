"""What of a layer its attention has to know and is not told in the call: where it has landmarks, and how it rotates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

# How positions enter queries and keys: by rotating half-split pairs of dimensions, adjacent pairs, or not at all.
Turns = Literal["halves", "pairs", "none"]


@dataclass(frozen=True)
class LayerKind:
    """Set on a layer's attention module by models/layers.py; a module without one is as the defaults say.

    local: the layer keeps its sliding window, and has no landmarks. turns: how positions enter. rotary, angles: the
    module that has the layer's angle per position, and the name of that buffer: moved and cast as the model is.
    """

    local: bool = False
    turns: Turns = "halves"
    rotary: Any = None
    angles: str = "inv_freq"

    @property
    def frequencies(self) -> Tensor | None:
        """(rotary_dim / 2,) angle per position; None in a layer without positions."""
        return None if self.turns == "none" else getattr(self.rotary, self.angles)

    def half_split(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Queries and keys, (B, H, T, D), with the pairs that are rotated together half-split. What was adjacent is
        put in another order, the same for both, which changes no product."""
        if self.turns != "pairs":
            return tensors
        rotated = 2 * self.frequencies.shape[-1]
        return tuple(half_split(x, rotated) for x in tensors)


def half_split(x: Tensor, rotated: int) -> Tensor:
    """The first `rotated` dimensions of x, (..., D), in another order: the first of each adjacent pair, then the
    second of each."""
    return torch.cat([x[..., 0:rotated:2], x[..., 1:rotated:2], x[..., rotated:]], dim=-1)


def is_first(module: nn.Module) -> bool:
    """Whether an attention module is the first layer's. torch.compile keeps what is compiled for one number of a layer
    from all others: a module may say this one thing alone, as `landmark_first`."""
    known = getattr(module, "landmark_first", None)
    return module.layer_idx == 0 if known is None else known


def kind_of(module: nn.Module) -> LayerKind:
    """What was set on a layer's attention module."""
    return getattr(module, "landmark_kind", None) or LayerKind()
