"""raw weights and a difference -> the tuned model, a directory that the transformers library opens."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from landmark_cli import console
from landmark_cli.disk_room import check_space
from landmark_cli.errors import LandmarkError
from landmark_cli.weight_diff import authors, bits, manifest
from landmark_cli.weight_diff.checkpoint import Checkpoint, Tensor, locate
from landmark_cli.weight_diff.make import DIFF, RAW, TUNED
from landmark_cli.weight_diff.output import (
    ShardPlan,
    ShardWriter,
    check_target,
    new_directory,
    plan_shards,
    write_file,
)
from landmark_cli.weight_diff.stream import PIECE_BYTES, for_each_tensor, pieces


def recover(
    path_raw: str,
    path_diff: str,
    path_tuned: Path,
    *,
    verify: bool,
    max_shard_bytes: int,
    overwrite: bool,
    threads: int,
) -> None:
    """Write the directory `path_tuned`: the weights, configuration and tokenizer of the tuned model.

    path_diff: a directory or hub id of our format or the authors'. verify: check the sha256 of every tensor (our
    format) or the sum of all tensors (the authors'). Raises LandmarkError as the modules used say, and if a check
    fails.
    """
    check_target(path_tuned, TUNED, overwrite)
    folder_diff = locate(path_diff, DIFF, "diff*.safetensors")
    raw = Checkpoint(locate(path_raw, RAW), RAW)
    source = OurDiff if os.path.lexists(folder_diff / manifest.MANIFEST) else authors.AuthorsDiff
    diff = source(folder_diff, raw, verify=verify)
    plans = plan_shards(diff.tensors, max_shard_bytes, "model", {"format": "pt"})
    carried = diff.model_files
    needed = sum(plan.nbytes for plan in plans) + sum(map(len, carried.values()))
    check_space(path_tuned.expanduser().absolute().parent, needed, TUNED)
    with new_directory(path_tuned, TUNED, overwrite=overwrite, keep=(raw.folder, folder_diff)) as folder:
        with ShardWriter(folder, plans) as writer:
            verified = diff.write(writer, verify=verify, threads=threads)
        if len(plans) > 1:
            write_file(folder / "model.safetensors.index.json", _index(plans, diff.tensors))
        for name, content in carried.items():
            write_file(folder / name, content)
    console.info(
        f"wrote {path_tuned}: {console.counted(len(diff.tensors), 'tensor')}, "
        f"{console.quantity(needed, 'B')}, {verified}"
    )


class OurDiff:
    """A difference of our format over these raw weights. Raises LandmarkError if the two do not belong together.

    tensors: what is recovered, in order. model_files: configuration and tokenizer to carry along, content by name.
    verify: check the sha256 of these files.
    """

    def __init__(self, folder: Path, raw: Checkpoint, *, verify: bool) -> None:
        written = manifest.read_manifest(folder, DIFF)
        entries, self.raw_name = written.entries, written.raw_name
        files = {manifest.stored(entry.tensor).name: entry.file for entry in entries if entry.same_as is None}
        self.diff = Checkpoint(folder, DIFF, files)
        self.raw = raw
        self.tensors = [entry.tensor for entry in entries]
        for file, shard in self.diff.shards.items():
            if shard.metadata.get("format") != manifest.FORMAT:
                raise LandmarkError(f"{DIFF} {file}: its header does not say that it is a difference; get it again")
        self.model_files = manifest.read_carried(folder, written, DIFF, verify=verify)
        self._entries = {entry.tensor.name: entry for entry in entries if entry.same_as is None}
        self._names = {name: [name] for name in self._entries}
        for entry in entries:
            if entry.same_as is not None and self._check_alias(entry):
                self._names[entry.same_as].append(entry.tensor.name)
        for name, entry in self._entries.items():
            found = self.diff.tensors[manifest.stored(entry.tensor).name]
            if found != manifest.stored(entry.tensor):
                there = f"{found.size} there and {entry.tensor.size} in the manifest"
                raise LandmarkError(f"{DIFF} {folder / str(entry.file)}: {name} is {there}; get it again")
            if entry.raw is not None:
                self._entries[name] = replace(entry, raw=self._find_raw(entry.raw))

    def write(self, writer: ShardWriter, *, verify: bool, threads: int) -> str:
        """Write all tensors -> how they were checked. Raises LandmarkError for the first tensor with another sha256
        than its own."""

        def work(tensor: Tensor, check: Callable[[], None]) -> None:
            self._write_tensor(self._entries[tensor.name], writer, verify, check)

        tensors = [entry.tensor for entry in self._entries.values()]
        for_each_tensor(tensors, work, threads=threads, description="recover")
        return "the sha256 of every tensor and file is right" if verify else "not verified"

    def _check_alias(self, entry: manifest.Entry) -> bool:
        original = self._entries.get(str(entry.same_as))
        if original is None or replace(original.tensor, name=entry.tensor.name) != entry.tensor:
            raise LandmarkError(
                f"{DIFF} {self.diff.folder}: its manifest has no tensor for {entry.tensor.name} to repeat; get it again"
            )
        return True

    def _find_raw(self, wanted: Tensor) -> Tensor:
        found = self.raw.tensors.get(wanted.name)
        problem = None
        if found is None:
            problem = f"it has no {wanted.name}"
        elif found.shape != wanted.shape:
            problem = f"{wanted.name} is {found.size} in it and {wanted.size} in the weights the difference is of"
        elif not bits.can_cast(found.dtype, wanted.dtype):
            problem = f"{wanted.name} is {found.dtype}, which cannot be cast to {wanted.dtype}"
        if problem:
            raise LandmarkError(f"{RAW} {self.raw.folder}: not {self.raw_name}: {problem}; give those raw weights")
        return found

    def _read_raw(self, entry: manifest.Entry, start: int, stop: int) -> np.ndarray:
        return bits.cast(self.raw.read(entry.raw.name, start, stop), entry.raw.dtype, entry.tensor.dtype)

    def _write_tensor(
        self, entry: manifest.Entry, writer: ShardWriter, verify: bool, check: Callable[[], None]
    ) -> None:
        stored = manifest.stored(entry.tensor).name
        dtype = bits.pattern(entry.tensor.dtype)
        out, spare = np.empty((2, PIECE_BYTES // dtype.itemsize), dtype)
        digest = hashlib.sha256()
        shared = entry.shared
        spans = [*pieces(0, shared, dtype.itemsize), *pieces(shared, entry.tensor.count, dtype.itemsize)]
        for start, stop in spans:
            check()
            values = self.diff.read(stored, start, stop)
            if start < shared:
                size = stop - start
                values = bits.restore(values, self._read_raw(entry, start, stop), out[:size], spare[:size])
            if verify:
                digest.update(values)
            for name in self._names[entry.tensor.name]:
                writer.write(name, start, values)
        if verify and digest.hexdigest() != entry.sha256:
            raise LandmarkError(self._blame(entry))

    def _blame(self, entry: manifest.Entry) -> str:
        name = entry.tensor.name
        digest = hashlib.sha256()
        for start, stop in pieces(0, entry.shared, bits.ITEM_BYTES[entry.tensor.dtype]):
            digest.update(self._read_raw(entry, start, stop))
        if entry.raw is not None and digest.hexdigest() != entry.raw_sha256:
            return (
                f"{RAW} {self.raw.folder}: {entry.raw.name} is not that of {self.raw_name}, which the difference was "
                f"made from (sha256 {digest.hexdigest()[:12]}, not {entry.raw_sha256[:12]}); give those raw weights"
            )
        file = self.diff.folder / str(entry.file)
        return f"{DIFF} {file}: {name} is damaged, it gives another sha256 than the manifest has; get the file again"


def _index(plans: list[ShardPlan], tensors: list[Tensor]) -> str:
    weight_map = {name: plan.name for plan in plans for name in plan.offsets}
    total = {"total_size": sum(tensor.nbytes for tensor in tensors)}
    return json.dumps({"metadata": total, "weight_map": weight_map}, indent=2) + "\n"
