"""A student's loss beside a teacher, straight from the hidden states of both: no head's logits are ever held whole.

The divergence KL(teacher || student) and the cross entropy of the targets are worked out of one product with the
student's head, and the gradient is formed while that piece of logits is at hand (see linear_cross_entropy.py). Beside
it stands the piece of the teacher's logits, both in the precision of the run: two pieces of 1 GiB at most together.

liger-kernel (0.8.5) was looked at first. Its `fused_linear_kl_div` takes the teacher's probabilities of all tokens,
(tokens, vocabulary), which is what must not be held. Its `fused_linear_jsd`, with beta 0, and its chunked distillation
take both heads, but hold six float32 buffers as large as a piece, of which they cut 64 for 32 thousand tokens of
SmolLM2's shape where seven do here; they ask the device for the number of targets in every call, want one vocabulary of
both models (the student's has landmarks), know no weights, and leave the targets' cross entropy to another product with
the student's head.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor, nn

from landmark_cli.data.landmarks import IGNORED_TARGET
from landmark_cli.training.linear_cross_entropy import (
    empty_gradients,
    form_gradients,
    gradients_wanted,
    keep_gradients,
    piece_rows,
    rows_of,
    scale_gradients,
)

# Logits of each model that plain PyTorch makes float32 buffers of at a time, seven as large together.
AT_A_TIME = 1 << 23


def distillation(
    logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    target_weights: Tensor,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, from logits: (loss, divergences, losses).

    logits: (..., V), the student's. teacher_logits: (..., W). targets: (...) int64, -100 for none. weights: (...)
    float32, of the divergence at each position; target_weights: (...) float32, of its target's loss. Where a weight is
    0, what it would multiply does not matter, be it nan.

    divergences: (...) float32, temperature ** 2 * KL(teacher || student) in nats, both softmaxes at the temperature
    (the square keeps the size of the gradient), 0 where the weight is 0. The teacher's softmax is over the tokens that
    both know, the first min(V, W); the student's over all of its own, so tokens that the teacher lacks, such as
    landmarks, have the probability 0 to learn. losses: (...) float32, the targets' negative log-likelihood, 0 where
    there is none. loss: float32 scalar, the sum of both times their weights. It alone is differentiable, by the
    student's logits alone.
    """
    known, counted, weighed = targets != IGNORED_TARGET, weights != 0, target_weights != 0
    common = min(logits.shape[-1], teacher_logits.shape[-1])
    logits, teacher_logits = logits.float(), teacher_logits[..., :common].detach().float()
    teacher = (teacher_logits / temperature).log_softmax(-1)
    student = (logits / temperature).log_softmax(-1)[..., :common]
    divergences = temperature**2 * (teacher.exp() * (teacher - student)).sum(-1)
    losses = nn.functional.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="none"
    ).view(targets.shape)
    loss = torch.where(counted, divergences * weights, 0.0).sum()
    loss = loss + torch.where(known & weighed, losses * target_weights, 0.0).sum()
    return loss, divergences.detach().masked_fill(~counted, 0.0), losses.detach().masked_fill(~known, 0.0)


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    target_weights: Tensor,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `distillation`, from hidden states: the student's, (..., E), under its head, (V, E), and the teacher's, (...,
    F), under its head, (W, F).

    The loss is differentiable once, by hidden and weight. Under autocast the student's products are in autocast's
    dtype, as a linear layer's are; the teacher's are in the dtype of its hidden states.
    """
    shape, hidden = targets.shape, rows_of(hidden)
    loss, divergences, losses, _, _ = _loss_and_gradients(
        hidden,
        weight,
        teacher_hidden.flatten(0, -2).detach(),
        teacher_weight.detach(),
        targets.flatten(),
        weights.flatten(),
        target_weights.flatten(),
        temperature,
        *gradients_wanted(hidden, weight),
    )
    return loss, divergences.detach().view(shape), losses.detach().view(shape)


@torch.library.custom_op("landmark::linear_distillation", mutates_args=())
def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    target_weights: Tensor,
    temperature: float,
    by_hidden: bool,
    by_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, divergences, losses, the loss's gradient by hidden, by weight), the gradients empty where they are not
    wanted."""
    outputs = _empty_outputs(hidden, weight, teacher_hidden, teacher_weight, targets, by_hidden, by_weight)
    loss, divergences, losses, *gradients = outputs
    step = piece_rows(hidden.shape[0], weight.shape[0] + teacher_weight.shape[0])
    teacher_weight = teacher_weight.to(teacher_hidden.dtype)
    teacher_logits = teacher_hidden.new_empty(step, teacher_weight.shape[0])

    def score(piece: Tensor, part: slice) -> None:
        teacher = torch.mm(teacher_hidden[part], teacher_weight.T, out=teacher_logits[: piece.shape[0]])
        fused = _fused() if piece.is_cuda else None
        score_piece = distil_and_differentiate if fused is None else fused.distil_and_differentiate
        given = (targets[part], weights[part], target_weights[part], temperature)
        score_piece(piece, teacher, *given, divergences[part], losses[part])

    wanted = (gradient if want else None for gradient, want in zip(gradients, (by_hidden, by_weight), strict=True))
    form_gradients(hidden, weight, step, score, *wanted)
    # What weighs nothing may be infinite.
    total = (divergences * weights).sum() + torch.where(target_weights != 0, losses * target_weights, 0.0).sum()
    return loss.copy_(total), divergences, losses, *gradients


@_loss_and_gradients.register_fake
def _empty_outputs(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, targets: Tensor, *rest
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the operator returns, to be filled in. rest: its other arguments, of which the last two matter."""
    loss, divergences, losses = (hidden.new_empty(n, dtype=torch.float32) for n in ((), targets.shape, targets.shape))
    logits_a_row = weight.shape[0] + teacher_weight.shape[0]
    return loss, divergences, losses, *empty_gradients(hidden, weight, logits_a_row, *rest[-2:])


_loss_and_gradients.register_autograd(scale_gradients, setup_context=keep_gradients)


def distil_and_differentiate(
    logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    target_weights: Tensor,
    temperature: float,
    divergences: Tensor,
    losses: Tensor,
) -> None:
    """Turn the student's logits (rows, V), in place, into the gradient of the loss of `distillation`, and write each
    row's divergence and loss to `divergences` and `losses`, (rows,) float32. The teacher's logits, (rows, W), stay.

    Some rows at a time, for what is made on the way holds several numbers for each logit.
    """
    given = (logits, teacher_logits, targets, weights, target_weights, divergences, losses)
    for rows in zip(*(x.split(max(1, AT_A_TIME // logits.shape[-1])) for x in given), strict=True):
        _distil_rows(*rows, temperature)


def _distil_rows(
    logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    target_weights: Tensor,
    divergences: Tensor,
    losses: Tensor,
    temperature: float,
) -> None:
    """As `distil_and_differentiate`, all rows at once."""
    common = min(logits.shape[-1], teacher_logits.shape[-1])
    known, counted = targets != IGNORED_TARGET, weights != 0
    target = targets.clamp(min=0)[:, None]
    teacher = (teacher_logits[:, :common].float() / temperature).log_softmax(-1)
    student = (logits.float() / temperature).log_softmax(-1)
    probabilities = teacher.exp()
    divergence = temperature**2 * (probabilities * (teacher - student[:, :common])).sum(-1)
    divergences.copy_(divergence.masked_fill_(~counted, 0.0))
    gradient = student.exp_()
    gradient[:, :common] -= probabilities
    gradient.mul_((temperature * weights)[:, None]).masked_fill_(~counted[:, None], 0.0)
    predicted = logits.float().log_softmax(-1)
    losses.copy_(-predicted.gather(-1, target)[:, 0].masked_fill(~known, 0.0))
    by_target = predicted.exp_()
    by_target.scatter_add_(-1, target, by_target.new_full((), -1.0).expand(target.shape))
    by_target.mul_(target_weights[:, None]).masked_fill_(~(known & (target_weights != 0))[:, None], 0.0)
    logits.copy_(gradient.add_(by_target))


@functools.cache
def _fused() -> ModuleType | None:
    """The module of the kernel that does what `distil_and_differentiate` does; None where Triton is missing."""
    try:
        from . import fused_distillation
    except ImportError:
        return None
    return fused_distillation
