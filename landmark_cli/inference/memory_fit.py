"""Whether a reader may go on from what another has read: what memories depend on, and where two readers differ."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

from landmark_cli.errors import LandmarkError, UsageError, shown
from landmark_cli.models.layers import key_heads, landmark_layers
from landmark_cli.models.quantization import quantization_of, weights_by_name
from landmark_cli.models.rotary import angles_of, inverse_frequencies
from landmark_cli.softmax import softmax_of

if TYPE_CHECKING:
    from landmark_cli.inference.block_reader import BlockReader
    from landmark_cli.inference.memory import Memory

VERSION = 3
# Of a memory that was read with settings which older programs do not know, and would leave out.
TEXT_DECIDES = 4


@dataclass(frozen=True)
class About:
    """What a memory depends on: reading on from it is as if nothing had come between only where all of these agree.

    version: of the file. model: see `model_hash`. dtype: of keys and values. quantization: of the weights.
    landmark_softmax: of the model's config. The others are the reader's settings, by the names of its options.
    """

    version: int
    model: str
    dtype: str
    landmark_freq: int
    top_k_blocks: int
    chunk: int
    cache_blocks: int | None
    selection: str
    positions: str
    context_miss_cutoff: float
    quantization: str = "none"
    landmark_softmax: str = "grouped"
    rerank_blocks: int | None = None
    block_temperature: float = 1.0


def about(reader: BlockReader) -> About:
    """What the memories of a reader depend on. Worked out once: a model's weights stay what they are while it reads."""
    if reader.about is None:
        settings = reader.cache.settings
        reader.about = About(
            version_of(settings.rerank_blocks, settings.block_temperature),
            model_hash(reader.model),
            str(reader.model.dtype).removeprefix("torch."),
            reader.landmark_freq,
            settings.top_k,
            reader.chunk,
            settings.cache_blocks,
            settings.selection,
            settings.positions,
            settings.context_miss_cutoff,
            quantization_of(reader.model),
            softmax_of(reader.model.config),
            settings.rerank_blocks,
            settings.block_temperature,
        )
    return reader.about


def version_of(rerank_blocks: int | None, block_temperature: float) -> int:
    """That of the memories of a reader with these settings."""
    return VERSION if rerank_blocks is None and block_temperature == 1.0 else TEXT_DECIDES


def model_hash(model: PreTrainedModel) -> str:
    """A hash of all that decides what a model makes of a text: its weights as they are stored, bit by bit, and its
    rotary angles. It comes of sums that are worked out where the weights lie and are the same on every device."""
    config = model.config
    digest = hashlib.sha256(f"{config.model_type} {config.landmark_token_id}".encode())
    # By few digits: libraries work the angles out in different orders.
    digest.update(_by_few_digits(inverse_frequencies(model)))
    with_landmarks = landmark_layers(config)
    for layer in range(config.num_hidden_layers):
        if layer not in with_landmarks:
            digest.update(f"{layer} {getattr(config, 'sliding_window', None)}".encode())
            digest.update(_by_few_digits(angles_of(model, layer).values))
    for name, weight in sorted(weights_by_name(model).items()):
        digest.update(f"{name} {weight}".encode())
    return digest.hexdigest()


def _by_few_digits(angles: Tensor) -> bytes:
    return str([f"{angle:.5g}" for angle in angles.tolist()]).encode()


def require_fit(reader: BlockReader, memory: Memory) -> None:
    """Raise UsageError naming the first thing in which a memory's reader and this one differ."""
    mine, named = about(reader), f"--memory {memory.path}" if memory.path else "the memory"
    # Of another dtype, or quantized, the weights differ too, and would be called another model's.
    for part in sorted(fields(About), key=lambda part: part.name not in ("dtype", "quantization")):
        theirs, ours = getattr(memory.about, part.name), getattr(mine, part.name)
        # What is of another version differs in a setting too, which says more.
        if theirs == ours or part.name == "version":
            continue
        if part.name == "model":
            raise UsageError(
                f"{named} was read by another model, {shown(memory.model_name)}: its weights are not those of "
                f"{reader.model.name_or_path or 'this one'}; open that model, or read the text anew"
            )
        if part.name == "landmark_softmax":
            raise UsageError(
                f"{named} was read by a model whose landmark_softmax is {theirs}, and that of "
                f"{reader.model.name_or_path or 'this one'} is {ours}: open the model as it was, or read the text anew"
            )
        option = f"--{part.name.replace('_', '-')}"
        raise UsageError(
            f"{named} was read with {option} {_word(theirs)}, and this is to be read with {_word(ours)}: "
            f"{f'leave {option} out' if theirs is None else f'give {option} {theirs}'}, or read the text anew"
        )
    # What the hash of a model's weights decides cannot differ, unless somebody made the file by hand.
    blocks = memory.held_blocks.blocks
    config = reader.model.config
    heads, _ = key_heads(config, landmark_layers(config)[0])
    known = 0 <= int(memory.text.min()) <= int(memory.text.max()) < config.vocab_size
    if (len(memory.layers), blocks.shape[0]) != (config.num_hidden_layers, heads) or not known:
        raise LandmarkError(f"{named} does not fit the model that it names: read the text anew")


def _word(value: Any) -> str:
    return "none" if value is None else str(value)
