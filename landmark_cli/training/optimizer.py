"""AdamW and learning-rate schedules as pure functions of the step, so that nothing of them needs a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

SCHEDULES = ("one-cycle", "cosine", "linear", "constant")

# A one-cycle run starts at this share of its peak, as in the code of arXiv 2305.16300 (div_factor 100).
ONE_CYCLE_START = 0.01


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every step of a run.

    kind: "one-cycle" climbs from 1% of the peak along half a cosine and comes down along another; with final 0.2 it is
        the paper's (arXiv 2305.16300, section 4.1: base 0.002, warm-up 2%, last 0.0004). "cosine" and "linear" climb in
        a straight line from 0 and come down as they are named; "constant" climbs and stays.
    peak: the highest learning rate.
    steps: optimizer steps of the whole run.
    warmup: share of the steps spent climbing, 0 to 1.
    final: the last step's learning rate as a share of the peak (unused by "constant").

    Raises ValueError for a kind there is not.
    """

    kind: str
    peak: float
    steps: int
    warmup: float = 0.02
    final: float = 0.2

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"kind: there are the schedules {', '.join(SCHEDULES)}, not {self.kind!r}")

    def __call__(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.peak * (self._one_cycle(step) if self.kind == "one-cycle" else self._climb_then_fall(step))

    def _one_cycle(self, step: int) -> float:
        top, last = self.warmup * self.steps - 1, self.steps - 1
        if step <= top:
            return _half_cosine(ONE_CYCLE_START, 1.0, step / top if top > 0 else 1.0)
        top = max(top, 0.0)
        return _half_cosine(1.0, self.final, min((step - top) / (last - top), 1.0) if last > top else 1.0)

    def _climb_then_fall(self, step: int) -> float:
        climb = math.ceil(self.warmup * self.steps)
        if step < climb:
            return (step + 1) / climb
        done = min((step - climb) / max(self.steps - 1 - climb, 1), 1.0)
        if self.kind == "cosine":
            return _half_cosine(1.0, self.final, done)
        return 1.0 + (self.final - 1.0) * done if self.kind == "linear" else 1.0


def _half_cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1.0 + math.cos(math.pi * done)) / 2.0


def decayed_names(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay applies to: the matrices of linear layers.

    A head tied to the embedding is an embedding and is not decayed; nor are norms, biases and embeddings.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    linear = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in embeddings
    }
    return {name for name, parameter in model.named_parameters() if id(parameter) in linear}


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], decayed: set[str], weight_decay: float
) -> list[dict[str, object]]:
    """Split the trainable ones of (name, parameter) pairs into a decayed group and one without."""
    trained = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in trained if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(groups: list[dict[str, object]], betas: tuple[float, float], device: torch.device) -> torch.optim.AdamW:
    """AdamW over parameter groups, fused where torch can. The loop sets the learning rate before every step."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=device.type in ("cuda", "cpu"))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every group of an optimizer, wrapped by accelerate or not, this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
