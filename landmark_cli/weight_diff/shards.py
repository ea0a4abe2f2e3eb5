"""One file of weights, mapped into memory: its tensors' element types and shapes, and any piece of any tensor."""

from __future__ import annotations

import json
import math
import mmap
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from landmark_cli.weight_diff.bits import ITEM_BYTES

if TYPE_CHECKING:
    import torch

LONGEST_HEADER = 100_000_000
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


class SafetensorsShard:
    """A safetensors file: eight bytes of header length, a JSON header, the tensors' bytes.

    tensors: (element type, shape) by name, in the order of the bytes. Raises ValueError for a file that is not one.
    """

    aliases: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            _refuse_pointer(start)
            if len(start) < 8 or length > min(LONGEST_HEADER, size - 8):
                raise ValueError(f"truncated or not a safetensors file ({size} bytes)")
            try:
                header = json.loads(file.read(length))
                header.pop("__metadata__", None)
                entries = sorted(header.items(), key=lambda entry: entry[1]["data_offsets"])
                self.tensors = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries}
                self._offsets = {name: tuple(entry["data_offsets"]) for name, entry in entries}
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError("its header is not one of a safetensors file") from None
            self._check(size - 8 - length)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._data = 8 + length

    def _check(self, data_bytes: int) -> None:
        end = 0
        for name, (dtype, shape) in self.tensors.items():
            if dtype not in ITEM_BYTES:
                raise ValueError(f"{name} has the element type {dtype}, which is not supported")
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
        """Give the pages read so far back; views of them stay valid and read the file again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


class BinShard:
    """A file of `torch.save` holding tensors by name, opened with weights_only and mapped.

    aliases: tensors that are the same memory as an earlier one, by name.
    Raises ValueError for a file that is truncated, holds anything but tensors, or is of the format before PyTorch 1.6.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
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

        with self._path.open("rb") as file:
            start = file.read(8)
        _refuse_pointer(start)
        if not start.startswith(b"PK"):
            raise ValueError("not a zip file of torch.save; one from before PyTorch 1.6 has to be saved again")
        try:
            state: Any = torch.load(self._path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError:
            raise ValueError("it holds other things than weights, which may be code; it was not opened") from None
        except (RuntimeError, EOFError, KeyError) as error:
            raise ValueError(f"truncated or damaged ({next(iter(str(error).splitlines()), '')})") from None
        if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise ValueError("it does not hold tensors by name")
        return {name: tensor.detach() for name, tensor in state.items()}

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
        """Give the pages read so far back, by opening the file anew; views of them stay valid."""
        self._state = self._load()


def _refuse_pointer(start: bytes) -> None:
    if start.startswith(b"version "):
        raise ValueError("a Git LFS pointer, not the weights themselves: fetch them with `git lfs pull`")


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy()
