"""Layers with a sliding window in a stream with landmarks: the definition, which is also what runs.

To such a layer the stream is its text. A token of the text attends to itself and to those of the last window - 1 text
tokens that are of its document, at the distances that they have in the text. A landmark stands where the next text
token does and attends to what that would attend to, itself in that token's place; nothing else attends to it.
docs/semantics.md, section 8, says why.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .cache import Chunk, LayerWindow
from .reference import attention_logits, repeat_heads
from .rotary import rotate, rotation_table
from .window import ReadingWindow

# Queries that are worked on at a time: of a long stream the scores of each are with the keys near it alone.
PIECE = 1024


class TextPlaces(NamedTuple):
    """Where the tokens of rows stand in their text. Each is (B, T), or (1, T) where rows are alike.

    place: text tokens before it in its document. ahead: landmarks before it there, by which its position in the stream
    is ahead of its place. text: it is no landmark. document: what can be seen is of the same.
    """

    place: Tensor
    ahead: Tensor
    text: Tensor
    document: Tensor

    def at(self, columns: slice) -> TextPlaces:
        return TextPlaces(*(part[:, columns] for part in self))


def text_places(
    length: int,
    device: torch.device,
    *,
    block_size: int | None = None,
    landmark_mask: Tensor | None = None,
    start: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    batch: int = 1,
) -> TextPlaces:
    """Of rows of `length` stream tokens; the arguments are those of reference.landmark_attention, but that cu_seqlens
    counts over all `batch` rows one after the other. Nothing here waits for the device."""
    if cu_seqlens is not None:
        index = torch.arange(batch * length, device=device).view(batch, length)
        bounds = cu_seqlens.to(device=device, dtype=torch.int64)
        document = torch.searchsorted(bounds, index, right=True) - 1
        first = bounds[document]
    else:
        index = torch.arange(length, device=device)[None]
        first = torch.zeros_like(index[:, :1]) if start is None else start.to(device=device, dtype=torch.int64)[:, None]
        document = torch.where(index < first, -1, 0)
    since = (index - first).clamp(min=0)
    if landmark_mask is None:
        return TextPlaces(
            since - since // block_size, since // block_size, since % block_size < block_size - 1, document
        )
    landmark = landmark_mask.to(device=device, dtype=torch.bool) & (document >= 0)
    before = landmark.long().cumsum(-1) - landmark.long()
    # Less those of earlier documents of the row, which are the ones before its own document's first token.
    before = before - before.gather(-1, (first - index[:, :1]).clamp(max=length - 1).expand_as(before))
    return TextPlaces(since - before, before, ~landmark, document)


def window_places(chunk_of: Tensor, chunks: Tensor, block_size: int) -> tuple[TextPlaces, Tensor]:
    """Of windows that are read chunk by chunk, as a ReadingWindow's `chunk_of` and `chunks` say; and what each token's
    position in its chunk lacks to its place in its document, (B, N)."""
    own = chunks[chunk_of.clamp(min=0).long()].long()
    first = own[..., 1]
    # Earlier blocks are all of the document's, so they say where it begins.
    begin = first - own[..., 4] * block_size
    index = torch.arange(chunk_of.shape[1], device=chunk_of.device)
    since = torch.where(chunk_of < 0, 0, index - begin)
    place, ahead = since - since // block_size, since // block_size
    document = torch.where(chunk_of < 0, -1, begin)
    missing = torch.where(chunk_of < 0, 0, place - (index - first))
    return TextPlaces(place, ahead, since % block_size < block_size - 1, document), missing


def turned(x: Tensor, by: Tensor, frequencies: Tensor | None) -> Tensor:
    """x, (B, H, T, D), rotated by so many positions more, (B or 1, T); as it is in a layer without positions."""
    if frequencies is None:
        return x
    cos, sin = rotation_table(by, frequencies.to(x.device))
    return rotate(x, cos[:, None], sin[:, None])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: TextPlaces,
    window: int,
    *,
    front: int = 0,
    reach: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of the last Tq keys' tokens to what each sees of the text: (B, H, Tq, D).

    q: (B, H, Tq, D) and k, v: (B, G, Tk, D), rotated at their places. places: of the keys. window: text tokens that a
    query sees, itself included. front: keys at the beginning that any query may see. reach: of all other keys, a query
    sees none that is further back in the stream; None where nobody knows. scale, softcap, sinks: see
    reference.landmark_attention.
    """
    length, queries, out = k.shape[2], q.shape[2], []
    index = torch.arange(length, device=q.device)[None]
    for begin in range(0, queries, PIECE):
        end = min(begin + PIECE, queries)
        asking = slice(length - queries + begin, length - queries + end)
        lowest = front if reach is None else max(front, asking.start - reach)
        seen = slice(0 if lowest == front else lowest, asking.stop)

        def keys(x: Tensor, dim: int, seen: slice = seen) -> Tensor:
            near = x.narrow(dim, seen.start, seen.stop - seen.start)
            return torch.cat([x.narrow(dim, 0, front), near], dim) if front and seen.start else near

        found = TextPlaces(*(keys(part, 1) for part in places))
        mask = _visible(places.at(asking), index[:, asking], found, keys(index, 1), window)
        out.append(_attend(q[:, :, begin:end], keys(k, 2), keys(v, 2), mask, scale, softcap, sinks))
    return out[0] if len(out) == 1 else torch.cat(out, dim=2)


def _visible(asking: TextPlaces, index: Tensor, keys: TextPlaces, key_index: Tensor, window: int) -> Tensor:
    """(B or 1, Tq, Tk) bool: which keys a query sees. Every query sees itself, so none is left with nothing."""
    before = (key_index[:, None] < index[..., None]) & keys.text[:, None]
    same = asking.document[..., None] == keys.document[:, None]
    near = asking.place[..., None] - keys.place[:, None] < window
    return (before & same & near) | (key_index[:, None] == index[..., None])


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    heads = q.shape[1]
    if softcap is None and sinks is None:
        repeated = repeat_heads(k, heads), repeat_heads(v, heads)
        return scaled_dot_product_attention(q, *repeated, attn_mask=mask[:, None], scale=scale)
    logits = attention_logits(q, k, scale, softcap).masked_fill(~mask[:, None], -torch.inf)
    if sinks is not None:
        sink = sinks.to(logits.dtype)[:, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], dim=-1)
    weights = logits.softmax(-1)[..., : k.shape[2]]
    return (weights @ repeat_heads(v, heads).to(weights.dtype)).to(q.dtype)


def attend_input(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    block_size: int | None,
    landmark_mask: Tensor | None = None,
    start: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    frequencies: Tensor | None = None,
    **logits: Any,
) -> Tensor:
    """Attention within an input, of which landmarks are a part: (B, H, T, D).

    q: (B, H, T, D) and k, v: (B, G, T, D), rotated at consecutive positions. window: text tokens that a query sees,
    itself included. block_size to cu_seqlens: see `text_places`. frequencies: (rotary_dim / 2,) of the layer, None
    without positions. logits: scale, softcap and sinks.
    """
    batch, length = q.shape[0], operator.index(q.shape[2])
    mask = landmark_mask
    given = {"block_size": block_size, "start": start, "cu_seqlens": cu_seqlens, "batch": batch}
    places = text_places(length, q.device, landmark_mask=mask, **given)
    q, k = (turned(x, -places.ahead, frequencies) for x in (q, k))
    return attend(q, k, v, places, window, reach=reach(window, block_size) if mask is None else None, **logits)


def attend_window(
    q: Tensor, k: Tensor, v: Tensor, read: ReadingWindow, window: int, frequencies: Tensor | None, **logits: Any
) -> Tensor:
    """As `attend_input`, in a window that is read chunk by chunk: q and k are rotated at its position_ids. A layer that
    keeps its sliding window rolls on from chunk to chunk, so it is as if there were none."""
    places, missing = window_places(read.chunk_of, read.chunks, read.block_size)
    q, k = (turned(x, missing, frequencies) for x in (q, k))
    return attend(q, k, v, places, window, reach=reach(window, read.block_size), **logits)


def attend_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    held: LayerWindow,
    chunk: Chunk,
    frequencies: Tensor | None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend from a chunk to the text that the layer still holds and to itself, then store its text: (B, H, T, D).

    q: (B, H, T, D) and k, v: (B, G, T, D), rotated at chunk.position_ids. frequencies: of the layer, None without
    positions. Shapes depend on the chunk's width alone, and nothing waits for the device.
    """
    size = held.block_size
    block = chunk.position_ids // size
    place, text = chunk.position_ids - block, chunk.real & (chunk.position_ids % size < size - 1)
    # Of the text before the chunk, the oldest first: where it stands, counted from the tail block's first token on.
    before = chunk.tail[:, None] - torch.arange(held.length, 0, -1, device=q.device)
    keys, values, real = held.of(chunk.rows)
    stored = turned(keys, before - before % (size - 1), frequencies)
    places = TextPlaces(
        torch.cat([before, place], dim=1),
        torch.cat([torch.zeros_like(before), block], dim=1),
        torch.cat([real, text], dim=1),
        # What is not there is of no document, and padding of one of its own.
        torch.cat([real.long() - 1, 2 * chunk.real.long() - 2], dim=1),
    )
    out = attend(
        turned(q, -block, frequencies),
        torch.cat([stored, turned(k, -block, frequencies)], dim=2),
        torch.cat([values, v], dim=2),
        places,
        held.length + 1,
        front=held.length,
        reach=reach(held.length + 1, size),
        scale=scale,
        softcap=softcap,
        sinks=sinks,
    )
    held.append(turned(k, -block * size, frequencies), v, text, chunk.rows)
    return out


def reach(window: int, block_size: int) -> int:
    """The furthest that a key which is seen can be behind its query in the stream, with even blocks."""
    return window + window // (block_size - 1) + 1
