"""Writing a directory of safetensors shards that is either finished or does not exist."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.file_writing import check_folder
from landmark_cli.locks import LOCK, sole_writer
from landmark_cli.on_disk import flush
from landmark_cli.weight_diff.bits import ITEM_BYTES
from landmark_cli.weight_diff.checkpoint import Tensor

MARKER = ".landmark-unfinished"
# What the marker file holds when all else is written: a kill may come after the directory is renamed and before the
# marker is removed.
FINISHED = b"finished\n"
FLUSH_BYTES = 128 << 20


@dataclass(frozen=True)
class ShardPlan:
    """One file to write: its header, and where in it each tensor's bytes begin."""

    name: str
    header: bytes
    offsets: dict[str, int]
    nbytes: int


def plan_shards(tensors: Iterable[Tensor], max_bytes: int, stem: str, metadata: dict[str, str]) -> list[ShardPlan]:
    """Split tensors into files of at most `max_bytes`, in order; a tensor larger than that has a file of its own.

    The files are called STEM.safetensors, or STEM-00001-of-00003.safetensors if there are several.
    """
    groups: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not groups or tensor.nbytes > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(tensor)
        room -= tensor.nbytes
    total = len(groups)
    names = [f"{stem}-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
    names = names if total > 1 else [f"{stem}.safetensors"]
    return [_plan_shard(name, group, metadata) for name, group in zip(names, groups, strict=True)]


def _plan_shard(name: str, tensors: Sequence[Tensor], metadata: dict[str, str]) -> ShardPlan:
    # Wide elements first, so that every tensor's bytes are aligned to its elements.
    ordered = sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor.dtype])
    entries: dict[str, object] = {"__metadata__": metadata}
    offsets, end = {}, 0
    for tensor in ordered:
        offsets[tensor.name], begin, end = end, end, end + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return ShardPlan(name, header, {key: len(header) + at for key, at in offsets.items()}, len(header) + end)


class ShardWriter:
    """The planned files of one directory being written, any piece from any thread; the disk is kept busy meanwhile.

    A context manager: when its block ends well, everything is on the disk.
    """

    def __init__(self, folder: Path, plans: Iterable[ShardPlan]) -> None:
        self._places: dict[str, tuple[int, int]] = {}
        self._files: list[int] = []
        self._waiting = 0
        self._flush = threading.Event()
        self._ended = False
        self._failure: OSError | None = None
        for plan in plans:
            file = os.open(folder / plan.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            self._files.append(file)
            _reserve(file, plan.nbytes)
            self._places.update({name: (file, offset) for name, offset in plan.offsets.items()})
            _write_at(file, memoryview(plan.header), 0)
        self._flusher = threading.Thread(target=self._keep_flushing, daemon=True)

    def __enter__(self) -> ShardWriter:
        self._flusher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended = True
        self._flush.set()
        self._flusher.join()
        try:
            if kind is None:
                if self._failure is not None:
                    raise self._failure
                for file in self._files:
                    os.fsync(file)
        finally:
            for file in self._files:
                os.close(file)

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Put elements of a tensor, beginning with element `start`."""
        file, offset = self._places[name]
        _write_at(file, memoryview(values).cast("B"), offset + start * values.itemsize)
        self._waiting += values.nbytes
        if self._waiting >= FLUSH_BYTES:
            self._waiting = 0
            self._flush.set()

    def _keep_flushing(self) -> None:
        try:
            while self._flush.wait() and not self._ended:
                self._flush.clear()
                for file in self._files:
                    os.fdatasync(file)
        except OSError as error:
            self._failure = error


def _reserve(file: int, nbytes: int) -> None:
    """Take the room on the disk now: a full disk shows at once, and writing becomes several times as fast (on ext4)."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise


def _write_at(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


@contextmanager
def new_directory(path: Path, role: str, *, overwrite: bool, keep: Iterable[Path]) -> Iterator[Path]:
    """A directory to write into, which becomes `path` if the block ends well and is removed if it does not.

    Until then the directory stands beside `path` as PATH.unfinished; what a killed run left there is thrown away.
    overwrite: replace the model directory that `path` is. keep: directories that must not be replaced.
    Raises UsageError for a path that cannot be made or replaced, LandmarkError if another run is writing it.
    """
    path = path.expanduser().resolve()
    _check_target(path, role, overwrite, keep)
    staging, replaced = path.with_name(f"{path.name}.unfinished"), path.with_name(f"{path.name}.replaced")
    with ExitStack() as held:
        _claim(staging, role, held)
        try:
            # Another run may have written `path` since it was checked, and that must not be replaced unasked.
            _check_target(path, role, overwrite, keep)
            if path.exists():
                held.enter_context(sole_writer(path))
            yield staging
            flush(staging)
            if path.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                path.rename(replaced)
            (staging / MARKER).write_bytes(FINISHED)
            staging.rename(path)
            (path / MARKER).unlink()
            flush(path.parent)
            shutil.rmtree(replaced, ignore_errors=True)
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise LandmarkError(f"{role} {path}: the disk became full; nothing was left there") from error
            raise
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def check_target(path: Path, role: str, overwrite: bool) -> None:
    """Raise, before anything is fetched or read, as `new_directory` would afterwards."""
    path = path.expanduser().resolve()
    _remove_marker(path)
    _check_target(path, role, overwrite, ())
    # Folders above it that are missing are made once there is something to write.
    check_folder(next(folder for folder in path.parents if folder.exists()), role)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a small file so that it is on the disk afterwards."""
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def _check_target(path: Path, role: str, overwrite: bool, keep: Iterable[Path]) -> None:
    if path.exists() and not path.is_dir():
        raise UsageError(f"{role} {path}: this is a file; give a new directory")
    if path.is_mount():
        raise UsageError(f"{role} {path}: this is a mount point, which cannot be replaced; give a directory below it")
    for other in keep:
        if path.exists() and path.resolve() in (other.resolve(), *other.resolve().parents):
            raise UsageError(f"{role} {path}: the directory {other} that is read here would be lost; give another one")
    if path.is_dir() and any(file.name != LOCK for file in path.iterdir()):
        if not overwrite:
            raise UsageError(f"{role} {path}: the directory is not empty; --overwrite replaces it")
        if not (path / "config.json").is_file():
            raise UsageError(f"{role} {path}: not a model directory (no config.json), so --overwrite leaves it alone")


def _remove_marker(path: Path) -> None:
    """Take the marker out of a directory that was finished and named, but whose run was killed right then."""
    marker = path / MARKER
    if marker.is_file() and marker.read_bytes() == FINISHED:
        marker.unlink()


def _claim(staging: Path, role: str, held: ExitStack) -> None:
    """Take an empty staging directory, locked until `held` ends."""
    if staging.is_dir() and any(staging.iterdir()) and not (staging / MARKER).exists():
        raise UsageError(f"{role}: {staging} is in the way, and no unfinished run left it; move it away")
    held.enter_context(sole_writer(staging, MARKER))
    for leftover in staging.iterdir():
        if leftover.name != MARKER:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
