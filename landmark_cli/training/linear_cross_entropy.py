"""Cross-entropy of a language model's head straight from hidden states: its logits are formed in pieces, never kept.

Forward works out the gradients too, while a piece of the logits is at hand: three matrix products in all, as many as
with whole logits, where recomputing the logits in backward would take a fourth. Each piece adds to the whole gradient
of the weight, so pieces are large: liger-kernel, out for the least memory, cuts 32 of them where one does for 8192
tokens of width 1024, and torch's own function needs torch 2.13.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from landmark_cli.data.landmarks import IGNORED_TARGET

# Most logits of a piece: they take 1 GiB in 16 bits.
PIECE = 1 << 29


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, target_weights: Tensor | None = None
) -> Tensor:
    """Sum over the targets that are not -100 of the negative log-likelihood under softmax(hidden @ weight.T), each
    times its target's weight.

    hidden: (..., E); weight: (V, E); targets: (...) int64; target_weights: (...) float32, None for 1. Returns a float32
    scalar, differentiable once by hidden and weight. Under autocast the products are in autocast's dtype, as a linear
    layer's are.
    """
    hidden = rows_of(hidden)
    by_hidden, by_weight = gradients_wanted(hidden, weight)
    target_weights = None if target_weights is None else target_weights.flatten()
    return _loss_and_gradients(hidden, weight, targets.flatten(), by_hidden, by_weight, target_weights)[0]


def rows_of(hidden: Tensor) -> Tensor:
    """(..., E) -> (rows, E), in autocast's dtype where that is on, as the input of a linear layer would be."""
    dtype = hidden.dtype
    if hidden.device.type in ("cuda", "cpu") and torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    return hidden.flatten(0, -2).to(dtype)


def gradients_wanted(hidden: Tensor, weight: Tensor) -> tuple[bool, bool]:
    """Of which of the two a gradient will be asked for."""
    by_hidden, by_weight = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    return by_hidden, by_weight


def piece_rows(rows: int, vocabulary: int) -> int:
    """Rows of logits to form at a time: all, or else equal shares in whole tiles of a matrix product."""
    pieces = -(-rows * vocabulary // PIECE)
    return rows if pieces <= 1 else -(-rows // (128 * pieces)) * 128


@torch.library.custom_op("landmark::linear_cross_entropy", mutates_args=())
def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    by_hidden: bool,
    by_weight: bool,
    target_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, its gradient by hidden, by weight), the gradients empty where they are not wanted."""
    loss, hidden_gradient, weight_gradient = _empty_outputs(hidden, weight, targets, by_hidden, by_weight)
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    losses = loss.new_empty(rows)
    step = piece_rows(rows, vocabulary)

    def score(piece: Tensor, part: slice) -> None:
        fused = _fused() if piece.is_cuda else None
        score_piece = score_and_differentiate if fused is None else fused.score_and_differentiate
        score_piece(piece, targets[part], losses[part], None if target_weights is None else target_weights[part])

    gradients = (hidden_gradient if by_hidden else None, weight_gradient if by_weight else None)
    form_gradients(hidden, weight, step, score, *gradients)
    return loss.copy_(losses.sum()), hidden_gradient, weight_gradient


def form_gradients(
    hidden: Tensor,
    weight: Tensor,
    step: int,
    score: Callable[[Tensor, slice], None],
    hidden_gradient: Tensor | None,
    weight_gradient: Tensor | None,
) -> None:
    """Form logits of hidden states, (rows, E), under a head's weight, (V, E), `step` rows at a time, have
    `score(piece, part)` turn those of the rows `part` into the loss's gradient by them, in place, and write the
    gradients that are wanted, those by hidden and by weight."""
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    weight = weight.to(hidden.dtype)
    logits = hidden.new_empty(step, vocabulary)
    if weight_gradient is not None and step < rows:
        weight_gradient.zero_()
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        piece = torch.mm(hidden[part], weight.T, out=logits[: part.stop - first])
        score(piece, part)
        if hidden_gradient is not None:
            torch.mm(piece, weight, out=hidden_gradient[part])
        if weight_gradient is not None and step < rows:
            _add_product(weight_gradient, piece.T, hidden[part])
        elif weight_gradient is not None:
            torch.mm(piece.T, hidden, out=weight_gradient)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, without rounding the product to the factors' dtype where the device can."""
    if total.is_cuda and total.dtype == torch.float32 and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += torch.mm(a, b)


@_loss_and_gradients.register_fake
def _empty_outputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    by_hidden: bool,
    by_weight: bool,
    target_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=torch.float32)
    return loss, *empty_gradients(hidden, weight, weight.shape[0], by_hidden, by_weight)


def empty_gradients(
    hidden: Tensor, weight: Tensor, logits_a_row: int, by_hidden: bool, by_weight: bool
) -> tuple[Tensor, Tensor]:
    """Where the gradients by hidden, (rows, E), and by weight are to be written; empty where they are not wanted.
    logits_a_row: as many are formed at a time for each row."""
    # The sum of several pieces' gradients is kept in the weight's own precision.
    whole = piece_rows(hidden.shape[0], logits_a_row) == hidden.shape[0]
    dtype = hidden.dtype if whole else weight.dtype
    return (
        hidden.new_empty(hidden.shape if by_hidden else 0),
        hidden.new_empty(weight.shape if by_weight else 0, dtype=dtype),
    )


def keep_gradients(ctx, inputs, output) -> None:
    """Of an operator whose first inputs are hidden and weight and whose last outputs are the gradients by them: keep
    these, which its flags, two bools among the inputs, want."""
    ctx.save_for_backward(*output[-2:])
    ctx.wanted, ctx.dtypes = [x for x in inputs if isinstance(x, bool)], [x.dtype for x in inputs[:2]]
    ctx.others = len(inputs) - 2
    ctx.set_materialize_grads(False)


def scale_gradients(ctx, dloss: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    """The gradients that were kept, times that of the loss, which is the operator's first output."""
    gradients = (
        gradient.to(dtype) * dloss if wanted and dloss is not None else None
        for gradient, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
    )
    return *gradients, *[None] * ctx.others


_loss_and_gradients.register_autograd(scale_gradients, setup_context=keep_gradients)


def score_and_differentiate(logits: Tensor, targets: Tensor, losses: Tensor, weights: Tensor | None = None) -> None:
    """Turn logits (rows, V), in place, into the gradient of their summed loss, and write each row's loss to `losses`,
    (rows,) float32: 0 where the target, (rows,) int64, is -100. weights: (rows,) float32, by which each row's loss and
    gradient is multiplied; a row of weight 0 is one without a target."""
    if weights is not None:
        targets = targets.masked_fill(weights == 0, IGNORED_TARGET)
    ignored = (targets == IGNORED_TARGET)[:, None]
    target = targets[:, None].clamp(min=0)
    normalizer = logits.float().logsumexp(-1, keepdim=True)
    losses.copy_((normalizer - logits.gather(-1, target)).masked_fill(ignored, 0.0)[:, 0])
    gradient = (logits - normalizer).exp_()
    gradient.scatter_add_(-1, target, gradient.new_full((), -1.0).expand(target.shape))
    if weights is not None:
        losses *= weights
        gradient *= weights[:, None]
    logits.copy_(gradient.masked_fill_(ignored, 0.0))


@functools.cache
def _fused() -> ModuleType | None:
    """The module of the kernel that does what `score_and_differentiate` does; None where Triton is missing."""
    try:
        from . import fused_cross_entropy
    except ImportError:
        return None
    return fused_cross_entropy
