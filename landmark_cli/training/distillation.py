"""Learning from a teacher: at every position of the text the student, which reads it with landmarks, is to say what the
teacher says, which reads it without.

The loss is three means over the global batch, each times its weight: of the divergence from the teacher over the
positions where it is asked, of the cross entropy over the tokens of answers, and of the cross entropy over all targets.
Each has a count of its own, so that the few tokens of answers weigh as much as the many of the text. As the loop
divides by one number, the first of the counts, the other two weights come multiplied by what their counts differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from landmark_cli.data.landmarks import IGNORED_TARGET
from landmark_cli.training.linear_distillation import distillation, linear_distillation
from landmark_cli.training.setup import LossModel
from landmark_cli.training.teachers import Teacher

# What a record of metrics.jsonl says of the three parts.
PARTS = ("divergence", "answers_loss", "text_loss")


@dataclass(frozen=True)
class Distillation:
    """How a run learns from its teacher.

    name: what the user calls the teacher. landmark_token_id: what the student's streams hold and the teacher does not
    read. answer_weight, text_weight: of the cross entropy of answers, and of all targets, beside the divergence.
    temperature: of both softmaxes (see `linear_distillation.distillation`).
    """

    teacher: Teacher
    name: str
    landmark_token_id: int
    answer_weight: float = 1.0
    text_weight: float = 0.0
    temperature: float = 1.0

    @property
    def identity(self) -> dict[str, Any]:
        """What must stay the same for a run to be resumed exactly."""
        return {
            "teacher": self.name,
            "answer_weight": self.answer_weight,
            "text_weight": self.text_weight,
            "distill_temperature": self.temperature,
        }

    def said(self, text_length: int) -> str:
        """For people. text_length: text tokens of a window."""
        length = self.teacher.length
        who = "the model as it was" if self.name == "self" else self.name
        within = length is None or text_length <= length
        reach = "" if within else f", which is asked about the first {length} tokens of each window's text"
        return f"teacher: {who}{reach}; answers weigh {self.answer_weight:g}, text {self.text_weight:g}"

    def read(self, input_ids: Tensor, cu_seqlens: Tensor | None = None) -> Text:
        """The texts of streams, (B, T), as the teacher reads them: no further than its positions."""
        landmark = input_ids == self.landmark_token_id
        width = self._width(input_ids)
        # Text first, in its order. What is left over at the end stands behind all text, which does not see it.
        order = landmark.to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        tokens = input_ids.masked_fill(landmark, 0).gather(1, order)
        position_ids = None
        if cu_seqlens is not None:
            begins = torch.zeros(input_ids.numel() + 1, dtype=torch.int64, device=input_ids.device)
            begins.index_fill_(0, cu_seqlens.long(), 1)
            document = begins[:-1].cumsum(0).view(input_ids.shape).gather(1, order)
            # A document that begins one position further than the one before it has ended is read as a text of its own.
            position_ids = torch.arange(width, device=input_ids.device) + document - document[:, :1]
        return Text(tokens, position_ids, *self._places(input_ids, width))

    def _places(self, input_ids: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """(index, known) of `Text`."""
        is_text = input_ids != self.landmark_token_id
        index = is_text.cumsum(1) - 1
        return index.clamp(0, width - 1), is_text & (index < width)

    def _width(self, input_ids: Tensor) -> int:
        return min(input_ids.shape[1], self.teacher.length or input_ids.shape[1])

    def counts(self, batch: dict[str, Tensor]) -> Tensor:
        """Over how many positions of a batch each of the three means goes: (3,) float32."""
        known = batch["labels"] != IGNORED_TARGET
        answers = known & batch["answers"] if "answers" in batch else torch.zeros_like(known)
        # The teacher is asked where there is text that it has positions for, and something that follows it.
        _, is_text = self._places(batch["input_ids"], self._width(batch["input_ids"]))
        return torch.stack([mask.sum() for mask in (is_text & known, answers, known)]).float()

    def ratios(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """counts: (3,), of the global batch. Returns (what the summed loss is to be divided by, what an answer's and
        any target's cross entropy is to be multiplied by before, (2,))."""
        weights = counts.new_tensor((self.answer_weight, self.text_weight))
        counts = counts.clamp(min=1)
        return counts[0], weights * counts[0] / counts[1:]


@dataclass(frozen=True)
class Text:
    """tokens: (B, n) int64. position_ids: (B, n), or None for 0, 1, ... index: (B, T), for each position of the stream
    which of the n it is, some number where `known`, (B, T) bool, says that it is none."""

    tokens: Tensor
    position_ids: Tensor | None
    index: Tensor
    known: Tensor

    def align(self, values: Tensor) -> Tensor:
        """What the teacher gave for its n tokens, (B, n, E), at the stream's positions, (B, T, E)."""
        return values.gather(1, self.index[..., None].expand(-1, -1, values.shape[-1]))


class DistillationLoss(LossModel):
    """A causal language model as its summed loss beside a teacher; in evaluation the loss of `LossModel`."""

    def __init__(self, model: nn.Module, distillation: Distillation, *settings: Any) -> None:
        super().__init__(model, *settings)
        self.distillation = distillation

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        answers: Tensor | None = None,
        ratios: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **others: Tensor,
    ) -> Tensor:
        """In training (4,) float32: the loss, which alone is differentiable, and the sums of divergences, of answers'
        and of all targets' cross entropies.

        ratios: see `Distillation.ratios`. The rest: see `LossModel.forward`.
        """
        if not self.training:
            return super().forward(input_ids, labels, answers=answers, cu_seqlens=cu_seqlens, **others)
        of, teacher = self.distillation, self.distillation.teacher
        text = of.read(input_ids, cu_seqlens)
        known = labels != IGNORED_TARGET
        answers = torch.zeros_like(known) if answers is None else answers & known
        weights = (text.known & known).float()
        target_weights = ratios[0] * answers + ratios[1] * known
        extra = self.extra(input_ids, cu_seqlens=cu_seqlens, **others)
        if self.fused_loss and teacher.plain:
            states = text.align(teacher.states(text.tokens, text.position_ids))
            hidden, head = self.states(input_ids, extra)
            given = (hidden, head, states, teacher.head)
            loss, divergences, losses = linear_distillation(*given, labels, weights, target_weights, of.temperature)
        else:
            teacher_logits = text.align(teacher.logits(text.tokens, text.position_ids))
            logits = self.wrapped(input_ids=input_ids, use_cache=False, **extra).logits
            given = (logits, teacher_logits)
            loss, divergences, losses = distillation(*given, labels, weights, target_weights, of.temperature)
        sums = torch.stack([divergences.sum(), losses.masked_fill(~answers, 0.0).sum(), losses.sum()])
        return torch.cat([loss[None], sums])
