"""Where transformers' attention layers enter: what is asked of landmark attention, and the backend that answers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from . import local, operators, reference, retrieval_window, window_operators
from .backends import BACKENDS, FEW_QUERIES, Problem, choose
from .cache import BlockCache, Chunk, Passage
from .dropout import layer_seed
from .layer_kind import is_first, kind_of
from .masks import no_mask, padding_mask
from .recurrent import recurrent_attention_forward
from .window import ReadingWindow


class LandmarkLayout:
    """Blocks of a forward pass where the model's even ones do not say it all; the fields are landmark_attention's.

    cu_seqlens: boundaries of packed documents, counted over all rows one after the other; every row begins one.

    backend: the name of one of `backends.BACKENDS`, instead of what `backends.choose` finds.
    Give it to any landmark model as `model(..., landmark_layout=LandmarkLayout(...))`.
    """

    def __init__(
        self,
        block_size: int | None = None,
        landmark_mask: Tensor | None = None,
        start: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        dropout_p: float = 0.0,
        dropout_seed: int | Tensor | None = None,
        controlled: Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        self.block_size = block_size
        self.landmark_mask = landmark_mask
        self.start = start
        self.cu_seqlens = cu_seqlens
        self.dropout_p = dropout_p
        self.dropout_seed = dropout_seed
        self.controlled = controlled
        self.backend = backend


def landmark_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    landmark_cache: BlockCache | None = None,
    landmark_chunk: Chunk | Passage | None = None,
    landmark_layout: LandmarkLayout | None = None,
    landmark_window: ReadingWindow | None = None,
    landmark_observer: Callable[[int, Tensor, Tensor, float | None], None] | None = None,
    context_miss_key: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """What transformers calls for `attn_implementation="landmark"`.

    query: (B, H, T, D); key, value: (B, G, T, D), rotated. landmark_cache, landmark_chunk: read on through the cache,
    of which the input is this chunk or passage (see BlockCache.inputs). landmark_window: read the input chunk by chunk,
    all at once; it is rotated at the window's position_ids. Otherwise attend within the input, whose landmarks stand at
    every (module.config.landmark_freq + 1)-th position unless landmark_layout says otherwise. attention_mask: (B, T)
    bool where some row is padded on the left, from which its blocks then count. softcap, s_aux: of the logits, and the
    heads' sinks (see reference.landmark_attention). sliding_window: what a layer that keeps its window sees.
    landmark_observer: is called with the number, query, key and scaling of a layer that has landmarks. Returns
    (B, T, H, D) and None: attention weights are never formed.

    Of these arguments, what is not a tensor comes to every layer as it is, and so is of a plain class: dataclasses,
    named tuples, lists and dicts among a layer's arguments are made anew for every layer by FSDP, with their floating
    point numbers in the precision of its weights.

    Raises ValueError for what would change the result and cannot be honoured: a 4-D mask, and in a layer with landmarks
    a sliding window shorter than the input (or than the positions that reading takes).
    """
    kind, layer = kind_of(module), module.layer_idx
    reach = key.shape[2] if landmark_window is None else landmark_window.settings.positions
    if landmark_chunk is not None:
        reach = landmark_chunk.width
    if kind.local and sliding_window is None:
        raise ValueError(f"config.landmark_layers leaves layer {layer} its sliding window, and it has none")
    _check_arguments(reach, attention_mask, None if kind.local else sliding_window)
    if landmark_observer is not None and not kind.local:
        landmark_observer(layer, query, key, scaling)
    query, key = kind.half_split(query, key)
    logits = {"scale": scaling, "softcap": softcap, "sinks": s_aux}
    if landmark_chunk is not None:
        if kind.local:
            held = landmark_cache.window(layer, key, sliding_window)

            def attend(q: Tensor, k: Tensor, v: Tensor, chunk: Chunk) -> Tensor:
                return local.attend_chunk(q, k, v, held, chunk.to(k.device), kind.frequencies, **logits)
        else:
            given = logits | {"context_miss_key": context_miss_key, "rotated": kind.turns != "none"}

            def attend(q: Tensor, k: Tensor, v: Tensor, chunk: Chunk) -> Tensor:
                return attend_chunk(layer, q, k, v, landmark_cache, chunk, **given)

        if isinstance(landmark_chunk, Passage):
            stores_first = False
            if not kind.local and landmark_cache.trace is None:
                reader = _reader(query, landmark_cache.settings.block_size, context_miss_key, softcap, s_aux)
                stores_first = BACKENDS[reader].stores_first
            with landmark_cache.streamed(layer):
                out = landmark_chunk.read(attend, query, key, value, side_by_side=stores_first)
        else:
            out = attend(query, key, value, landmark_chunk)
        return out.transpose(1, 2).contiguous(), None
    if landmark_window is not None:
        _check_window(landmark_window, attention_mask, landmark_layout, context_miss_key)
        if kind.local:
            given = landmark_window, sliding_window, kind.frequencies
            out = local.attend_window(*_as_autocast(query, key, value), *given, **logits)
        else:
            window = landmark_window.unrotated if kind.turns == "none" else landmark_window
            first = is_first(module)
            # Its number is read where it draws by it alone. Else it counts whether it is the first one, so that what
            # is compiled for a layer serves the others: torch before 2.13 compiles for the number of each.
            number = module.layer_idx if window.explore else int(not first)
            out = attend_window(number, query, key, value, window, first=first, **logits)
        return out.transpose(1, 2).contiguous(), None
    layout = landmark_layout or LandmarkLayout()
    block_size = layout.block_size
    if block_size is None and layout.landmark_mask is None:
        block_size = _block_size(module.config)
    start = layout.start
    if start is None and attention_mask is not None:
        start = (attention_mask.cumsum(-1) == 0).sum(-1)
    if kind.local:
        blocks = {"block_size": block_size, "landmark_mask": layout.landmark_mask}
        given = blocks | {"start": start, "cu_seqlens": layout.cu_seqlens, "frequencies": kind.frequencies}
        given["backend"] = layout.backend
        out = local.attend_input(*_as_autocast(query, key, value), sliding_window, **given, **logits)
        return out.transpose(1, 2).contiguous(), None
    rows = None
    if layout.cu_seqlens is not None and query.shape[0] > 1:
        rows, (query, key, value) = query.shape[0], (_one_row(x) for x in (query, key, value))
    seed = layout.dropout_seed
    out = landmark_attention(
        query,
        key,
        value,
        block_size=block_size,
        landmark_mask=layout.landmark_mask,
        start=start,
        cu_seqlens=layout.cu_seqlens,
        dropout_p=layout.dropout_p,
        dropout_seed=None if seed is None else layer_seed(seed, layer),
        context_miss_key=context_miss_key,
        controlled=layout.controlled,
        backend=layout.backend,
        **logits,
    )
    return (out if rows is None else _in_rows(out, rows)).transpose(1, 2).contiguous(), None


@overload
def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int | None = None,
    *,
    return_lse: Literal[False] = False,
    **arguments: Any,
) -> Tensor: ...
@overload
def landmark_attention(
    q: Tensor, k: Tensor, v: Tensor, block_size: int | None = None, *, return_lse: Literal[True], **arguments: Any
) -> tuple[Tensor, Tensor]: ...
def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int | None = None,
    *,
    landmark_mask: Tensor | None = None,
    scale: float | None = None,
    start: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    context_miss_key: Tensor | None = None,
    controlled: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention in which a query reaches an earlier block only through that block's landmark (arXiv 2305.16300,
    section 3.1): what a model of one's own puts in place of `scaled_dot_product_attention(q, k, v, is_causal=True)`.

    q: (B, H, T, D), rotated, as k is: rotary embedding comes first. k, v: (B, G, T, D), where G divides H. Of each
    block of `block_size` tokens the last is its landmark; `landmark_cli.insert_landmarks` puts landmarks into text.
    Returns (B, H, T, D) in q's dtype, and can be differentiated and compiled. Fused kernels run on an NVIDIA GPU, on
    any other device plain PyTorch. Landmarks predict nothing: their outputs have no target.

    landmark_mask: (B, T) bool in place of block_size, for blocks of any size. scale: factor on the logits, 1 / sqrt(D).
    start: (B,) the first real key of each row. cu_seqlens: (n + 1,) documents packed into a single row. dropout_p,
    dropout_seed: group dropout. context_miss_key, controlled: see docs/semantics.md, section 5. softcap: bound of
    the logits. sinks: (H,) logits of attention sinks. return_lse: also return
    the log-sum-exp of the outer softmax, (B, H, T) float32. backend: the name of one, instead of what
    `backends.choose` finds. `reference.landmark_attention` is the definition of all of these.

    Under autocast it computes in autocast's dtype, as torch's own attention: rotated queries and keys come in float32,
    values do not. Raises ValueError naming an argument that cannot be.

    >>> import torch
    >>> q = torch.randn(2, 8, 128, 64)
    >>> k, v = torch.randn(2, 2, 2, 128, 64)
    >>> landmark_cli.landmark_attention(q, k, v, block_size=32).shape
    torch.Size([2, 8, 128, 64])
    """
    q, k, v, context_miss_key = _as_autocast(q, k, v, context_miss_key)
    reference.check_shapes(q, k, v)
    # Numbers also where a compiled model's lengths are symbols, for a choice is made of constants.
    block_size = None if block_size is None else operator.index(block_size)
    few_queries = True if q.shape[2] < FEW_QUERIES else False
    dropout = True if dropout_p > 0.0 else False
    problem = Problem(
        str(q.device),
        q.dtype,
        operator.index(q.shape[-1]),
        None if landmark_mask is not None else block_size,
        few_queries=few_queries,
        padded=start is not None,
        packed=cu_seqlens is not None,
        dropout=dropout,
        context_miss=context_miss_key is not None,
        softcap=softcap is not None,
        sinks=sinks is not None,
    )
    name = choose(problem, backend)
    arguments = {
        "block_size": block_size,
        "scale": scale,
        "start": start,
        "cu_seqlens": cu_seqlens,
        "dropout_p": dropout_p,
        "dropout_seed": dropout_seed,
        "softcap": softcap,
        "sinks": sinks,
        "return_lse": return_lse,
    }
    if BACKENDS[name].forward is not None:
        return operators.attend(q, k, v, backend=name, **arguments)
    arguments |= {"landmark_mask": landmark_mask, "context_miss_key": context_miss_key, "controlled": controlled}
    return _definition(q, k, v, **arguments)


def _as_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype, where there is autocast."""
    kind = tensors[0].device.type
    if kind not in ("cuda", "cpu") or not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(x if x is None else x.to(torch.get_autocast_dtype(kind)) for x in tensors)


# They ask tensors for numbers, so torch.compile would cut them in pieces: a compiled model calls them as they are.
_definition = torch.compiler.disable(reference.landmark_attention)
_retrieve_by_definition = torch.compiler.disable(retrieval_window.retrieve_window)
_select_by_definition = torch.compiler.disable(retrieval_window.select_in_window)


def attend_chunk(
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: BlockCache,
    chunk: Chunk,
    scale: float | None = None,
    context_miss_key: Tensor | None = None,
    backend: str | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    rotated: bool = True,
) -> Tensor:
    """`retrieval.attend_chunk` of a layer in the backend that `backends.choose` finds, or is named: (B, H, T, D).

    q: (B, H, T, D) and k, v: (B, G, T, D), rotated at chunk.position_ids, unless `rotated` says that the layer has no
    positions. The cache's trace holds what was read.

    Raises LandmarkError where more blocks are to be retrieved than the kernels can.
    """
    chunk = chunk.to(k.device)
    chunk = chunk if rotated else chunk.unrotated
    blocks = cache.layer(layer, k, chunk, rotated)
    name = _reader(q, blocks.settings.block_size, context_miss_key, softcap, sinks, backend)
    cache.backends.add(name)
    # Who cannot have these is not chosen where there are some.
    given = {name: value for name, value in (("softcap", softcap), ("sinks", sinks)) if value is not None}
    read = BACKENDS[name].read(q, k, v, blocks, chunk, scale, context_miss_key, cache.trace is not None, **given)
    cache.record(layer, chunk, read.ages, read.shares, read.dropped)
    return read.out


def _reader(
    q: Tensor,
    block_size: int,
    context_miss_key: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    backend: str | None = None,
) -> str:
    """The name of the backend that reads chunks through the cache; arguments as of `attend_chunk`."""
    problem = Problem(
        str(q.device),
        q.dtype,
        q.shape[-1],
        block_size,
        context_miss=context_miss_key is not None,
        reading=True,
        differentiated=torch.is_grad_enabled() and q.requires_grad,
        softcap=softcap is not None,
        sinks=sinks is not None,
    )
    return choose(problem, backend)


def attend_window(
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: ReadingWindow,
    scale: float | None = None,
    backend: str | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    first: bool | None = None,
) -> Tensor:
    """Read a window's chunks, each through the blocks of those before it, all at once: (B, H, N, D), differentiable.

    The same as `attend_chunk` for one chunk after the other. q: (B, H, N, D) and k, v: (B, G, N, D), rotated at
    window.position_ids. Each part, within chunks and of retrieved blocks, is made by the backend that `backends.choose`
    finds for it, or that is named; padding gives zeros. first: whether this is layer 0, where who calls knows it.
    """
    q, k, v = _as_autocast(q, k, v)
    given = {"scale": scale, "softcap": softcap, "sinks": sinks}
    out, lse = _attend_within_chunks(q, k, v, window, backend, given)
    if min(window.top_k, window.most_earlier) == 0:
        return out
    dim, block_size, top_k = (operator.index(n) for n in (q.shape[-1], window.block_size, window.top_k))
    # Sinks have their share of what was found within the chunks already.
    problem = Problem(str(q.device), q.dtype, dim, block_size, retrieving=top_k, softcap=softcap is not None)
    name = choose(problem, backend)
    if BACKENDS[name].retrieve_forward is None:
        return _join(out, lse, *_retrieve_by_definition(q, k, v, window, scale, layer, softcap=softcap))
    # Only selections that nobody shares are made by kernels.
    shared = window.selection != "per_token_and_head"
    ages = _select_by_definition(q, k, window, scale, layer, softcap) if shared else None
    given = {"backend": name, "ages": ages, "softcap": softcap, "first": first}
    return window_operators.retrieve(q, k, v, window, scale, layer, (out, lse), **given)[0]


def _attend_within_chunks(
    q: Tensor, k: Tensor, v: Tensor, window: ReadingWindow, backend: str | None, given: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """(out (B, H, N, D), lse (B, H, N)) of what each token finds in its own chunk: a batch of chunks. given: what makes
    its logits."""
    batch, heads, tokens, dim = q.shape
    given = given | {"block_size": window.block_size, "backend": backend, "return_lse": True}
    if not window.even:
        out, lse = landmark_attention(*map(_one_row, (q, k, v)), cu_seqlens=window.own_bounds, **given)
        out, lse = _in_rows(out, batch), lse.view(heads, batch, tokens).transpose(0, 1)
        padding = (window.chunk_of < 0)[:, None]
        return out.masked_fill(padding.unsqueeze(-1), 0.0), lse.masked_fill(padding, -torch.inf)
    chunks = -(-tokens // window.chunk)
    if chunks == 1:
        return landmark_attention(q, k, v, **given)
    # The last chunk is filled up behind its tokens, where none of them looks.
    missing = chunks * window.chunk - tokens

    def fold(x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
        return x.reshape(batch * chunks, window.chunk, *x.shape[2:]).transpose(1, 2)

    out, lse = landmark_attention(fold(q), fold(k), fold(v), **given)
    out = out.transpose(1, 2).reshape(batch, -1, heads, dim)[:, :tokens].transpose(1, 2)
    lse = lse.view(batch, chunks, heads, -1).transpose(1, 2).reshape(batch, heads, -1)[..., :tokens]
    return out, lse


def _join(out: Tensor, lse: Tensor, retrieved: Tensor, retrieved_lse: Tensor) -> Tensor:
    """One attention out of two over different keys: outputs (B, H, N, D), log-sum-exps of their logits (B, H, N)."""
    both = torch.stack([lse, retrieved_lse])
    total = torch.logsumexp(both.masked_fill(both == -torch.inf, torch.finfo(both.dtype).min), dim=0)
    share = torch.exp(both - total).unsqueeze(-1)
    return (out * share[0] + retrieved * share[1]).to(out.dtype)


def _one_row(x: Tensor) -> Tensor:
    """(B, H, T, D) -> (1, H, B * T, D), a view where a token's heads lie side by side."""
    return x.transpose(1, 2).reshape(1, -1, x.shape[1], x.shape[3]).transpose(1, 2)


def _in_rows(x: Tensor, rows: int) -> Tensor:
    """The inverse of `_one_row`."""
    return x.transpose(1, 2).reshape(rows, -1, x.shape[1], x.shape[3]).transpose(1, 2)


def _check_window(
    window: ReadingWindow, mask: Tensor | None, layout: LandmarkLayout | None, context_miss_key: Tensor | None
) -> None:
    if mask is not None and window.start is None:
        raise ValueError("attention_mask hides the beginnings of rows: make landmark_window with start")
    if layout is not None:
        raise ValueError("landmark_layout and landmark_window exclude each other")
    if context_miss_key is not None:
        raise ValueError("landmark_window: a model with a context-miss token is not trained as it reads")


def _check_arguments(reach: int, attention_mask: Tensor | None, sliding_window: int | None) -> None:
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask has {attention_mask.dim()} dimensions; landmark attention takes (B, T) padding"
        )
    if sliding_window is not None and reach > sliding_window:
        raise ValueError(f"sliding_window is {sliding_window}, shorter than the input of {reach} tokens")


def _block_size(config) -> int:
    landmark_freq = getattr(config, "landmark_freq", None)
    if landmark_freq is None:
        raise ValueError(
            'attn_implementation "landmark" needs config.landmark_freq; '
            "landmark_cli.models.decoders.add_landmarks prepares a model"
        )
    return landmark_freq + 1


def register() -> None:
    """Make "landmark" an attention implementation of the transformers library."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("landmark", landmark_attention_forward)
    AttentionMaskInterface.register("landmark", padding_mask)
    AttentionInterface.register("transformer_xl", recurrent_attention_forward)
    AttentionMaskInterface.register("transformer_xl", no_mask)


__all__ = ["LandmarkLayout", "landmark_attention", "landmark_attention_forward", "register"]
