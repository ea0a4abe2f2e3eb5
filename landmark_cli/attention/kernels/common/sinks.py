"""The gradient of attention sinks."""

from __future__ import annotations

import torch
from torch import Tensor


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """The gradient of the sinks, (H,), from what the first backward kernel leaves of each query, its delta: a sink's
    logit has the gradient -outer delta. lse, delta: (B, H, Tq)."""
    share = torch.exp(sinks.float()[:, None] - lse)
    return (share * delta).sum((0, 2)).neg().to(sinks.dtype)
