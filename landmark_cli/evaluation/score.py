"""How well tokens were predicted, as sums, and the figures that come of these sums."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from landmark_cli.data.landmarks import IGNORED_TARGET
from landmark_cli.models.device import to_device

# Most logits that are in float32 at a time.
PIECE = 1 << 24


@dataclass(frozen=True)
class Score:
    """Sums over the predicted tokens of a text or of a part of it.

    tokens: how many were predicted. negative_log_likelihood: the sum over them, in nats. correct: how many of them were
    the likeliest token.
    """

    tokens: int
    negative_log_likelihood: float
    correct: int

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood in nats; nan where nothing was predicted."""
        return self.negative_log_likelihood / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where no float holds it."""
        return perplexity_of(self.loss)

    @property
    def accuracy(self) -> float:
        """The share of tokens that were the likeliest; nan where nothing was predicted."""
        return self.correct / self.tokens if self.tokens else math.nan


def perplexity_of(loss: float) -> float:
    """exp of a mean loss in nats; infinite from about 709.8 on, where no float holds the result (the loss is finite
    still)."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def score(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (B, W, V) of any float type, targets (B, W) -> (3,) float64: tokens, their summed negative log-likelihood,
    how many were the likeliest. Targets of -100 do not count."""
    logits, targets = logits.flatten(0, -2), to_device(targets.flatten(), logits.device)
    if logits.is_cuda and find_spec("triton") is not None:
        from landmark_cli.evaluation.fused_score import score as fused_score

        return fused_score(logits, targets, IGNORED_TARGET)
    sums = torch.zeros(3, dtype=torch.float64, device=logits.device)
    # Float32 logits of one piece at a time.
    size = max(1, PIECE // logits.shape[-1])
    for piece, wanted in zip(logits.split(size), targets.split(size), strict=True):
        losses = torch.nn.functional.cross_entropy(piece.float(), wanted, ignore_index=IGNORED_TARGET, reduction="none")
        sums[0] += (wanted != IGNORED_TARGET).sum()
        sums[1] += losses.double().sum()
        sums[2] += (piece.argmax(-1) == wanted).sum()
    return sums
