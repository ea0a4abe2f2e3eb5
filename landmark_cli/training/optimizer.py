"""AdamW and learning-rate schedules as pure functions of the step, so that no checkpoint has to hold schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SCHEDULES = ("one-cycle", "cosine", "linear", "constant")

# A one-cycle run starts at this share of its peak, as in the code of arXiv 2305.16300 (div_factor 100).
ONE_CYCLE_START = 0.01
RATES_AT_A_TIME = 4096


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every step of a run.

    kind: "one-cycle" climbs from 1% of the peak along half a cosine and comes down along another; with final 0.2 this
    is
        the paper's schedule (arXiv 2305.16300, section 4.1: base 0.002, warm-up 2%, last 0.0004). "cosine" and "linear"
        climb in a straight line from 0 and come down as their names say; "constant" climbs and stays.
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


class AdamW(torch.optim.AdamW):
    """AdamW that can be told on the device which learning rate its next step has, and whether that step counts."""

    _rate: Tensor | None = None
    _skip: Tensor | None = None

    def prepare_step(self, rate: Tensor, skip: Tensor) -> None:
        """Say how the next step is to be done, and only the next. rate: its learning rate, a scalar. skip: a scalar, 1
        where the step is to leave the weights and all that the optimizer keeps as they are, else 0."""
        self._rate, self._skip = rate, skip

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step, as `prepare_step` said, or by the groups' learning rates where nothing was said."""
        rate, self._rate, skip, self._skip = self._rate, None, self._skip, None
        if rate is None:
            return super().step(closure)
        if not self.defaults["fused"]:
            # Only fused kernels look at found_inf by themselves.
            if bool(skip):
                return None
            rate = float(rate)
        kept = [group["lr"] for group in self.param_groups]
        set_learning_rate(self, rate)
        # A scaler of fp16 gradients has put what it found there, and takes it away afterwards.
        scaled = getattr(self, "found_inf", None)
        if self.defaults["fused"]:
            self.found_inf = skip if scaled is None else torch.maximum(scaled, skip)
        try:
            return super().step(closure)
        finally:
            for group, before in zip(self.param_groups, kept, strict=True):
                group["lr"] = before
            if scaled is None:
                self.__dict__.pop("found_inf", None)


class Rates:
    """The learning rates of a schedule on a device, looked up by how many steps counted, which only the device
    knows."""

    def __init__(self, schedule: Schedule, device: torch.device) -> None:
        self.schedule, self.device = schedule, device
        self._first, self._table = 0, None

    def at(self, step: int, skipped: Tensor) -> Tensor:
        """The rate of the step that comes after `step`, of which `skipped` (a whole number on the device) did not
        count: a scalar tensor."""
        if self._table is None or not self._first <= step < self._first + RATES_AT_A_TIME:
            # Steps as far apart as this: waiting for the device costs nothing.
            self._first = step - int(skipped)
            rates = [self.schedule(self._first + number) for number in range(RATES_AT_A_TIME)]
            # The precision of the kernel that reads the rate.
            dtype = torch.float32 if self.device.type == "cuda" else torch.float64
            self._table = torch.tensor(rates, dtype=dtype, device=self.device)
        return self._table.index_select(0, (step - self._first - skipped).view(1)).squeeze(0)


def adamw(groups: list[dict[str, object]], betas: tuple[float, float], device: torch.device) -> AdamW:
    """AdamW over parameter groups, fused where torch can. The loop says the learning rate before every step."""
    return AdamW(groups, lr=0.0, betas=betas, fused=device.type in ("cuda", "cpu"))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float | Tensor) -> None:
    """Give every group of an optimizer, wrapped by accelerate or not, this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
