"""What the chunks of a training window read of the blocks before them, as an operator of PyTorch: see operators.py.

It gives what `retrieval_window.retrieve_window` gives, or, with a chunk's own attention, both together.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from .backends import BACKENDS
from .kernels.common.tensors import empty_heads_last
from .operator_library import below_autograd, define, differentiate, refuse_second_derivatives
from .operators import check_scale, check_softcap, refuse_transforms, seed_tensor
from .window import ReadingWindow


def retrieve(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: ReadingWindow,
    scale: float | None = None,
    layer: int = 0,
    own: tuple[Tensor, Tensor] | None = None,
    *,
    backend: str,
    ages: Tensor | None = None,
    softcap: float | None = None,
    first: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The twin of `retrieval_window.retrieve_window` in the kernels of a backend that can serve: values and gradients.

    q: (B, H, N, D) and k, v: (B, G, N, D), any strides. own: attention within the chunks, (B, H, N, D) and its
    log-sum-exp, (B, H, N) float32, which is then one part of the outer softmax. ages: (B, H or 1, N, k) int32, a
    selection that is made already, as `retrieval_window.select_in_window` gives. softcap: bound of the logits; sinks
    have their share of `own`. first: whether `layer` is 0, where who calls knows it without the number.

    Returns out (B, H, N, D), which lies in memory as (B, N, H, D), and the log-sum-exp (B, H, N) float32. Both are
    differentiable, in own too. Gradients repeat bit by bit.

    Raises ValueError for a scale or softcap that is not positive.
    """
    if not torch.compiler.is_compiling():
        refuse_transforms(q, k, v)
    scale, softcap = check_scale(scale, q), check_softcap(softcap)
    settings = window.settings
    seed = window.seed_of(layer) if settings.explore and ages is None else None
    first = layer == 0 if first is None else first
    out, lse, *_ = retrieved(
        q, k, v, *(own or (None, None)), window.chunks, window.blocks, window.chunk_of, window.cos, window.sin, ages,
        None if seed is None else seed_tensor(seed, q.device), settings.chunk, settings.block_size, settings.top_k,
        window.most_earlier, settings.explore, window.one_landmark and first, scale, softcap, settings.joint, backend,
    )  # fmt: skip
    return out, lse


_WINDOW = (
    "Tensor chunks, Tensor blocks, Tensor chunk_of, Tensor cos, Tensor sin, Tensor? ages, Tensor? explore_seed, "
    "int chunk, int block_size, int top_k, int most_earlier, float explore, bool one_landmark_key, float scale, "
    "float? softcap, bool joint, str backend"
)
# Where a window's tensors and numbers begin among the operators' arguments, and how many of the first are tensors.
_FORWARD_TENSORS, _WINDOW_TENSORS = 5, 7


def _retrieve(*given):
    *given, backend = given
    return BACKENDS[backend].retrieve_forward(*given)


def _shapes(q, k, v, own, own_lse, *window):
    blocks, top_k, most_earlier = window[1], window[9], window[10]
    batch, heads, tokens, _ = q.shape
    pairs = batch * (heads // k.shape[1]) * tokens * min(top_k, most_earlier)
    return (
        empty_heads_last(q),
        q.new_empty(q.shape[:3], dtype=torch.float32),
        q.new_empty((k.shape[1], pairs), dtype=torch.int16),
        q.new_empty((k.shape[1], pairs), dtype=torch.int64),
        q.new_empty((k.shape[1], blocks.shape[0] + 1), dtype=torch.int32),
    )


def _retrieve_backward(*given):
    """The last two are empty where there is no own part."""
    *given, backend = given
    found = BACKENDS[backend].retrieve_backward(*given)
    return tuple(given[2].new_empty(0) if x is None else x for x in found)


def _backward_shapes(dout, dlse, q, k, v, out, lse, own, own_lse, *rest):
    own_gradients = [empty_heads_last(own), torch.empty_like(lse)] if own is not None else [None, None]
    own_gradients = [q.new_empty(0) if x is None else x for x in own_gradients]
    return empty_heads_last(q), empty_heads_last(k), empty_heads_last(v), *own_gradients


retrieved = define(
    f"retrieve(Tensor q, Tensor k, Tensor v, Tensor? own, Tensor? own_lse, {_WINDOW}) -> "
    "(Tensor out, Tensor lse, Tensor turns, Tensor entries, Tensor bounds)",
    _retrieve,
    _shapes,
)
retrieved_backward = define(
    "retrieve_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? own, "
    f"Tensor? own_lse, Tensor turns, Tensor entries, Tensor bounds, {_WINDOW}) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor down, Tensor down_lse)",
    _retrieve_backward,
    _backward_shapes,
)


class Retrieval(torch.autograd.Function):
    """What autograd keeps between the two operators."""

    @staticmethod
    def forward(ctx, *inputs):
        with below_autograd():
            out, lse, *routes = retrieved(*inputs)
        tensors = inputs[:_FORWARD_TENSORS]
        window = inputs[_FORWARD_TENSORS:]
        ctx.save_for_backward(*tensors, out, lse, *routes, *window[:_WINDOW_TENSORS])
        ctx.settings = window[_WINDOW_TENSORS:]
        ctx.mark_non_differentiable(*routes)
        ctx.set_materialize_grads(False)
        return out, lse, *routes

    @staticmethod
    def backward(ctx, dout, dlse, *_):
        q, k, v, own, own_lse, out, lse, *rest = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        *found, down, down_lse = retrieved_backward(dout, dlse, q, k, v, out, lse, own, own_lse, *rest, *ctx.settings)
        own_gradients = (None, None) if own is None else (down, down_lse)
        return *found, *own_gradients, *(None,) * (_WINDOW_TENSORS + len(ctx.settings))


differentiate(retrieved, Retrieval, _FORWARD_TENSORS)
refuse_second_derivatives(retrieved_backward)


def keep_retrieved() -> tuple[AbstractContextManager, AbstractContextManager]:
    """A context_fn of torch.utils.checkpoint, for layers that read windows: of what is computed again in the backward
    pass, `retrieve` is left out. What it found is kept, with its routes: for each token and head the bytes of the
    output and 4 + 10 * k, k being the blocks that are read.

    Attention within the chunks, whose gradient needs its own output, is computed again. Without kernels it changes
    nothing: the definition is no operator. It is for a backward pass that runs once.
    """
    return create_selective_checkpoint_contexts(_kept)


def _kept(context, operator, *arguments, **options) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator is retrieved else CheckpointPolicy.PREFER_RECOMPUTE
