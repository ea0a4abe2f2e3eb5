"""Cross-entropy of a language model's head straight from hidden states: its logits are formed in pieces, never kept.

Forward works out the gradients too, while a piece of the logits is at hand: three matrix products in all, as many as
with whole logits, where recomputing the logits in backward would take a fourth. Each piece adds to the whole gradient
of the weight, so pieces are large: liger-kernel, out for the least memory, cuts 32 of them where one does for 8192
tokens of width 1024, and torch's own function needs torch 2.13.
"""

from __future__ import annotations

import functools
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
    dtype = hidden.dtype
    if hidden.device.type in ("cuda", "cpu") and torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    hidden = hidden.flatten(0, -2).to(dtype)
    by_hidden, by_weight = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    target_weights = None if target_weights is None else target_weights.flatten()
    return _loss_and_gradients(hidden, weight, targets.flatten(), by_hidden, by_weight, target_weights)[0]


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
    weight = weight.to(hidden.dtype)
    step = piece_rows(rows, vocabulary)
    logits = hidden.new_empty(step, vocabulary)
    if by_weight and step < rows:
        weight_gradient.zero_()
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        piece = torch.mm(hidden[part], weight.T, out=logits[: part.stop - first])
        fused = _fused() if piece.is_cuda else None
        score = score_and_differentiate if fused is None else fused.score_and_differentiate
        score(piece, targets[part], losses[part], None if target_weights is None else target_weights[part])
        if by_hidden:
            torch.mm(piece, weight, out=hidden_gradient[part])
        if by_weight and step < rows:
            _add_product(weight_gradient, piece.T, hidden[part])
        elif by_weight:
            torch.mm(piece.T, hidden, out=weight_gradient)
    return loss.copy_(losses.sum()), hidden_gradient, weight_gradient


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
    # The sum of several pieces' gradients is kept in the weight's own precision.
    whole = piece_rows(hidden.shape[0], weight.shape[0]) == hidden.shape[0]
    dtype = hidden.dtype if whole else weight.dtype
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(hidden.shape if by_hidden else 0),
        hidden.new_empty(weight.shape if by_weight else 0, dtype=dtype),
    )


def _keep_gradients(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.wanted, ctx.dtypes = inputs[3:5], [x.dtype for x in inputs[:2]]
    ctx.set_materialize_grads(False)


def _scale_gradients(ctx, dloss: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    gradients = (
        gradient.to(dtype) * dloss if wanted and dloss is not None else None
        for gradient, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
    )
    return *gradients, None, None, None, None


_loss_and_gradients.register_autograd(_scale_gradients, setup_context=_keep_gradients)


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
