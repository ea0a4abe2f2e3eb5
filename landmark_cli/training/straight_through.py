"""The loss's own gradient for landmarks that only choose blocks.

Where landmarks only choose (softmax.py), nothing of a loss reaches them: a window of training is read whole, whatever
they would have chosen, and a choice has no gradient. What it lacks is taken from what is read: of each block, how the
loss would change if all logits of its text were a little higher. That is handed to the landmark's logit as its
gradient, as if the logit, less itself, were added to those (a straight-through estimate; Bengio et al., arXiv
1308.3432): blocks rise in the order that the choice is made in where more attention to them would have served.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from landmark_cli.training.gate_queries import Sample
from landmark_cli.training.sampled_products import products, sampled, widened

# Numbers of one matrix of sampled queries x tokens, of all heads, at a time; a few such matrices are held.
MOST = 1 << 28


class StraightThrough(torch.autograd.Function):
    """Attention's output as it is; backward gives the landmarks' logits `block_gradients` times a weight."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, logits: Tensor, q: Tensor, k: Tensor, v: Tensor, chosen: Sample, how: tuple[float, float]
    ) -> Tensor:
        """out: (B, H, T, D). logits: (B, H, S, M), as `gate.landmark_logits` has them. q: (B, H, T, D) and k, v:
        (B, G, T, D), what attention read: they get no gradient here. how: scale of their products, and the weight."""
        ctx.save_for_backward(out, q, k, v)
        ctx.chosen, ctx.how, ctx.dtype = chosen, how, logits.dtype
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        scale, weight = ctx.how
        found = block_gradients(given, *ctx.saved_tensors, ctx.chosen, scale)
        return given, (weight * found).to(ctx.dtype), None, None, None, None, None


@torch.no_grad()
def block_gradients(
    d_out: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, chosen: Sample, scale: float
) -> Tensor:
    """Of a loss whose gradient for attention's output is d_out, that for a number added to the logits of all text of a
    block: (B, H, S, M) float32 (float64 if q is), of the sampled queries and the blocks that they can choose, else 0.

    d_out, out, q: (B, H, T, D); k, v: (B, G, T, D), of full attention over the text of the query's document.
    """
    _, heads, tokens, _ = q.shape
    place, columns = (torch.arange(n, device=q.device) for n in (tokens, chosen.landmarks.shape[1]))
    # So many rows at a time that their sampled queries times their tokens are not too many numbers.
    rows = max(1, MOST // (heads * chosen.stream.shape[1] * tokens))
    given = (x.split(rows) for x in (d_out, out, q, k, v, chosen.stream, chosen.first, chosen.stream_blocks))
    found = []
    for *of_queries, keys, values, stream, first, blocks in zip(*given, strict=True):
        gradients, outputs, queries = (sampled(x, stream) for x in of_queries)
        seen = (place <= stream[..., None]) & (blocks[:, None] >= first[..., None])
        logits = products(queries, widened(keys), scale).masked_fill(~seen[:, None], -torch.inf)
        # How much more each token's logit would have the loss: p (dO v - dO o).
        change = products(gradients, widened(values), 1.0) - (gradients * outputs).sum(-1, keepdim=True)
        change *= torch.softmax(logits, dim=-1)
        of_blocks = (blocks[..., None] == columns).to(change.dtype)
        found.append((change.flatten(1, 2) @ of_blocks).unflatten(1, (heads, -1)))
    asked = chosen.choosable() & chosen.real[..., None]
    return torch.cat(found).masked_fill(~asked[:, None], 0.0)
