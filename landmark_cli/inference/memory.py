"""What one row of a reader has read: kept in memory, and in a file.

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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landmark_cli.attention.cache import HeldBlocks, HeldText
from landmark_cli.file_errors import reading, writing
from landmark_cli.file_reading import parse_json
from landmark_cli.file_writing import unfinished
from landmark_cli.inference.memory_fit import TEXT_DECIDES, VERSION, About, version_of
from landmark_cli.inference.stored_blocks import THREADS, BlockFile, Span, StoredBlocks, checksums_of
from landmark_cli.model_files import check_header
from landmark_cli.on_disk import settle
from landmark_cli.schema import check
from landmark_cli.sealed import sealed_content, unsealed_content

NO_MEMORY = "it holds no memory of a reader; landmark generate --save-memory writes one"
OTHER_VERSION = {
    True: "it was written by a newer version of this program: update it, or read the text anew",
    False: "it was written by an older version of this program: read the text anew",
}


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
        path = Path(path)
        with reading(path, what):
            found = os.stat(path)
            if not stat.S_ISREG(found.st_mode):
                raise ValueError("it is no ordinary file")
            check_header(path, found.st_size)
            stored = BlockFile(path, what)
            with _opened(path) as file:
                metadata = file.metadata() or {}
                if "landmark" not in metadata:
                    raise ValueError(NO_MEMORY)
                header = check(_Header, unsealed_content(parse_json(metadata["landmark"].encode())))
                version = header.about.get("version")
                if version not in (VERSION, TEXT_DECIDES):
                    raise ValueError(OTHER_VERSION[isinstance(version, int) and version > VERSION])
                about = check(About, header.about)
                expected = version_of(about.rerank_blocks, about.block_temperature)
                if version != expected:
                    raise ValueError(OTHER_VERSION[version > expected])
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


def _opened(path: Path) -> Any:
    """The file by its library, whose words for a file of another kind or length say nothing to who named it."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        said = str(error)
        if any(sign in said for sign in ("header too large", "header too small")):
            raise ValueError(NO_MEMORY) from error
        if any(sign in said for sign in ("invalid header length", "incomplete metadata")):
            raise ValueError("it is longer or shorter than it was written") from error
        raise


def sha256_of(tensor: Tensor) -> str:
    """Of a contiguous tensor's bytes."""
    return hashlib.sha256(tensor.cpu().reshape(-1).view(torch.uint8).numpy()).hexdigest()


def _name(layer: int, part: str) -> str:
    """Of a tensor in a file."""
    return f"layers.{layer}.{part}"
