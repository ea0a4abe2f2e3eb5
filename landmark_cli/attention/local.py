"""Layers with a sliding window in a stream with landmarks: the definition, and where kernels that do the same enter.

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

from . import local_operators
from .backends import BACKENDS, Problem, choose
from .cache import Chunk, LayerWindow, rolled
from .operators import check_scale, check_sinks, check_softcap
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


def turned(x: Tensor, by: tuple[Tensor, Tensor] | None) -> Tensor:
    """x, (B, H, T, D), rotated by a table of angles; as it is in a layer without positions, which has none."""
    return x if by is None else rotate(x, *by)


def turns(by: Tensor, frequencies: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The table of rotations by so many positions, (B or 1, T), for all heads; None without positions."""
    if frequencies is None:
        return None
    cos, sin = rotation_table(by, frequencies.to(by.device))
    return cos[:, None], sin[:, None]


def first_seen(places: TextPlaces, window: int) -> Tensor:
    """(B or 1, T) int32: the first token that each may see of its row, if it is text. Never falls along a row.

    What a token sees is then the text from there up to itself, and itself: in a row documents follow one another, and
    places rise within each.
    """
    document = places.document
    begins = torch.nn.functional.pad(document[:, 1:] != document[:, :-1], (1, 0))
    # Documents so far apart that no window reaches from one into another.
    order = (begins.long().cumsum(-1) << 33) + places.place
    return torch.searchsorted(order, order - (min(window, 1 << 32) - 1), out_int32=True)


def backend_of(q: Tensor, name: str | None = None, reading: bool = False) -> str:
    """The name of the backend that `choose` finds for a layer with a sliding window, or that is asked for."""
    differentiated = reading and torch.is_grad_enabled() and q.requires_grad
    problem = Problem(
        str(q.device),
        q.dtype,
        operator.index(q.shape[-1]),
        None,
        reading=reading,
        differentiated=True if differentiated else False,
        local=True,
    )
    return choose(problem, name)


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
    backend: str | None = None,
    **logits: Any,
) -> Tensor:
    """Attention within an input, of which landmarks are a part: (B, H, T, D).

    q: (B, H, T, D) and k, v: (B, G, T, D), rotated at consecutive positions. window: text tokens that a query sees,
    itself included. block_size to cu_seqlens: see `text_places`. frequencies: (rotary_dim / 2,) of the layer, None
    without positions. backend: see functional.landmark_attention. logits: scale, softcap and sinks.
    """
    batch, length = q.shape[0], operator.index(q.shape[2])
    mask = landmark_mask
    given = {"block_size": block_size, "start": start, "cu_seqlens": cu_seqlens, "batch": batch}
    places = text_places(length, q.device, landmark_mask=mask, **given)
    back = turns(-places.ahead, frequencies)
    furthest = reach(window, block_size) if mask is None else None
    return _attend_all(turned(q, back), turned(k, back), v, places, window, furthest, backend, **logits)


def attend_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    read: ReadingWindow,
    window: int,
    frequencies: Tensor | None,
    backend: str | None = None,
    **logits: Any,
) -> Tensor:
    """As `attend_input`, in a window that is read chunk by chunk: q and k are rotated at its position_ids. A layer that
    keeps its sliding window rolls on from chunk to chunk, so it is as if there were none."""
    places, missing = window_places(read.chunk_of, read.chunks, read.block_size)
    on, furthest = turns(missing, frequencies), reach(window, read.block_size)
    return _attend_all(turned(q, on), turned(k, on), v, places, window, furthest, backend, **logits)


def _attend_all(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: TextPlaces,
    window: int,
    furthest: int | None,
    backend: str | None,
    **logits: Any,
) -> Tensor:
    """Attention of all tokens, rotated at their places, in the backend that serves: (B, H, T, D)."""
    name = backend_of(q, backend)
    if BACKENDS[name].local_forward is None:
        return attend(q, k, v, places, window, reach=furthest, **logits)
    return local_operators.attend(q, k, v, first_seen(places, window), places.text, backend=name, **logits)


class _ChunkPlaces:
    """Where a chunk's tokens and the text that a layer holds stand; what all layers that hold as much have in common.

    place, block: (B, T), text and landmarks before each of the chunk's tokens, from the tail block's first token on.
    text: (B, T) bool, which are text. before: (B, length), where the text before the chunk stands, the oldest first.
    first: (B, T) int32, of that text and the chunk, the first that each of the chunk's tokens may see. source: see
    cache.rolled.
    """

    def __init__(self, chunk: Chunk, length: int, block_size: int) -> None:
        freq, device, tail = block_size - 1, chunk.counters.device, chunk.tail[:, None]
        self.real = chunk.real
        self.block = chunk.position_ids // block_size
        self.place = chunk.position_ids - self.block
        self.text = chunk.real & (chunk.position_ids % block_size < freq)
        self.before = tail - torch.arange(length, 0, -1, device=device)
        self.source = rolled(self.text, length)
        self._to_held, self._before = -self.block * block_size, self.before - self.before % freq
        self._tables: dict[int, tuple] = {}
        # The text `length` before a token is held where the chunk has no more than `count` before it.
        count, furthest = self.place - tail, self.place - length
        within = length + furthest + furthest // freq - tail + chunk.start[:, None]
        itself = torch.arange(length, length + chunk.width, device=device)
        first = torch.where(count < length, count, within)
        self.first = torch.where(chunk.real, first, itself).int()

    def tables(self, frequencies: Tensor | None) -> tuple:
        """The rotations of: queries and keys to their places, held keys to theirs, and keys to what is held of them."""
        if id(frequencies) not in self._tables:
            by = -self.block, self._before, self._to_held
            self._tables[id(frequencies)] = tuple(turns(x, frequencies) for x in by)
        return self._tables[id(frequencies)]

    def places(self, real: Tensor) -> TextPlaces:
        """Of what is held, of which `real` says whether there is such a token, and the chunk."""
        return TextPlaces(
            torch.cat([self.before, self.place], dim=1),
            torch.cat([torch.zeros_like(self.before), self.block], dim=1),
            torch.cat([real, self.text], dim=1),
            # What is not there is of no document, and padding of one of its own.
            torch.cat([real.long() - 1, 2 * self.real.long() - 2], dim=1),
        )


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
    backend: str | None = None,
) -> Tensor:
    """Attend from a chunk to the text that the layer still holds and to itself, then store its text: (B, H, T, D).

    q: (B, H, T, D) and k, v: (B, G, T, D), rotated at chunk.position_ids. frequencies: of the layer, None without
    positions. backend: see functional.landmark_attention. Shapes depend on the chunk's width alone, and nothing waits
    for the device.
    """
    name = backend_of(q, backend, reading=True)
    if (read := BACKENDS[name].local_read) is not None:
        check_sinks(sinks, q)
        return read(q, k, v, held, chunk, frequencies, check_scale(scale, q), check_softcap(softcap), sinks)
    length, size = held.length, held.block_size
    at = chunk.shared(("local", length, size), lambda: _ChunkPlaces(chunk, length, size))
    back, to_place, to_held = at.tables(frequencies)
    keys, values, real = held.of(chunk.rows)
    both = torch.cat([turned(keys, to_place), turned(k, back)], dim=2), torch.cat([values, v], dim=2)
    given = {"front": length, "reach": reach(length + 1, size), "scale": scale, "softcap": softcap, "sinks": sinks}
    out = attend(turned(q, back), *both, at.places(real), length + 1, **given)
    held.append(turned(k, to_held), v, at.text, chunk.rows, at.source)
    return out


def reach(window: int, block_size: int) -> int:
    """The furthest that a key which is seen can be behind its query in the stream, with even blocks."""
    return window + window // (block_size - 1) + 1
