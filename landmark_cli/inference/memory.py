"""What a reader has read, taken out of it: kept in memory, written to a file, and given to a reader to read on from.

A memory is one row's: of every layer the blocks that can still be retrieved and the incomplete one, with their
landmarks' keys once more, or, where the layer keeps a sliding window, the text that it still sees; the counts that say
where the next token stands; and the text itself. Its file is safetensors:

    layers.0.blocks, layers.1.blocks, ...   (G, n, 2, block_size, D), as attention/cache/blocks.py has them
    layers.0.landmark_keys, ...             (G, n, D)
    layers.0.checksums, ...                 (G, n) int64, of each block what stored_blocks.py adds up
    layers.2.keys, layers.2.values, ...     (G, m, D), as attention/cache/layer_window.py has them, where there are such
    text                                    (tokens,) int32
    __metadata__.landmark                   JSON: what `About` has, a sha256 of every tensor but the blocks, which have
                                            checksums of their own, and a checksum of all that

All but the blocks is read, and compared with what was written, when a file is opened; a block when it is first chosen
(stored_blocks.py). Of the n blocks the last is the incomplete one. docs/semantics.md says what several files one after
another mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from landmark_cli.attention.cache import HeldBlocks, HeldText
from landmark_cli.errors import LandmarkError, UsageError, shown
from landmark_cli.file_errors import reading, writing
from landmark_cli.file_reading import parse_json
from landmark_cli.file_writing import unfinished
from landmark_cli.inference.stored_blocks import THREADS, BlockFile, Span, StoredBlocks, checksums_of, cut
from landmark_cli.inference.stored_blocks import in_order as blocks_in_order
from landmark_cli.model_files import check_header
from landmark_cli.models.layers import key_heads, landmark_layers
from landmark_cli.models.quantization import quantization_of, weights_by_name
from landmark_cli.models.rotary import angles_of, inverse_frequencies
from landmark_cli.on_disk import settle
from landmark_cli.schema import check
from landmark_cli.sealed import sealed_content, unsealed_content
from landmark_cli.softmax import softmax_of

if TYPE_CHECKING:
    from landmark_cli.inference.block_reader import BlockReader

VERSION = 3
OTHER_VERSION = {
    True: "it was written by a newer version of this program: update it, or read the text anew",
    False: "it was written by an older version of this program: read the text anew",
}


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


@dataclass
class _Header:
    """The JSON in a file's header. blocks: complete ones, evicted ones counted; tail: stream tokens of the incomplete
    one. model_name: for messages. text_sha256: of the text's ids as little-endian int32."""

    about: dict[str, Any]
    model_name: str
    blocks: int
    tail: int
    text_sha256: str
    sha256: dict[str, str]


@dataclass
class Memory:
    """What one row has read.

    about: what it depends on. blocks, tail: complete blocks, evicted ones counted, and stream tokens of the incomplete
    block. layers: of each layer what `copy_of` of the cache gives of a row, of which blocks may lie in a file still.
    text: (tokens,) int32. path: the file it was opened from, if any; model_name: for messages.
    """

    about: About
    model_name: str
    blocks: int
    tail: int
    layers: list[HeldBlocks | HeldText] = field(repr=False)
    text: Tensor = field(repr=False)
    path: Path | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Memory:
        """Itself: nothing of it is ever changed."""
        return self

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for layer in self.layers for part in layer) + self.text.nbytes

    @property
    def gpu(self) -> torch.device | None:
        """Where tensors of it lie if not in host memory."""
        parts = (part for layer in self.layers for part in layer)
        return next((part.device for part in parts if isinstance(part, Tensor) and part.is_cuda), None)

    @property
    def held_blocks(self) -> HeldBlocks | None:
        """Those of the first layer that has blocks; all have as many."""
        return next((of_layer for of_layer in self.layers if isinstance(of_layer, HeldBlocks)), None)

    def save(self, path: str | Path, what: str = "") -> None:
        """Write the memory to a file, whole or not at all. what: the option that names the file, for messages.

        Raises LandmarkError where it cannot be written, or blocks of it cannot be read from where they lie.
        """
        from safetensors.torch import save_file

        tensors = {"text": self.text.cpu().contiguous()}
        for index, of_layer in enumerate(self.layers):
            for part, held in of_layer._asdict().items():
                held = held.contiguous() if isinstance(held, Tensor) else held.whole()
                if part == "blocks":
                    tensors[_name(index, "checksums")] = checksums_of(held).cpu()
                tensors[_name(index, part)] = held.cpu()
        sha256 = {name: sha256_of(tensor) for name, tensor in tensors.items() if not name.endswith(".blocks")}
        header = _Header(asdict(self.about), self.model_name, self.blocks, self.tail, sha256["text"], sha256)
        metadata = {"landmark": json.dumps(sealed_content(asdict(header)))}
        with writing(path, what), unfinished(Path(path)) as file:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, file, metadata)
            settle(file)

    @classmethod
    def open(cls, path: str | Path, what: str = "") -> Memory:
        """Open a file that `save` wrote. Its blocks stay there until they are read; all else is compared with what was
        written. what: the option that names the file, for messages.

        Raises LandmarkError where it is no such file, damaged, or another version's.
        """
        from safetensors import safe_open

        path = Path(path)
        with reading(path, what):
            found = os.stat(path)
            if not stat.S_ISREG(found.st_mode):
                raise ValueError("it is no ordinary file")
            check_header(path, found.st_size)
            stored = BlockFile(path, what)
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if "landmark" not in metadata:
                    raise ValueError("it holds no memory of a reader; landmark generate --save-memory writes one")
                header = check(_Header, unsealed_content(parse_json(metadata["landmark"].encode())))
                version = header.about.get("version")
                if version != VERSION:
                    raise ValueError(OTHER_VERSION[isinstance(version, int) and version > VERSION])
                about = check(About, header.about)
                # Copies: what the library gives are views of a mapping.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys() if not name.endswith(".blocks")}
            with ThreadPoolExecutor(THREADS) as pool:
                sha256 = dict(zip(tensors, pool.map(sha256_of, tensors.values()), strict=True))
            if sha256 != header.sha256:
                raise ValueError("its content is not what was written to it")
            begin, entries = stored.header()
            layers: list[HeldBlocks | HeldText] = []
            while True:
                part = partial(_name, len(layers))
                if (name := part("blocks")) in entries:
                    place, kind = entries[name], getattr(torch, about.dtype)
                    shape, checksums = torch.Size(place["shape"]), tensors[part("checksums")]
                    if place["data_offsets"][1] - place["data_offsets"][0] != shape.numel() * kind.itemsize:
                        raise ValueError(f"{name} is not of {about.dtype}")
                    span = Span(stored, begin + place["data_offsets"][0], shape, kind, checksums, name)
                    layers.append(HeldBlocks(StoredBlocks([(span, 0, shape[1])]), tensors[part("landmark_keys")]))
                elif part("keys") in tensors:
                    layers.append(HeldText(tensors[part("keys")], tensors[part("values")]))
                else:
                    break
            memory = cls(about, header.model_name, header.blocks, header.tail, layers, tensors["text"], path)
            memory._check()
            return memory

    def _check(self) -> None:
        """Raise ValueError where counts, shapes and types are not those of one row's memory."""
        about, held = self.about, self.blocks if self.about.cache_blocks is None else self.about.cache_blocks
        size = about.landmark_freq + 1
        whole = 0 <= self.tail < size and len(self.text) == self.blocks * about.landmark_freq + self.tail > 0
        count = min(self.blocks, held) + 1
        for of_layer in self.layers:
            if isinstance(of_layer, HeldBlocks):
                blocks = of_layer.blocks
                heads, _, _, _, head_dim = blocks.shape
                expected = (heads, count, 2, size, head_dim), (heads, count, head_dim)
                whole &= isinstance(blocks, Tensor) or all(
                    part.checksums.shape == part.shape[:2] for part, *_ in blocks.runs
                )
            else:
                heads, tokens, head_dim = of_layer.keys.shape
                expected = ((heads, min(tokens, len(self.text)), head_dim),) * 2
            whole &= tuple(part.shape for part in of_layer) == expected
            whole &= {str(part.dtype) for part in of_layer} == {f"torch.{about.dtype}"}
        if not whole or self.held_blocks is None or self.text.dtype != torch.int32:
            raise ValueError("its counts and its tensors do not fit each other")


def take(reader: BlockReader, row: int = 0) -> Memory:
    """A copy of what a row of a reader has read, on the device where its blocks lie. Raises LandmarkError where that is
    nothing."""
    cache = reader.cache
    if not reader.texts[row]:
        raise LandmarkError("nothing has been read yet, so there is no memory to keep")
    text = torch.frombuffer(reader.texts[row], dtype=torch.int32).clone()
    name = reader.model.name_or_path or type(reader.model).__name__
    return Memory(about(reader), name, cache.host_blocks[row], cache.host_tail[row], cache.copy_of(row), text)


def give(reader: BlockReader, memories: Sequence[Memory], row: int = 0) -> None:
    """Have a row of a reader go on from what was read, instead of what it has read itself: several memories are a
    library, read in order (see `joined`).

    Raises UsageError naming what does not fit the reader.
    """
    for memory in memories:
        require_fit(reader, memory)
    _put(reader, joined(memories), row)


def recall(reader: BlockReader, paths: Sequence[str | Path], row: int = 0, what: str = "") -> None:
    """Have a row of a reader go on from files, as `give` does. Files that the row went on from last, and that are what
    they were then, are not opened again: what of them the row still holds stays there.

    Raises LandmarkError where they cannot be read, UsageError naming what does not fit the reader.
    """
    files = tuple(_identity(path, what) for path in paths)
    before, memory = reader.recalled.pop(row, (None, None))
    if before != files:
        opened = [Memory.open(path, what) for path in paths]
        for each in opened:
            require_fit(reader, each)
        memory = joined(opened)
    _put(reader, memory, row)
    reader.recalled[row] = files, memory


def _identity(path: str | Path, what: str) -> tuple[int, ...]:
    """What differs where a path leads to another file than before, or to one that was written to."""
    with reading(path, what):
        found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _put(reader: BlockReader, memory: Memory, row: int) -> None:
    try:
        reader.cache.put(row, memory.layers, memory.blocks, memory.tail)
    except LandmarkError:
        # A part of the layers has it: the row has read nothing.
        reader.forget(row)
        raise
    reader.texts[row] = array("i", memory.text.numpy().tobytes())


def joined(memories: Sequence[Memory]) -> Memory:
    """One memory of several of the same reader's: their complete blocks one after another, numbered through, then the
    incomplete block of the last. The incomplete blocks of the others, which have no landmark, are left out. Layers with
    a sliding window see the text of the last alone.

    Raises UsageError where positions are absolute: a block then has its place in the text that it was read in.
    """
    if len(memories) == 1:
        return memories[0]
    *before, last = memories
    if last.about.positions == "absolute":
        raise UsageError("--memory: several with absolute positions cannot be read one after another; give one")
    bound = last.about.cache_blocks
    # An older block than the cache keeps is as good as evicted.
    kept = slice(None if bound is None else -bound - 1, None)

    layers: list[HeldBlocks | HeldText] = []
    for of_layer in zip(*(memory.layers for memory in memories), strict=True):
        if isinstance(of_layer[-1], HeldText):
            layers.append(of_layer[-1])
            continue
        *ended, (end, end_keys) = of_layer
        # A text shorter than a block has no complete one.
        complete = [cut(part, 0, part.shape[1] - 1) for part, _ in ended if part.shape[1] > 1]
        blocks = blocks_in_order([*complete, cut(end, 0, end.shape[1])])
        keys = torch.cat([*(keys[:, :-1].cpu() for _, keys in ended), end_keys.cpu()], dim=1)[:, kept]
        layers.append(HeldBlocks(cut(blocks, blocks.shape[1] - keys.shape[1], blocks.shape[1]), keys))
    text = torch.cat([*(memory.text[: len(memory.text) - memory.tail] for memory in before), last.text])
    return replace(last, blocks=sum(memory.blocks for memory in memories), layers=layers, text=text, path=None)


def about(reader: BlockReader) -> About:
    """What the memories of a reader depend on. Worked out once: a model's weights stay what they are while it reads."""
    if reader.about is None:
        settings = reader.cache.settings
        reader.about = About(
            VERSION,
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
        )
    return reader.about


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


def sha256_of(tensor: Tensor) -> str:
    """Of a contiguous tensor's bytes."""
    return hashlib.sha256(tensor.cpu().reshape(-1).view(torch.uint8).numpy()).hexdigest()


def _name(layer: int, part: str) -> str:
    """Of a tensor in a file."""
    return f"layers.{layer}.{part}"


def require_fit(reader: BlockReader, memory: Memory) -> None:
    """Raise UsageError naming the first thing in which a memory's reader and this one differ."""
    mine, named = about(reader), f"--memory {memory.path}" if memory.path else "the memory"
    # Of another dtype, or quantized, the weights differ too, and would be called another model's.
    for part in sorted(fields(About), key=lambda part: part.name not in ("dtype", "quantization")):
        theirs, ours = getattr(memory.about, part.name), getattr(mine, part.name)
        if theirs == ours:
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
            f"{named} was read with {option} {_word(theirs)}, and this is to be read with {_word(ours)}: give {option} "
            f"{_word(theirs)}, or read the text anew"
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
