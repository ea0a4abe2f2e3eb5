"""raw and tuned weights -> their difference in our format."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from landmark_cli import console
from landmark_cli.disk_room import check_space
from landmark_cli.weight_diff import bits, manifest
from landmark_cli.weight_diff.checkpoint import Checkpoint, Tensor, locate
from landmark_cli.weight_diff.matching import Pair, pair
from landmark_cli.weight_diff.output import (
    ShardWriter,
    check_target,
    new_directory,
    plan_shards,
    write_file,
)
from landmark_cli.weight_diff.stream import PIECE_BYTES, for_each_tensor, pieces

RAW, TUNED, DIFF = "--path-raw", "--path-tuned", "--path-diff"


def make(
    path_raw: str, path_tuned: str, path_diff: Path, *, max_shard_bytes: int, overwrite: bool, threads: int
) -> None:
    """Write the directory `path_diff`, from which, with the raw weights, `recover` gives the tuned weights back bit for
    bit.

    path_raw, path_tuned: directories or hub ids, safetensors or `.bin`. Raises LandmarkError as the modules used say.
    """
    check_target(path_diff, DIFF, overwrite)
    raw = Checkpoint(locate(path_raw, RAW), RAW)
    tuned = Checkpoint(locate(path_tuned, TUNED), TUNED)
    pairs = {found.tensor.name: found for found in pair(tuned, raw)}
    own = [tensor for name, tensor in tuned.tensors.items() if name not in tuned.aliases]
    plans = plan_shards(map(manifest.stored, own), max_shard_bytes, manifest.STEM, {"format": manifest.FORMAT})
    files = {name: plan.name for plan in plans for name in plan.offsets}
    carried = manifest.model_files(tuned.folder, TUNED)
    needed = sum(plan.nbytes for plan in plans) + sum(map(len, carried.values()))
    check_space(path_diff.expanduser().absolute().parent, needed, DIFF)
    with new_directory(path_diff, DIFF, overwrite=overwrite, keep=(raw.folder, tuned.folder)) as folder:
        with ShardWriter(folder, plans) as writer:

            def work(tensor: Tensor, check: Callable[[], None]) -> tuple[str, str]:
                return _write_difference(pairs[tensor.name], tuned, raw, writer, check)

            digests = for_each_tensor(own, work, threads=threads, description="make")
        entries = []
        for name, tensor in tuned.tensors.items():
            if name in tuned.aliases:
                entries.append(manifest.Entry(tensor, digests[tuned.aliases[name]][0], same_as=tuned.aliases[name]))
            else:
                file = files[manifest.stored(tensor).name]
                entries.append(manifest.Entry(tensor, digests[name][0], file, None, pairs[name].raw, digests[name][1]))
        written = {f"{manifest.CARRIED}/{name}": content for name, content in carried.items()}
        written["config.json"] = manifest.config_text().encode()
        for name, content in written.items():
            write_file(folder / name, content)
        raw_name = path_raw if not Path(path_raw).exists() else raw.folder.resolve().name
        write_file(folder / manifest.MANIFEST, manifest.manifest_text(entries, raw, raw_name, written))
    console.info(f"wrote {path_diff}: {console.counted(len(entries), 'tensor')}, {console.quantity(needed, 'B')}")


def _write_difference(
    pair: Pair, tuned: Checkpoint, raw: Checkpoint, writer: ShardWriter, check: Callable[[], None]
) -> tuple[str, str]:
    """Write one tensor's difference -> sha256 of the tuned tensor and of the raw tensor in the tuned tensor's type."""
    tensor, name = pair.tensor, manifest.stored(pair.tensor).name
    tuned_digest, raw_digest = hashlib.sha256(), hashlib.sha256()
    dtype = bits.pattern(tensor.dtype)
    out, spare = np.empty((2, PIECE_BYTES // dtype.itemsize), dtype)
    for start, stop in pieces(0, pair.shared, dtype.itemsize):
        check()
        size = stop - start
        values = tuned.read(tensor.name, start, stop)
        under = bits.cast(raw.read(pair.raw.name, start, stop), pair.raw.dtype, tensor.dtype)
        tuned_digest.update(values)
        raw_digest.update(under)
        writer.write(name, start, bits.difference(values, under, out[:size], spare[:size]))
    for start, stop in pieces(pair.shared, tensor.count, dtype.itemsize):
        check()
        values = tuned.read(tensor.name, start, stop)
        tuned_digest.update(values)
        writer.write(name, start, values)
    return tuned_digest.hexdigest(), raw_digest.hexdigest()
