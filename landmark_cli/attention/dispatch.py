"""Where transformers' attention layers enter: what each of them asks of landmark attention."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from landmark_cli.softmax import is_joint

from . import local
from .backends import BACKENDS
from .cache import BlockCache, Chunk, Passage, most_side_by_side
from .dropout import layer_seed
from .functional import as_autocast, attend_chunk, attend_window, in_rows, landmark_attention, one_row, reader_name
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
    landmark_observer: Callable[[nn.Module, Tensor, Tensor, float | None], None] | None = None,
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
    landmark_observer: is called with the module, query, key and scaling of a layer that has landmarks. Returns
    (B, T, H, D) and None: attention weights are never formed. module.config says whether landmarks share attention out
    or only choose (see softmax.py); what reads on through a cache or by a window has to have been made for the same.

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
        landmark_observer(module, query, key, scaling)
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
            most = 0
            if not kind.local and landmark_cache.trace is None:
                reader = reader_name(query, landmark_cache.settings.block_size, context_miss_key, softcap, s_aux)
                if BACKENDS[reader].stores_first:
                    most = most_side_by_side(query, landmark_cache.settings.top_k)
            with landmark_cache.streamed(layer):
                out = landmark_chunk.read(attend, query, key, value, most=most)
        else:
            out = attend(query, key, value, landmark_chunk)
        return out.transpose(1, 2).contiguous(), None
    if landmark_window is not None:
        _check_window(landmark_window, attention_mask, landmark_layout, context_miss_key)
        if kind.local:
            given = landmark_window, sliding_window, kind.frequencies
            out = local.attend_window(*as_autocast(query, key, value), *given, **logits)
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
        out = local.attend_input(*as_autocast(query, key, value), sliding_window, **given, **logits)
        return out.transpose(1, 2).contiguous(), None
    rows = None
    if layout.cu_seqlens is not None and query.shape[0] > 1:
        rows, (query, key, value) = query.shape[0], (one_row(x) for x in (query, key, value))
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
        joint=is_joint(module.config),
        **logits,
    )
    return (out if rows is None else in_rows(out, rows)).transpose(1, 2).contiguous(), None


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


__all__ = ["LandmarkLayout", "landmark_attention_forward", "register"]
