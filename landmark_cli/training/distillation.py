"""Learning from a teacher: at every position of the text the student, which reads it with landmarks, is to say what the
teacher says, which reads it without.

The loss is means over the global batch, each times its weight: of the divergence from the teacher over the positions
where it is asked, of the same over those that predict answers, of the cross entropy over the tokens of answers, of the
cross entropy over all targets, of the gate's loss over sampled queries (gate.py), and, where the divergence is asked,
of how far the layers' outputs are apart (hidden_states.py). Each has a count of its own, so that the few tokens of
answers weigh as much as the many of the text. As the loop divides by one number, the first of the counts, the other
weights come multiplied by what their counts differ.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from landmark_cli.data.landmarks import IGNORED_TARGET
from landmark_cli.models.layers import landmark_layers
from landmark_cli.training.compiled import decoder_layers
from landmark_cli.training.gate import Gate
from landmark_cli.training.gate_queries import Sample, sample
from landmark_cli.training.hidden_states import collected, hidden_states_loss
from landmark_cli.training.linear_distillation import distillation, linear_distillation
from landmark_cli.training.setup import LossModel, with_score, without_adapters
from landmark_cli.training.teachers import Teacher

# What a record of metrics.jsonl says of the parts.
PARTS = ("divergence", "answers_divergence", "answers_loss", "text_loss", "gate", "hidden_states")


@dataclass(frozen=True)
class Distillation:
    """How a run learns from its teacher.

    name: what the user calls the teacher. landmark_token_id: what the student's streams hold and the teacher does not
    read. answer_weight, text_weight: of the cross entropy of answers, and of all targets, beside the divergence.
    answer_divergence_weight: of the divergence where answers are predicted, beside what it counts among the text.
    temperature: of both softmaxes (see `linear_distillation.distillation`). gate_weight: of the gate's loss, in blocks
    of block_size stream tokens; 0: it is not worked out. joint: whether the student's landmarks only choose blocks
    (softmax.py). chunk: stream tokens of a chunk, where windows are read chunk by chunk, which with a gate's loss only
    joint ones are. hidden_weight: of the hidden states' loss; 0: it is not worked out. needs_answers: whether some
    corpus has to mark answers, since somebody chose what they weigh.
    """

    teacher: Teacher
    name: str
    landmark_token_id: int
    answer_weight: float = 1.0
    answer_divergence_weight: float = 0.0
    text_weight: float = 0.0
    temperature: float = 1.0
    gate_weight: float = 0.0
    block_size: int = 0
    joint: bool = False
    chunk: int | None = None
    hidden_weight: float = 0.0
    needs_answers: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """What must stay the same for a run to be resumed exactly."""
        identity = {
            "teacher": self.name,
            "answer_weight": self.answer_weight,
            "text_weight": self.text_weight,
            "distill_temperature": self.temperature,
        }
        # Runs of earlier versions had none of them.
        later = {
            "answer_divergence_weight": self.answer_divergence_weight,
            "gate_weight": self.gate_weight,
            "hidden_weight": self.hidden_weight,
        }
        return identity | {name: weight for name, weight in later.items() if weight}

    def said(self, text_length: int) -> str:
        """For people. text_length: text tokens of a window."""
        length = self.teacher.length
        who = "the model as it was" if self.name == "self" else self.name
        within = length is None or text_length <= length
        reach = "" if within else f", which is asked about the first {length} tokens of each window's text"
        gate = f", the gate {self.gate_weight:g}" if self.gate_weight else ""
        hidden = f", hidden states {self.hidden_weight:g}" if self.hidden_weight else ""
        answers = f"answers weigh {self.answer_weight:g}, their divergence {self.answer_divergence_weight:g}"
        return f"teacher: {who}{reach}; {answers}, text {self.text_weight:g}{gate}{hidden}"

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
        return Text(tokens, position_ids, *self._places(input_ids, width), order)

    def _places(self, input_ids: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """(index, known) of `Text`."""
        is_text = input_ids != self.landmark_token_id
        index = is_text.cumsum(1) - 1
        return index.clamp(0, width - 1), is_text & (index < width)

    def _width(self, input_ids: Tensor) -> int:
        return min(input_ids.shape[1], self.teacher.length or input_ids.shape[1])

    def asked(
        self,
        input_ids: Tensor,
        labels: Tensor,
        answers: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **others: Tensor,
    ) -> Asked:
        """What is asked of a micro-batch; see `DistillationLoss.forward`."""
        known = labels != IGNORED_TARGET
        answers = torch.zeros_like(known) if answers is None else answers & known
        text = self.read(input_ids, cu_seqlens)
        queries = self.sample(text, input_ids, known, answers, cu_seqlens) if self.gate_weight else None
        return Asked(text, known, answers, queries)

    def counts(self, asked: Asked) -> Tensor:
        """Over how many positions of a micro-batch each of the means goes, in the order of PARTS: (6,) float32."""
        known, answers, none = asked.known, asked.answers, torch.zeros_like(asked.known)
        # The teacher is asked where there is text that it has positions for, and something that follows it.
        of_teacher = asked.text.known & known
        queries = none if asked.queries is None else asked.queries.real
        hidden = of_teacher if self.hidden_weight else none
        masks = (of_teacher, of_teacher & answers, answers, known, queries, hidden)
        return torch.stack([mask.sum() for mask in masks]).float()

    def sample(
        self, text: Text, input_ids: Tensor, known: Tensor, answers: Tensor, cu_seqlens: Tensor | None
    ) -> Sample:
        """The queries of the gate's loss. known, answers: (B, T) bool, where there are targets, and which of these are
        of answers. The rest: see `read`."""
        landmark = input_ids == self.landmark_token_id
        given = input_ids, landmark, text.order, text.known & known, self.block_size, cu_seqlens
        return sample(*given, answers, self.joint, self.chunk)

    def ratios(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """counts: (6,), of the global batch. Returns (what the summed loss is to be divided by, what an answer's
        divergence, an answer's and any target's cross entropy, a query's gate loss and a position's hidden states' are
        to be multiplied by before, (5,))."""
        beside = (self.answer_weight, self.text_weight, self.gate_weight, self.hidden_weight)
        weights = counts.new_tensor((self.answer_divergence_weight, *beside))
        counts = counts.clamp(min=1)
        return counts[0], weights * counts[0] / counts[1:]


@dataclass(frozen=True)
class Text:
    """tokens: (B, n) int64. position_ids: (B, n), or None for 0, 1, ... index: (B, T), for each position of the stream
    which of the n it is, some number where `known`, (B, T) bool, says that it is none. order: (B, n), the reverse:
    where each of the n stands in the stream."""

    tokens: Tensor
    position_ids: Tensor | None
    index: Tensor
    known: Tensor
    order: Tensor

    def align(self, values: Tensor) -> Tensor:
        """What the teacher gave for its n tokens, (B, n, E), at the stream's positions, (B, T, E)."""
        return values.gather(1, self.index[..., None].expand(-1, -1, values.shape[-1]))


class Asked:
    """Where the parts of a micro-batch's loss are asked. It is worked out once, for the counts of a step and for the
    loss, and is no dataclass, for a wrapped model is called with it (see attention/dispatch.py).

    text: what the teacher reads. known, answers: (B, T) bool, where there are targets, and which of these are of
    answers. queries: of the gate's loss; None without it.
    """

    def __init__(self, text: Text, known: Tensor, answers: Tensor, queries: Sample | None) -> None:
        self.text = text
        self.known = known
        self.answers = answers
        self.queries = queries


class Compared(NamedTuple):
    """losses: see `linear_distillation.distillation`. states: the student's, (B, T, E), of which `logits_of` makes
    logits. ours, theirs: what `hidden_states.collected` gave of student and teacher; nothing where it was not asked."""

    losses: tuple[Tensor, Tensor, Tensor]
    states: Tensor
    logits_of: Callable[[Tensor], Tensor]
    ours: list[Tensor]
    theirs: list[Tensor]


class DistillationLoss(LossModel):
    """A causal language model as its summed loss beside a teacher; in evaluation the loss of `LossModel`, and how far
    the model is from the teacher."""

    def __init__(self, model: nn.Module, distillation: Distillation, *settings: Any) -> None:
        super().__init__(model, *settings)
        self.distillation = distillation
        student = without_adapters(model)
        self._landmark_layers = landmark_layers(student.config)
        # The student's and the teacher's. Looking for them takes the host long, which a step waits for.
        self._student_layers, self._teacher_layers = map(decoder_layers, (student, distillation.teacher.model))

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        answers: Tensor | None = None,
        ratios: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        asked: Asked | None = None,
        **others: Tensor,
    ) -> Tensor:
        """In training (7,) float32: the loss, which alone is differentiable, and the sums of PARTS: of divergences, of
        those at answers, of answers' and of all targets' cross entropies, of the gate's loss, and of the hidden
        states'. In evaluation what `LossModel.forward` gives, (1,) or (4,), and behind it the sum of divergences, at
        temperature 1, and over how many positions.

        ratios: see `Distillation.ratios`. asked: what `Distillation.asked` gave, where it was called already. The rest:
        see `LossModel.forward`.
        """
        if not self.training:
            return self._evaluate(input_ids, labels, answers, cu_seqlens, **others)
        of = self.distillation
        if asked is None:
            asked = of.asked(input_ids, labels, answers, cu_seqlens)
        text, known, answers = asked.text, asked.known, asked.answers
        of_teacher = text.known & known
        weights = of_teacher.float() + ratios[0] * (of_teacher & answers)
        target_weights = ratios[1] * answers + ratios[2] * known
        extra = self.extra(input_ids, cu_seqlens=cu_seqlens, **others)
        gate = None
        if asked.queries is not None:
            gate = Gate(asked.queries, self._landmark_layers, extra.get("landmark_window"))
            extra["landmark_observer"] = gate.ask
        compared = self._compare(text, input_ids, labels, weights, target_weights, of.temperature, extra, gate)
        loss, divergences, losses = compared.losses
        gates = hidden = losses.new_zeros(())
        if gate is not None:
            gates = gate.loss()
            loss = loss + ratios[3] * gates
        if of.hidden_weight:
            hidden = hidden_states_loss(compared.ours, compared.theirs, of_teacher, text.align)
            loss = loss + ratios[4] * hidden
        of_answers = (values.masked_fill(~answers, 0.0).sum() for values in (divergences, losses))
        sums = torch.stack([divergences.sum(), *of_answers, losses.sum(), gates.detach(), hidden.detach()])
        return torch.cat([loss[None], sums])

    def _evaluate(
        self,
        input_ids: Tensor,
        labels: Tensor,
        answers: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **others: Tensor,
    ) -> Tensor:
        text = self.distillation.read(input_ids, cu_seqlens)
        weights = (text.known & (labels != IGNORED_TARGET)).float()
        extra = self.extra(input_ids, cu_seqlens=cu_seqlens, **others)
        # Runs of other temperatures are to be comparable.
        compared = self._compare(text, input_ids, labels, weights, torch.zeros_like(weights), 1.0, extra)
        _, divergences, losses = compared.losses
        found = losses.sum()
        if answers is not None:
            found = with_score(found, compared.states, labels, answers, compared.logits_of)
        beside = torch.stack([divergences.sum(), weights.sum()])
        return torch.cat([found.reshape(-1), beside.to(found.dtype)])

    def _compare(
        self,
        text: Text,
        input_ids: Tensor,
        labels: Tensor,
        weights: Tensor,
        target_weights: Tensor,
        temperature: float,
        extra: dict[str, Any],
        gate: Gate | None = None,
    ) -> Compared:
        """Read a text as student and as teacher. weights, target_weights, (B, T) float32, and temperature: see
        `linear_distillation.distillation`. extra: see `LossModel.extra`. gate: what both tell of their queries and
        keys."""
        teacher = self.distillation.teacher
        # The student's layers in evaluation too would be work for nothing.
        collects = self.training and self.distillation.hidden_weight
        layers = self._student_layers, self._teacher_layers
        ours, theirs = (collected(of if collects else ()) for of in layers)
        asked, taught, observer = nullcontext(), nullcontext(), None
        if gate is not None:
            asked, taught, observer = gate.asked_by(layers[0]), gate.taught_by(layers[1]), gate.teach
        if self.fused_loss and teacher.plain:
            with theirs as their_states, taught:
                states = text.align(teacher.states(text.tokens, text.position_ids, observer))
            with ours as our_states, asked:
                hidden, head = self.states(input_ids, extra)
            given = (hidden, head, states, teacher.head)
            losses = linear_distillation(*given, labels, weights, target_weights, temperature)
            return Compared(losses, hidden, lambda piece: nn.functional.linear(piece, head), our_states, their_states)
        with theirs as their_states, taught:
            teacher_logits = text.align(teacher.logits(text.tokens, text.position_ids, observer))
        with ours as our_states, asked:
            logits = self.wrapped(input_ids=input_ids, use_cache=False, **extra).logits
        losses = distillation(logits, teacher_logits, labels, weights, target_weights, temperature)
        return Compared(losses, logits, lambda piece: piece, our_states, their_states)
