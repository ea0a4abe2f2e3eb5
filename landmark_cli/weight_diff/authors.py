"""The weight difference as the landmark attention authors publish it.

Each tensor is tuned - raw in float32. Tuned has two tokens more than raw ([PAD] and <landmark>), whose rows were
subtracted from the mean of raw's rows, which is where fine-tuning began. One number is there to check: the sum of all
tuned tensors, in checksum_psum.txt; the authors' first release has no such file, and its sum is 49798.7656.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from landmark_cli.errors import LandmarkError, shown
from landmark_cli.file_errors import reading
from landmark_cli.file_reading import read_text
from landmark_cli.model_files import check_link
from landmark_cli.weight_diff import bits, manifest
from landmark_cli.weight_diff.checkpoint import Checkpoint, Tensor
from landmark_cli.weight_diff.make import DIFF
from landmark_cli.weight_diff.matching import Pair, is_parameter, pair
from landmark_cli.weight_diff.output import ShardWriter
from landmark_cli.weight_diff.stream import for_each_tensor, pieces

CHECKSUM = "checksum_psum.txt"
FIRST_RELEASE_SUM = 49798.7656
TOLERANCE = 1e-2
MAX_SUM_BYTES = 1000


class AuthorsDiff:
    """A difference of the authors' format over these raw weights. Raises LandmarkError if the models differ.

    tensors: what is recovered, in order, in float32. model_files: configuration and tokenizer to carry along, content
    by name; nothing tells whether these files are as they were written (verify is about the sum of the tensors).
    Buffers that only one side has are carried along.
    """

    def __init__(self, folder: Path, raw: Checkpoint, *, verify: bool) -> None:
        self.diff = Checkpoint(folder, DIFF)
        self.raw = raw
        if self.diff.config.get("model_type") == manifest.MODEL_TYPE:
            raise LandmarkError(f"{DIFF} {folder}: {manifest.MANIFEST} is missing; get the whole directory")
        self._pairs = {found.tensor.name: found for found in pair(self.diff, raw)}
        buffers = [t for name, t in raw.tensors.items() if name not in self.diff.tensors and not is_parameter(name)]
        self._raw_buffers = [buffer.name for buffer in buffers]
        self._sources = {tensor.name: tensor for tensor in [*self.diff.tensors.values(), *buffers]}
        self.tensors = [
            Tensor(name, "F32" if tensor.dtype in bits.CASTABLE else tensor.dtype, tensor.shape)
            for name, tensor in self._sources.items()
        ]
        self.model_files = manifest.model_files(folder, DIFF)

    def write(self, writer: ShardWriter, *, verify: bool, threads: int) -> str:
        """Write all tensors -> how they were checked. Raises LandmarkError if their sum is not the authors'."""

        def work(tensor: Tensor, check: Callable[[], None]) -> float:
            if tensor.name in self._raw_buffers or self._pairs[tensor.name].raw is None:
                return self._carry(tensor, writer)
            return self._add(self._pairs[tensor.name], writer, check)

        expected, told_by = self._expected_sum() if verify else (0.0, "")
        sums = for_each_tensor(self.tensors, work, threads=threads, description="recover")
        if not verify:
            return "not verified"
        # Added in the order of the files, which is that of the authors' model: the authors' sum is rounded on the way.
        of_diff = [sums[name] for name in self.diff.tensors]
        candidates = [*_total(of_diff), *_total(of_diff + [sums[name] for name in self._raw_buffers])]
        if not any(abs(total - expected) <= TOLERANCE for total in candidates):
            raise LandmarkError(
                f"the sum of the recovered tensors is {candidates[0]:.4f}, but {told_by} {expected:.4f}: a file is "
                f"damaged, {self.raw.role} is not the raw model, or {DIFF} is none; --no-verify keeps the result"
            )
        return f"the sum of all tensors is right ({candidates[0]:.4f})"

    def _expected_sum(self) -> tuple[float, str]:
        file = self.diff.folder / CHECKSUM
        if not file.exists():
            return FIRST_RELEASE_SUM, f"there is no {CHECKSUM}, and that of the authors' first release is"
        check_link(self.diff.folder, file, DIFF)
        text = read_text(file, DIFF, max_bytes=MAX_SUM_BYTES)
        with reading(file, DIFF, to_do="get the file again, or use --no-verify"):
            expected = float(text)
            if not math.isfinite(expected):
                raise ValueError(f"{text.strip()} is no sum")
            return expected, f"{CHECKSUM} says"

    def _carry(self, tensor: Tensor, writer: ShardWriter) -> float:
        """Write a tensor that only one side has -> its sum."""
        side = self.raw if tensor.name in self._raw_buffers else self.diff
        source = self._sources[tensor.name]
        values = side.read(tensor.name, 0, source.count)
        if source.dtype not in bits.CASTABLE:
            writer.write(tensor.name, 0, values)
            return 0.0
        numbers = bits.to_float32(values, source.dtype)
        if side is self.diff and tensor.name.endswith("rotary_emb.inv_freq") and not numbers.any():
            # The authors' version of transformers gave raw this buffer too, so the difference is zero; newer versions
            # do not store it.
            numbers = _inverse_frequencies(self.raw.config, source.count)
        writer.write(tensor.name, 0, numbers)
        return _sum(numbers)

    def _add(self, pair: Pair, writer: ShardWriter, check: Callable[[], None]) -> float:
        """Write diff + raw -> its sum."""
        tensor, raw = pair.tensor, pair.raw
        total = 0.0
        for start, stop in pieces(0, pair.shared, 4):
            check()
            numbers = bits.to_float32(self.diff.read(tensor.name, start, stop), tensor.dtype)
            numbers = numbers + bits.to_float32(self.raw.read(raw.name, start, stop), raw.dtype)
            writer.write(tensor.name, start, numbers)
            total += _sum(numbers)
        if pair.shared < tensor.count:
            new = bits.to_float32(self.diff.read(tensor.name, pair.shared, tensor.count), tensor.dtype)
            new = (new.reshape(-1, *tensor.shape[1:]) + self._mean_row(raw)).ravel()
            writer.write(tensor.name, pair.shared, new)
            total += _sum(new)
        return total

    def _mean_row(self, raw: Tensor) -> np.ndarray:
        """The mean of the rows in float32, by the authors' function and so with their rounding."""
        import torch

        rows = bits.to_float32(self.raw.read(raw.name, 0, raw.count), raw.dtype).reshape(raw.shape)
        return torch.from_numpy(np.require(rows, requirements="W")).mean(0).numpy()


def _sum(numbers: np.ndarray) -> float:
    return float(np.sum(numbers, dtype=np.float64))


def _total(sums: list[float]) -> tuple[float, float]:
    """The sum of the tensors' sums, exact and as a running float32: the authors' file holds one or the other."""
    running = np.float32(0)
    for value in sums:
        running = np.float32(running + np.float32(value))
    return sum(sums), float(running)


def _inverse_frequencies(config: dict, count: int) -> np.ndarray:
    import torch

    parameters = config.get("rope_parameters")
    base = config.get("rope_theta") or (parameters if isinstance(parameters, dict) else {}).get("rope_theta") or 10000.0
    if not isinstance(base, (int, float)) or not 0 < base < math.inf:
        raise LandmarkError(f"--path-raw: its config.json has the rope_theta {shown(base)}, which is none")
    return (1.0 / (base ** (torch.arange(0, 2 * count, 2).float() / (2 * count)))).numpy()
