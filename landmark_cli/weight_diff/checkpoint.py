"""Directories of weights, read piece by piece from memory-mapped files: safetensors and `.bin`, whole or in shards."""

from __future__ import annotations

import math
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from landmark_cli import file_reading
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.file_errors import reading
from landmark_cli.model_files import MAX_JSON_BYTES, check_link, inside, tell_of_hub
from landmark_cli.weight_diff.bits import ITEM_BYTES, pattern
from landmark_cli.weight_diff.shards import BinShard, SafetensorsShard

# Pages of the mapped files count as this process's memory until they are given back, which happens each time this many
# bytes have been read. A .bin file has to be opened anew to give them back, so that happens less often.
RELEASE_BYTES = {".safetensors": 64 << 20, ".bin": 256 << 20}

WHOLE_FILES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")


@dataclass(frozen=True)
class Tensor:
    """What one tensor of a checkpoint is, without its values. dtype: as in safetensors files, "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * ITEM_BYTES[self.dtype]

    @property
    def size(self) -> str:
        """The shape in words: "300 x 64"."""
        return " x ".join(map(str, self.shape)) or "one number"


class Checkpoint:
    """The tensors of one directory, in the files' order.

    role: what error messages call it, such as "--path-raw".
    files: the weight files where the caller knows them, by tensor; else found as the transformers library finds them.
    Raises LandmarkError naming the file that is missing, truncated, outside of the directory or not readable.
    """

    def __init__(self, folder: Path, role: str, files: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.role = role
        self.config = read_json(folder / "config.json", role)
        placed = self._find_files() if files is None else {name: self.inside(file) for name, file in files.items()}
        self.files = sorted(set(placed.values()))
        self.shards = {file: open_shard(file, role) for file in self.files}
        self.tensors: dict[str, Tensor] = {}
        self.aliases: dict[str, str] = {}
        self._shard_of: dict[str, SafetensorsShard | BinShard] = {}
        for file, shard in self.shards.items():
            for name, (dtype, shape) in shard.tensors.items():
                if "" in placed or placed.get(name) == file:
                    self.tensors[name] = Tensor(name, dtype, shape)
                    self._shard_of[name] = shard
            known = self.tensors.keys()
            self.aliases.update({name: of for name, of in shard.aliases.items() if name in known and of in known})
        for name, file in placed.items():
            if name and name not in self.tensors:
                raise LandmarkError(f"{role} {folder}: {file.name} lacks {name}, which the index says it holds")
        self._lock = threading.Lock()
        self._read_bytes = 0
        self._touched: set[SafetensorsShard | BinShard] = set()
        self._release_bytes = max(RELEASE_BYTES[file.suffix] for file in self.files)

    @property
    def vocab_size(self) -> int | None:
        """Rows of the embedding according to the configuration."""
        inner = self.config.get("text_config")
        size = (inner if isinstance(inner, dict) else self.config).get("vocab_size")
        return size if type(size) is int else None

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements start..stop of a tensor, flat, as bit patterns; a view of the mapped file, to be used soon."""
        dtype = pattern(self.tensors[name].dtype)
        if stop <= start:
            return np.empty(0, dtype)
        shard = self._shard_of[name]
        with self._lock:
            self._touched.add(shard)
            self._read_bytes += (stop - start) * dtype.itemsize
            if self._read_bytes >= self._release_bytes:
                self._read_bytes = 0
                while self._touched:
                    self._touched.pop().release()
        return shard.read(name, start, stop, dtype)

    def inside(self, file: str) -> Path:
        """The path of a file of this directory by the name that an index gives. Raises LandmarkError for a file
        outside."""
        path = inside(self.folder, file, self.role)
        if path.suffix not in RELEASE_BYTES:
            raise LandmarkError(f'{self.role} {self.folder}: its index names "{file}", neither .safetensors nor .bin')
        return path

    def _find_files(self) -> dict[str, Path]:
        """The file of each tensor, by the tensor's name; a single file of all tensors stands under the name ""."""
        found = next((self.folder / name for name in WHOLE_FILES if os.path.lexists(self.folder / name)), None)
        if found is None:
            stray = sorted(path.name for kind in RELEASE_BYTES for path in self.folder.glob(f"*{kind}"))
            hint = f"; {stray[0]} is there, but no index file names it" if stray else ""
            raise LandmarkError(f"{self.role} {self.folder}: no weights found ({', '.join(WHOLE_FILES)}){hint}")
        if found.suffix != ".json":
            return {"": self.inside(found.name)}
        index = read_json(found, self.role).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
            raise LandmarkError(f"{self.role} {found}: no weight_map that says which file holds which tensor")
        return {name: self.inside(file) for name, file in index.items()}


def locate(name: str, role: str, *patterns: str) -> Path:
    """The directory of weights that a path or a hub id names; from the hub, the files that match are fetched.

    patterns: files to fetch besides the configuration, the tokenizer and the weights.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UsageError(f"{role} {name}: this is a file; give the directory it is in")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise UsageError(f"{role} {name}: there is no such directory")
    from huggingface_hub import snapshot_download

    tell_of_hub(name)
    wanted = ["*.json", "*.model", "*.txt", "*.jinja", *patterns]
    with reading(name, role, to_do="it is no directory here, and the hub did not give it"):
        folder = Path(snapshot_download(name, allow_patterns=[*wanted, "model*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*wanted, "pytorch_model*.bin"]))
    return folder


def read_json(path: Path, role: str) -> dict[str, Any]:
    """A JSON object from a file of a directory of weights. Raises LandmarkError naming the file if it holds none."""
    if not os.path.lexists(path):
        raise LandmarkError(f"{role} {path.parent}: it has no {path.name}")
    check_link(path.parent, path, role)
    return file_reading.read_json(path, role, max_bytes=MAX_JSON_BYTES)


def open_shard(file: Path, role: str) -> SafetensorsShard | BinShard:
    """A file of weights, by its ending. Raises LandmarkError where it is missing or damaged."""
    if not os.path.exists(file):
        raise LandmarkError(f"{role} {file.parent}: {file.name} is missing")
    with reading(file, role):
        return (SafetensorsShard if file.suffix == ".safetensors" else BinShard)(file)
