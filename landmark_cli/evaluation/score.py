"""How well tokens were predicted, as sums, and the figures that come of them."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """Sums over the predicted tokens of a text or of a part of it.

    tokens: predicted. negative_log_likelihood: their sum, in nats. correct: how many were the likeliest token.
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
    """exp of a mean loss in nats; infinite from about 709.8 on, where no float holds it (the loss still tells)."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
