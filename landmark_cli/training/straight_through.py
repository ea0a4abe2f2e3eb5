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
    batch, heads, tokens, _ = q.shape
    groups, sampled = k.shape[1], chosen.stream.shape[1]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    place, columns = (torch.arange(n, device=q.device) for n in (tokens, chosen.landmarks.shape[1]))
    found = []
    # So many rows at a time that their sampled queries times their tokens are not too many numbers.
    for rows in torch.arange(batch).split(max(1, MOST // (heads * sampled * tokens))):
        rows = slice(int(rows[0]), int(rows[-1]) + 1)
        stream, first, blocks = (x[rows] for x in (chosen.stream, chosen.first, chosen.stream_blocks))
        at_queries = (x[rows].take_along_dim(stream[:, None, :, None], dim=2) for x in (q, out, d_out))
        # (B, G, H / G * S, D): the query heads of a key head one after the other.
        queries, outputs, gradients = (x.to(dtype).unflatten(1, (groups, -1)).flatten(2, 3) for x in at_queries)
        keys, values = (x[rows].to(dtype).transpose(-1, -2) for x in (k, v))
        seen = (place <= stream[..., None]) & (blocks[:, None] >= first[..., None])
        logits = (queries @ keys * scale).unflatten(2, (-1, sampled)).masked_fill(~seen[:, None, None], -torch.inf)
        # How much more each token's logit would have the loss: p (dO v - dO o).
        change = (gradients @ values - (gradients * outputs).sum(-1, keepdim=True)).view(logits.shape)
        change *= torch.softmax(logits, dim=-1)
        of_blocks = change.flatten(1, 3) @ (blocks[..., None] == columns).to(dtype)
        found.append(of_blocks.view(len(of_blocks), heads, sampled, -1))
    choosable = (columns >= chosen.first[..., None]) & (columns < chosen.end[..., None]) & chosen.real[..., None]
    return torch.cat(found).masked_fill(~choosable[:, None], 0.0)
