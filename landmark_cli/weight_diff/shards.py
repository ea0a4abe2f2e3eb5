"""One file of weights, mapped into memory: its tensors' element types and shapes, and any piece of any tensor."""

from __future__ import annotations

import math
import mmap
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from landmark_cli.file_reading import parse_json
from landmark_cli.model_files import MAX_HEADER_BYTES
from landmark_cli.schema import check
from landmark_cli.weight_diff.bits import ITEM_BYTES

if TYPE_CHECKING:
    import torch

TORCH_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass
class _Place:
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


class SafetensorsShard:
    """A safetensors file: eight bytes of header length, a JSON header, the tensors' bytes.

    tensors: (element type, shape) by name, in the order of the bytes. metadata: what else the header says. Raises
    ValueError for a file of another format, and what `file_errors.reading` turns into an error that names the file.
    """

    aliases: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            _refuse_pointer(start)
            if len(start) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"truncated or not a safetensors file ({size} bytes)")
            header = parse_json(file.read(length))
            metadata = header.pop("__metadata__", None)
            self.metadata = metadata if isinstance(metadata, dict) else {}
            found = [(name, check(_Place, place, name)) for name, place in header.items()]
            entries = sorted(found, key=lambda entry: entry[1].data_offsets)
            self.tensors = {name: (place.dtype, tuple(place.shape)) for name, place in entries}
            self._offsets = {name: tuple(place.data_offsets) for name, place in entries}
            self._check(size - 8 - length)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._data = 8 + length

    def _check(self, data_bytes: int) -> None:
        end = 0
        for name, (dtype, shape) in self.tensors.items():
            if dtype not in ITEM_BYTES:
                raise ValueError(f"{name} has the element type {dtype}, which is not supported")
            if len(self._offsets[name]) != 2 or min(shape, default=0) < 0:
                raise ValueError(f"its header gives {name} a place that is none")
            start, stop = self._offsets[name]
            if start != end or stop - start != math.prod(shape) * ITEM_BYTES[dtype]:
                raise ValueError(f"its header gives {name} a place that does not fit")
            end = stop
        if end != data_bytes:
            what = "truncated" if end > data_bytes else "longer than its header says"
            raise ValueError(f"{what}: {data_bytes} bytes of tensors where the header promises {end}")

    def read(self, name: str, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
        """Elements start..stop (start < stop) of a tensor as a view of the mapping."""
        offset = self._data + self._offsets[name][0] + start * dtype.itemsize
        return np.frombuffer(self._map, dtype, stop - start, offset)

    def release(self) -> None:
        """Give the pages read so far back; views of these pages stay valid and read the file again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


class BinShard:
    """A file of `torch.save` holding tensors by name, opened with weights_only and mapped.

    aliases: tensors that are the same memory as an earlier one, by name.
    Raises ValueError for a file that is truncated, holds anything but tensors, or is of the format before PyTorch 1.6.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.metadata: dict[str, str] = {}
        self.tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.aliases: dict[str, str] = {}
        self._copies: dict[str, np.ndarray] = {}
        self._state = self._load()
        seen: dict[tuple, str] = {}
        for name, tensor in self._state.items():
            dtype = TORCH_NAMES.get(str(tensor.dtype).removeprefix("torch."))
            if dtype is None or str(tensor.layout) != "torch.strided":
                raise ValueError(f"{name} is a {tensor.layout} tensor of {tensor.dtype}, which is not supported")
            self.tensors[name] = dtype, tuple(tensor.shape)
            place = tensor.data_ptr(), dtype, tuple(tensor.shape), tensor.stride()
            if tensor.numel() and seen.setdefault(place, name) != name:
                self.aliases[name] = seen[place]

    def _load(self) -> dict[str, torch.Tensor]:
        import torch

        from landmark_cli.torch_files import load_weights

        with self._path.open("rb") as file:
            _refuse_pointer(file.read(8))
        try:
            state = load_weights(self._path)
        except pickle.UnpicklingError:
            raise ValueError("it holds other things than weights, which may be code; it was not opened") from None
        except (RuntimeError, EOFError, KeyError) as error:
            raise ValueError(f"truncated or damaged ({next(iter(str(error).splitlines()), '')})") from None
        if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise ValueError("it does not hold tensors by name")
        return {str(name): tensor.detach() for name, tensor in state.items()}

    def read(self, name: str, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
        """Elements start..stop (start < stop) of a tensor as a view of the mapping, or of a copy if it has strides."""
        tensor = self._state[name]
        if tensor.is_contiguous():
            return _bytes(tensor).view(dtype)[start:stop]
        copy = self._copies.get(name)
        if copy is None:
            copy = self._copies[name] = _bytes(tensor.contiguous()).view(dtype)
        if stop == tensor.numel():
            self._copies.pop(name, None)
        return copy[start:stop]

    def release(self) -> None:
        """Give the pages read so far back, by opening the file anew; views of these pages stay valid."""
        self._state = self._load()


def _refuse_pointer(start: bytes) -> None:
    if start.startswith(b"version "):
        raise ValueError("a Git LFS pointer, not the weights themselves: fetch them with `git lfs pull`")


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy()
