"""What the chunks of a training window read of the blocks before them, all at once and differentiable: the definition.

It computes for every chunk what retrieval.py does when the window is read chunk by chunk through a block cache, from
the same functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dropout import philox_uniform
from .reference import MINUS_INFINITY, masked_logsumexp
from .retrieval import bounded_distance, choose_blocks, read_selected, score_bounded
from .rotary import rotate
from .window import ReadingWindow


def retrieve_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: ReadingWindow,
    scale: float | None = None,
    layer: int = 0,
    ages: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from every query of a window to the blocks that it retrieves, and to nothing else.

    q: (B, H, N, D) and k, v: (B, G, N, D), rotated at window.position_ids. scale: factor on the logits, 1 / sqrt(D).
    layer: in the first, 0, all landmarks have one key before rotation where window.one_landmark says so; exploring
    draws other numbers in every layer. ages: a selection that is made already, as `select_in_window` gives.
    softcap: see reference.landmark_attention.

    Returns out, (B, H, N, D) in q's dtype, by the outer softmax over the landmarks of the retrieved blocks, and the
    log-sum-exp of these landmarks' logits, (B, H, N) float32 (float64 if q is). With window.joint one softmax over the
    text of these blocks takes the place of the outer and the inner ones, and the log-sum-exp is of that text's logits.
    A query with nothing to retrieve gives zeros and minus infinity. Differentiable in q, k and v through both; no
    gradient passes through the selection.
    """
    heads, tokens = q.shape[1:3]
    out = [q.new_zeros(heads, 1, q.shape[3])]
    lse = [q.new_full((heads, 1), MINUS_INFINITY, dtype=torch.promote_types(q.dtype, torch.float32))]
    # Of every token its column in what the chunks give, side by side; column 0 is for nothing.
    columns, column = torch.zeros(window.chunk_of.shape, dtype=torch.long), 1
    blocks = window.blocks.long()
    for row, begin, length, first, earlier in window.host_chunks:
        if length and min(earlier, window.top_k) > 0:
            queries = q[row : row + 1, :, begin : begin + length]
            # The newest first, as ages count.
            chosen_from = blocks[first : first + earlier].flip(0)
            place, chosen = (row * heads, tokens, begin), None
            if ages is not None:
                chosen = ages[row : row + 1, :, begin : begin + length, : min(earlier, window.top_k)].long()
            found = _retrieve(queries, k[row], v[row], chosen_from, window, scale, layer, place, chosen, softcap)
            out.append(found[0].to(q.dtype))
            lse.append(found[1])
            columns[row, begin : begin + length] = torch.arange(column, column + length)
            column += length
    columns = columns.to(q.device)
    return torch.cat(out, 1)[:, columns].transpose(0, 1), torch.cat(lse, 1)[:, columns].transpose(0, 1)


def _retrieve(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    window: ReadingWindow,
    scale: float | None,
    layer: int,
    place: tuple[int, int, int],
    ages: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """(out (H, T, D), lse (H, T)) of one chunk's queries q, (1, H, T, D), over its row's keys and values, (G, N, D).

    blocks: (n, 3) those that it can choose from, the newest first. place: see `_explore`. ages: (1, H or 1, T, k) in
    time order, what they choose; None: they choose here.
    """
    tokens = blocks[:, 1:2] + torch.arange(window.block_size, device=q.device)
    # (G, n, size, D), the keys rotated back to their offset in their block.
    cos, sin = window.by(-blocks[:, 2])
    keys, values = rotate(k[:, tokens], cos[:, None], sin[:, None]), v[:, tokens]
    if ages is None:
        ages = _select(q, keys[:, :, -1], window, scale, layer, place, softcap)
    earlier = torch.full((1,), len(blocks), device=q.device)
    heads = torch.arange(q.shape[1], device=q.device)[:, None] // (q.shape[1] // k.shape[0])
    distance = bounded_distance(ages, earlier, window.top_k)

    def gather(age: Tensor) -> tuple[Tensor, Tensor]:
        return keys[heads, age - 1], values[heads, age - 1]

    logits, outputs = read_selected(q, ages, distance, gather, window, scale, softcap, window.joint)
    lse = masked_logsumexp(logits)
    share = torch.exp(logits - lse.unsqueeze(-1))
    return (outputs * share.unsqueeze(-1)).sum(-2)[0], lse[0]


@torch.no_grad()
def select_in_window(
    q: Tensor,
    k: Tensor,
    window: ReadingWindow,
    scale: float | None = None,
    layer: int = 0,
    softcap: float | None = None,
) -> Tensor:
    """The blocks that `retrieve_window`, with the same arguments, has every query of a window read.

    Returns ages, (B, H or 1, N, k) int32 in time order: age a is the a-th newest of the query's earlier blocks, and 0
    (at the end) stands for no block.
    """
    heads, tokens = q.shape[1:3]
    shared = window.selection == "max_over_heads"
    found = window.chunks.new_zeros(q.shape[0], 1 if shared else heads, tokens, min(window.top_k, window.most_earlier))
    blocks = window.blocks.long()
    for row, begin, length, first, earlier in window.host_chunks:
        if length and min(earlier, window.top_k) > 0:
            _, token, number = blocks[first : first + earlier].flip(0).unbind(-1)
            keys = rotate(k[row, :, token + window.block_size - 1], *window.by(-number))
            queries = q[row : row + 1, :, begin : begin + length]
            ages = _select(queries, keys, window, scale, layer, (row * heads, tokens, begin), softcap)
            found[row, :, begin : begin + length, : ages.shape[-1]] = ages[0]
    return found


@torch.no_grad()
def _select(
    q: Tensor,
    landmark_keys: Tensor,
    window: ReadingWindow,
    scale: float | None,
    layer: int,
    place: tuple[int, int, int],
    softcap: float | None = None,
) -> Tensor:
    """Ages, (1, H or 1, T or 1, k) in time order, that one chunk's queries, (1, H, T, D), choose of the blocks whose
    landmark keys, rotated back to their offset in their block, are (G, n, D), the newest first. place: see `_explore`.
    """
    earlier = torch.full((1,), landmark_keys.shape[1], device=q.device)
    one_key = window.one_landmark and layer == 0
    scores = score_bounded(q, landmark_keys[None], earlier, window.top_k, window, one_key, scale, softcap)
    real = torch.ones(1, q.shape[2], dtype=torch.bool, device=q.device)
    key_heads = landmark_keys.shape[0]
    ages = choose_blocks(scores, key_heads, earlier, real, window.top_k, window.selection)
    if window.explore:
        sharing = q.shape[1] // key_heads if window.selection == "max_over_query_heads" else 1
        ages = _explore(ages, landmark_keys.shape[1], window, layer, place, sharing)
    return ages.sort(dim=-1, descending=True).values


def _explore(
    best: Tensor, earlier: int, window: ReadingWindow, layer: int, place: tuple[int, int, int], sharing: int = 1
) -> Tensor:
    """Replace the last of each selection's choices by a random block, as often as window.explore says.

    best: (1, H or 1, T or 1, k) ages, the best first; earlier: how many blocks there are. place: the number of the
    chunk's first query head among all rows' heads, tokens of a row, the chunk's first token. sharing: how many heads,
    one after the other, share a selection.
    """
    others = earlier - best.shape[-1]
    if others == 0:
        return best
    head, tokens, begin = place
    heads, queries = (torch.arange(n, device=best.device) for n in best.shape[1:3])
    heads = heads // sharing * sharing
    row = (head + heads[:, None]) * tokens + begin + queries
    seed = window.seed_of(layer)
    drawn = [philox_uniform(seed, row, torch.tensor(number, device=row.device)) for number in (0, 1)]
    # The number of a block among those not chosen; then its age, past those of the chosen ones up to it.
    age = 1 + ((drawn[1] * (1 << 24)).long() * others >> 24)
    for chosen in best[0].sort(dim=-1).values.unbind(-1):
        age = age + (age >= chosen)
    best = best.clone()
    best[0, ..., -1] = torch.where(drawn[0] < window.explore, age, best[0, ..., -1])
    return best
