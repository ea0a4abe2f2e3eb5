"""What reading a text takes and what a token of it sees, told from a model's config and the settings, without reading.

Every number is that of the reader which would do it: the chunk, where it stands, the room that its block cache makes.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from landmark_cli.attention.cache import RetrievalSettings
from landmark_cli.attention.cache.blocks import capacity_for
from landmark_cli.attention.cache.cache import added_blocks
from landmark_cli.attention.cache.pages import Offload, pinned_bytes
from landmark_cli.data.landmarks import stream_length
from landmark_cli.inference.chunk_lengths import default_chunk, positions_of
from landmark_cli.inference.readers import layer_token_bytes
from landmark_cli.inference.settings import ReadingSettings
from landmark_cli.models.layers import key_heads, landmark_layers, window_of_all


@dataclass(frozen=True)
class ReadingPlan:
    """What reading one text takes. Lengths are text tokens, unless they are said to be positions.

    length: of the text. top_k_blocks: None for full attention, as the model has it without landmarks.
    chunk: tokens read at a time. positions: that a chunk needs, landmarks included; what is beyond those that the model
    was trained at it has never seen.
    sees: the most tokens that a query reads in a layer with landmarks: those of its chunk before it, with those that
    stood in the incomplete block when the chunk began, and those of the blocks that it retrieves.
    compared: the most keys that a query is compared with there: the landmarks of the blocks that it chooses from, the
    tokens of those that they propose, where blocks are re-ranked, and the tokens and landmarks that it reads.
    cache: bytes of keys and values, in all layers. on_gpu: how many of them stand in the GPU's memory beside what lies
    in the host's, where blocks are offloaded; None where they are not.
    """

    length: int
    top_k_blocks: int | None
    chunk: int
    positions: int
    sees: int
    compared: int
    cache: int
    on_gpu: int | None = None


def plan_reading(model: PreTrainedModel, length: int, settings: ReadingSettings) -> ReadingPlan:
    """What reading `length` text tokens with these settings takes.

    model: a model with landmarks, on any device, the meta device too, in the dtype that it would be read in. settings:
    without a context-miss cutoff, which changes nothing of this. Raises LandmarkError where they do not fit the model.
    """
    config = model.config
    size, freq = config.landmark_freq + 1, config.landmark_freq
    top_k = config.top_k_blocks if settings.top_k_blocks is None else settings.top_k_blocks
    chunk = settings.chunk or default_chunk(config.trained_length, top_k, freq, config.name_or_path)
    retrieval = RetrievalSettings(size, top_k, cache_blocks=settings.cache_blocks)
    bound = retrieval.retrievable
    # As BlockReader.expect tells the cache before the text is read.
    expected = (stream_length(length, freq) + 1) // size + 1
    capacity = sees = compared = 0
    for begin in range(0, length, chunk):
        blocks, tail = divmod(begin, freq)
        text = min(chunk, length - begin)
        stream = stream_length(tail + text, freq) - tail
        more, kept = added_blocks(stream, tail, size), min(blocks, bound)
        if kept + more > capacity:
            capacity = capacity_for(kept + more, expected, capacity, bound, more)
        retrieved = min(top_k, kept)
        sees = max(sees, tail + text + retrieved * freq)
        # Of the chunk's last token; the landmark of its own block is no key of it.
        own = tail + stream - ((tail + text) % freq == 0)
        reranked = proposed * freq if (proposed := min(settings.rerank_blocks or 0, kept)) > top_k > 0 else 0
        compared = max(compared, (kept if top_k else 0) + reranked + retrieved * freq + own)
    positions = positions_of(length, chunk, retrieval)
    cache, on_gpu = _bytes(model, capacity, settings.offload == "cpu")
    return ReadingPlan(length, top_k, min(chunk, length), positions, sees, compared, cache, on_gpu)


def plan_full_attention(model: PreTrainedModel, length: int) -> ReadingPlan:
    """What reading as many tokens in one piece takes, by the attention that a model has without landmarks, windows of
    its layers and all, whether or not it has positions for them."""
    config = model.config
    layers = range(config.num_hidden_layers)
    everywhere = window_of_all(config)
    local = layers if everywhere else set(layers) - set(landmark_layers(config))
    window = getattr(config, "sliding_window", None) or length
    held = (_token_bytes(model, layer) * (min(length, window - 1) if layer in local else length) for layer in layers)
    sees = min(length, everywhere or length)
    return ReadingPlan(length, None, length, length, sees, sees, sum(held))


def least_file(model: PreTrainedModel, length: int, settings: ReadingSettings) -> int:
    """Bytes that a memory of so many text tokens takes in a file at the least: its whole blocks."""
    blocks = length // model.config.landmark_freq
    if settings.cache_blocks is not None:
        blocks = min(blocks, settings.cache_blocks)
    of_block = (model.config.landmark_freq + 1) * layer_token_bytes(model)
    return len(landmark_layers(model.config)) * blocks * of_block


def layers_to_get_landmarks(config: PreTrainedConfig) -> list[int] | None:
    """The layers of a decoder that `add_landmarks` gives landmarks, by what its config says of them: those that see
    everything where others have a sliding window; None for all."""
    kinds = getattr(config, "layer_types", None) or []
    full = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
    return full if 0 < len(full) < len(kinds) else None


def _bytes(model: PreTrainedModel, capacity: int, offloaded: bool) -> tuple[int, int | None]:
    """Of a row with room for so many blocks in every layer with landmarks: the bytes of all, and of those on the GPU
    where blocks are offloaded."""
    config, size = model.config, model.config.landmark_freq + 1
    layers, of_token = landmark_layers(config), layer_token_bytes(model)
    others = set(range(config.num_hidden_layers)) - set(layers)
    windows = sum((config.sliding_window - 1) * _token_bytes(model, layer) for layer in others)
    # Each block's last key is kept once more, side by side with those of the others.
    landmark_keys = len(layers) * capacity * of_token // 2
    of_layer = capacity * size * of_token
    if not offloaded:
        return len(layers) * of_layer + landmark_keys + windows, None
    resident = min(Offload(len(layers)).resident_bytes, len(layers) * of_layer)
    on_gpu = landmark_keys + windows + resident
    return len(layers) * pinned_bytes(of_layer) + on_gpu, on_gpu


def _token_bytes(model: PreTrainedModel, layer: int) -> int:
    """Bytes of one token's keys and values in a layer."""
    heads, head_dim = key_heads(model.config, layer)
    return 2 * heads * head_dim * model.dtype.itemsize
