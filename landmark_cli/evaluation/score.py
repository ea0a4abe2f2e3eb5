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
    targets = to_device(targets, logits.device)
    losses, correct = token_scores(logits, targets)
    return torch.stack([(targets != IGNORED_TARGET).sum().double(), losses.double().sum(), correct.sum().double()])


def token_scores(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits (..., V) of any float type, targets (...) -> (...) float32, each target's negative log-likelihood in nats,
    and (...) int32, 1 where it was the likeliest token; both 0 for targets of -100."""
    shape, logits = targets.shape, logits.flatten(0, -2)
    targets = to_device(targets.flatten(), logits.device)
    if logits.is_cuda and find_spec("triton") is not None:
        from landmark_cli.evaluation.fused_score import token_scores as fused

        losses, correct = fused(logits, targets, IGNORED_TARGET)
        return losses.view(shape), correct.view(shape)
    losses = torch.empty(len(targets), device=logits.device)
    correct = torch.empty(len(targets), dtype=torch.int32, device=logits.device)
    # Float32 logits of one piece at a time.
    size = max(1, PIECE // logits.shape[-1])
    for begin in range(0, len(targets), size):
        piece, wanted = logits[begin : begin + size], targets[begin : begin + size]
        losses[begin : begin + size] = torch.nn.functional.cross_entropy(
            piece.float(), wanted, ignore_index=IGNORED_TARGET, reduction="none"
        )
        correct[begin : begin + size] = piece.argmax(-1) == wanted
    return losses.view(shape), correct.view(shape)
