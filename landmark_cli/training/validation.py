"""What a model in training makes of the windows that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from landmark_cli.console import figure
from landmark_cli.data.landmarks import IGNORED_TARGET
from landmark_cli.evaluation.score import Score, perplexity_of

NO_ANSWERS = Score(0, 0.0, 0)


class ValidationWindows(Protocol):
    """What is read: a number of windows, any of them on request (see data.batches.SequentialWindows)."""

    def __len__(self) -> int: ...

    def batch(self, start: int, stop: int) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Means:
    """Over some windows. loss: over their targets. divergence: of the model from its teacher, over the positions where
    that is asked; None without a teacher."""

    loss: float
    divergence: float | None = None

    def record(self, name: str) -> dict[str, float]:
        record = {f"{name}_loss": self.loss, f"{name}_perplexity": perplexity_of(self.loss)}
        return record if self.divergence is None else record | {f"{name}_divergence": self.divergence}

    def __str__(self) -> str:
        said = f"loss {self.loss:.4f}, perplexity {figure(perplexity_of(self.loss), '.2f')}"
        return said if self.divergence is None else f"{said}, divergence {self.divergence:.4f}"


@dataclass(frozen=True)
class Validation:
    """whole: of all windows. prose: of those of corpora that mark no answers, where others do; else None. answers: of
    the tokens of answers alone."""

    whole: Means
    prose: Means | None = None
    answers: Score = NO_ANSWERS

    @property
    def record(self) -> dict[str, float]:
        """What metrics.jsonl has of it."""
        record = self.whole.record("validation")
        if self.prose is not None:
            record |= self.prose.record("validation_prose")
        if self.answers.tokens:
            record |= {
                "validation_answers_loss": self.answers.loss,
                "validation_answers_right": self.answers.accuracy,
                "validation_answers_tokens": self.answers.tokens,
            }
        return record

    def __str__(self) -> str:
        said = f"validation {self.whole}"
        if self.prose is not None:
            said += f"; of prose, {self.prose}"
        if self.answers.tokens:
            said += f"; of answers, loss {self.answers.loss:.4f}, {self.answers.accuracy:.1%} of tokens right"
        return said


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    module: nn.Module,
    validation: Sequence[ValidationWindows],
    rows: int,
    teacher: bool,
) -> Validation:
    """All windows, read by a prepared LossModel; the same for any number of processes. Every process calls it.

    rows: of a process's batch. teacher: whether the model is a DistillationLoss.
    """
    # Of windows without answers, and of those with some: loss, targets, divergences, positions; summed.
    sums, of_answers = torch.zeros(2, 4, device=accelerator.device), []
    module.eval()
    for windows in validation:
        for begin in range(0, len(windows), rows * accelerator.num_processes):
            start = begin + accelerator.process_index * rows
            # The last batch begins earlier, to be a full one; its rows that were counted before get no targets.
            first = max(min(start, len(windows) - rows), 0)
            batch = windows.batch(first, first + rows)
            batch["labels"][: start - first] = IGNORED_TARGET
            batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
            marked = "answers" in batch
            found = module(**batch).reshape(-1)
            sums[int(marked), 0] += found[0]
            sums[int(marked), 1] += (batch["labels"] != IGNORED_TARGET).sum()
            if teacher:
                sums[int(marked), 2:] += found[-2:]
            if marked:
                of_answers.append(found[1:4])
    module.train()
    plain, marked = accelerator.reduce(sums, "sum").tolist()
    whole = means([a + b for a, b in zip(plain, marked, strict=True)], teacher)
    if not of_answers:
        return Validation(whole)
    tokens, loss, right = accelerator.reduce(torch.stack(of_answers).sum(0), "sum").tolist()
    prose = means(plain, teacher) if plain[1] else None
    return Validation(whole, prose, Score(int(tokens), loss, int(right)))


def means(sums: Sequence[float], teacher: bool) -> Means:
    """sums: of losses, over so many targets; of divergences, over so many positions."""
    loss, targets, divergences, positions = sums
    return Means(loss / max(targets, 1.0), divergences / max(positions, 1.0) if teacher else None)
