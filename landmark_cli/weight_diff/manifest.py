"""Our format of a weight difference: a directory that is no model, and a manifest that knows every tensor's sha256.

    config.json                   says that this is not a model and how to make a model of it
    landmark_diff.json            the manifest, with the sha256 of every tensor, of every other file, and its own
    diff.safetensors              (or shards of it) `diff.<tensor>`: unsigned integers, see `bits.difference`
    tuned/                        configuration and tokenizer of the tuned model

A raw tensor is first cast to the tuned tensor's element type (`bits.cast`). The manifest's sha256 of a raw tensor is
that of the bytes after this cast, so raw weights that are stored in another type are recognised if they are equal after
the cast. The rows of new tokens, and tensors that raw does not have, are stored as they are. Tensors that share their
memory are stored once.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from landmark_cli import __version__
from landmark_cli.console import warn
from landmark_cli.errors import LandmarkError, shown
from landmark_cli.file_errors import reading
from landmark_cli.file_reading import read_bytes
from landmark_cli.model_files import check_link, inside
from landmark_cli.schema import check
from landmark_cli.weight_diff.bits import ITEM_BYTES, UNSIGNED
from landmark_cli.weight_diff.checkpoint import Checkpoint, Tensor, read_json

MANIFEST = "landmark_diff.json"
FORMAT = "landmark-weight-diff"
VERSION = 2
# Version 1 had no checksums of the files besides the tensors, nor of the manifest.
READ_VERSIONS = (1, 2)
STEM = "diff"
CARRIED = "tuned"
MODEL_TYPE = "landmark_weight_diff"
NOTE = (
    "This is not a model. It is the difference of a fine-tuned model from the weights it was made of, which it needs: "
    "landmark weight-diff recover --path-raw RAW --path-diff THIS --path-tuned OUT"
)

# A tokenizer's largest file takes some tens of megabytes.
MAX_CARRIED_BYTES = 256 << 20

# Files of a model directory that belong to the model, besides its weights.
BELONGS_TO_MODEL = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.model",
    "*.tiktoken",
)


@dataclass(frozen=True)
class Entry:
    """A tuned tensor in the manifest.

    file: where the tensor's difference is, or None with same_as: the tensor that it shares its memory with.
    raw: the raw tensor that was subtracted, with raw_sha256 of its bytes in the tuned type; None if there is none.
    """

    tensor: Tensor
    sha256: str
    file: str | None = None
    same_as: str | None = None
    raw: Tensor | None = None
    raw_sha256: str = ""

    @property
    def shared(self) -> int:
        """How many leading elements the raw tensor has too."""
        return self.raw.count if self.raw else 0


def stored(tensor: Tensor) -> Tensor:
    """The tensor of integers that a tuned tensor's difference is stored as."""
    unsigned = f"U{8 * UNSIGNED[ITEM_BYTES[tensor.dtype]].itemsize}"
    return Tensor(f"{STEM}.{tensor.name}", unsigned, tensor.shape)


def model_files(folder: Path, role: str) -> dict[str, bytes]:
    """The configuration and tokenizer files of a model directory: their content by name, config.json last.

    Raises LandmarkError for a file that cannot be read or is a link out of the directory, and where config.json is
    missing, without which nobody could open the model.
    """
    found = {path for pattern in BELONGS_TO_MODEL for path in folder.glob(pattern) if path.is_file()}
    names = sorted(path.name for path in found if path.suffix not in (".safetensors", ".bin"))
    return _read_files(folder, names, role)


def _read_files(folder: Path, names: list[str], role: str) -> dict[str, bytes]:
    if "config.json" not in names:
        raise LandmarkError(f"{role} {folder}: config.json is missing, without which nothing opens the model")
    # config.json, which makes a directory a model, comes last.
    names = sorted(names, key=lambda name: name == "config.json")
    return {name: read_bytes(inside(folder, name, role), role, max_bytes=MAX_CARRIED_BYTES) for name in names}


def config_text() -> str:
    """The difference's config.json, which no library takes for a model's."""
    return json.dumps({"model_type": MODEL_TYPE, "format_version": VERSION, "note": NOTE}, indent=2) + "\n"


@dataclass
class RawTensorFields:
    """A tensor of the raw weights in the manifest's JSON."""

    name: str
    shape: list[int]
    sha256: str


@dataclass
class TensorFields:
    """A tensor in the manifest's JSON, see `Entry`."""

    dtype: str
    shape: list[int]
    sha256: str
    file: str | None = None
    same_as: str | None = None
    raw: RawTensorFields | None = None


@dataclass
class RawModelFields:
    """The raw weights in the manifest's JSON."""

    name: str


@dataclass
class ManifestFields:
    """The manifest's JSON, format and version aside. files: the sha256 of every file that holds no tensors, by name."""

    raw: RawModelFields
    tensors: dict[str, TensorFields]
    files: dict[str, str] = field(default_factory=dict)
    sha256: str = ""


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read. entries: the tensors in order. raw_name: of the raw weights. files: their sha256 by
    name, or None in a manifest of version 1, which has none."""

    entries: list[Entry]
    raw_name: str
    files: dict[str, str] | None


def manifest_text(entries: list[Entry], raw: Checkpoint, raw_name: str, files: dict[str, bytes]) -> str:
    """The manifest as JSON text. files: the content of every file of the difference that holds no tensors."""
    tensors: dict[str, dict[str, Any]] = {}
    for entry in entries:
        tensor = tensors[entry.tensor.name] = {
            "dtype": entry.tensor.dtype,
            "shape": entry.tensor.shape,
            "sha256": entry.sha256,
        }
        if entry.same_as is not None:
            tensor["same_as"] = entry.same_as
            continue
        tensor["file"] = entry.file
        if entry.raw is not None:
            tensor["raw"] = {"name": entry.raw.name, "shape": entry.raw.shape, "sha256": entry.raw_sha256}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "written_by": f"landmark {__version__}",
        "raw": {"name": raw_name, "model_type": raw.config.get("model_type")},
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    content["sha256"] = _digest(content | {"tensors": tensors})
    lines = [f" {json.dumps(name)}: {json.dumps(fields)}" for name, fields in tensors.items()]
    return json.dumps(content, indent=1)[:-2] + ',\n "tensors": {\n ' + ",\n ".join(lines) + "\n }\n}\n"


def read_manifest(folder: Path, role: str) -> Manifest:
    """The manifest of a difference. Raises LandmarkError for a manifest that is damaged or of an unknown version."""
    path = folder / MANIFEST
    content = read_json(path, role)
    version = content.get("version")
    if content.get("format") != FORMAT or version not in READ_VERSIONS:
        raise LandmarkError(
            f"{role} {path}: format {shown(content.get('format'))} version {shown(version)}, where {FORMAT} version "
            f"{VERSION} was expected; use the landmark that wrote it ({shown(content.get('written_by'))})"
        )
    with reading(path, role, to_do="get it again"):
        fields = check(ManifestFields, content)
        if version > 1 and fields.sha256 != _digest({key: value for key, value in content.items() if key != "sha256"}):
            raise ValueError("it was changed after it was written")
        entries = [_entry(name, tensor) for name, tensor in fields.tensors.items()]
    return Manifest(entries, fields.raw.name, fields.files if version > 1 else None)


def read_carried(folder: Path, written: Manifest, role: str, *, verify: bool) -> dict[str, bytes]:
    """The configuration and tokenizer files that a difference carries along, as `model_files` gives them.

    verify: check the sha256 of these and of every other file in the manifest. Raises LandmarkError for a damaged one.
    """
    check_link(folder, folder / CARRIED, role)
    if written.files is None:
        warn(f"{role} {folder}: an earlier landmark wrote it, without checksums of configuration and tokenizer")
        return model_files(folder / CARRIED, role)
    carried = [name.removeprefix(f"{CARRIED}/") for name in written.files if name.startswith(f"{CARRIED}/")]
    contents = _read_files(folder / CARRIED, carried, role)
    for name, sha256 in written.files.items() if verify else ():
        data = contents.get(name.removeprefix(f"{CARRIED}/")) if name.startswith(f"{CARRIED}/") else None
        data = read_bytes(inside(folder, name, role), role) if data is None else data
        if hashlib.sha256(data).hexdigest() != sha256:
            raise LandmarkError(f"{role} {folder / name}: damaged, its sha256 is not the manifest's; get it again")
    return contents


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _entry(name: str, fields: TensorFields) -> Entry:
    tensor = _tensor(name, fields.dtype, fields.shape)
    if (fields.file is None) == (fields.same_as is None):
        raise ValueError(f"{name} should have either a file or another tensor that it is the same as")
    if fields.raw is None:
        return Entry(tensor, fields.sha256, fields.file, fields.same_as)
    raw = _tensor(fields.raw.name, fields.dtype, fields.raw.shape)
    if raw.count > tensor.count or raw.shape[1:] != tensor.shape[1:]:
        raise ValueError(f"{name} is {tensor.size}, which the raw weights' {raw.size} do not fit")
    return Entry(tensor, fields.sha256, fields.file, None, raw, fields.raw.sha256)


def _tensor(name: str, dtype: str, shape: list[int]) -> Tensor:
    if dtype not in ITEM_BYTES or not all(size >= 0 for size in shape):
        raise ValueError(f"{name} has the element type {shown(dtype)} and the shape {shown(shape)}")
    return Tensor(name, dtype, tuple(shape))
