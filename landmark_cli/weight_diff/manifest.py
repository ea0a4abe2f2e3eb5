"""Our format of a weight difference: a directory that is no model, and a manifest that knows every tensor's sha256.

    config.json                   says that this is not a model and how to make one of it
    landmark_diff.json            the manifest
    diff.safetensors              (or shards of it) `diff.<tensor>`: unsigned integers, see `bits.difference`
    tuned/                        configuration and tokenizer of the tuned model

The raw tensor is first cast to the tuned one's element type (`bits.cast`). The manifest's sha256 of a raw tensor is
that of the bytes after this cast, so raw weights stored in another type are recognised where they mean the same. The
rows of new tokens, and tensors that raw does not have, are stored as they are. Tensors that share their memory are
stored once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from landmark_cli import __version__
from landmark_cli.errors import LandmarkError
from landmark_cli.weight_diff.bits import ITEM_BYTES, UNSIGNED
from landmark_cli.weight_diff.checkpoint import Checkpoint, Tensor, read_json

MANIFEST = "landmark_diff.json"
FORMAT = "landmark-weight-diff"
VERSION = 1
STEM = "diff"
CARRIED = "tuned"
MODEL_TYPE = "landmark_weight_diff"
NOTE = (
    "This is not a model. It is the difference of a fine-tuned model from the weights it was made of, which it needs: "
    "landmark weight-diff recover --path-raw RAW --path-diff THIS --path-tuned OUT"
)

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

    file: where its difference is, or None with same_as: the tensor it shares its memory with.
    raw: the tensor under it, as far as it goes, with raw_sha256 of its bytes as the tuned type; or None.
    """

    tensor: Tensor
    sha256: str
    file: str | None = None
    same_as: str | None = None
    raw: Tensor | None = None
    raw_sha256: str = ""

    @property
    def shared(self) -> int:
        """How many leading elements raw has too."""
        return self.raw.count if self.raw else 0


def stored(tensor: Tensor) -> Tensor:
    """The tensor of integers that a tuned tensor's difference is stored as."""
    unsigned = f"U{8 * UNSIGNED[ITEM_BYTES[tensor.dtype]].itemsize}"
    return Tensor(f"{STEM}.{tensor.name}", unsigned, tensor.shape)


def model_files(folder: Path) -> list[Path]:
    """The configuration and tokenizer files of a model directory."""
    found = {path for pattern in BELONGS_TO_MODEL for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.suffix not in (".safetensors", ".bin"))


def config_text() -> str:
    """The difference's config.json, which no library takes for a model's."""
    return json.dumps({"model_type": MODEL_TYPE, "format_version": VERSION, "note": NOTE}, indent=2) + "\n"


def manifest_text(entries: list[Entry], raw: Checkpoint, raw_name: str) -> str:
    """The manifest as JSON text."""
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
    }
    lines = [f" {json.dumps(name)}: {json.dumps(fields)}" for name, fields in tensors.items()]
    return json.dumps(content, indent=1)[:-2] + ',\n "tensors": {\n ' + ",\n ".join(lines) + "\n }\n}\n"


def read_manifest(folder: Path, role: str) -> tuple[list[Entry], str]:
    """(the manifest's tensors in order, the name of the raw weights). Raises LandmarkError for one not understood."""
    content = read_json(folder / MANIFEST, role)
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise LandmarkError(
            f"{role} {folder / MANIFEST}: format {content.get('format')} version {content.get('version')}, where "
            f"{FORMAT} version {VERSION} was expected; use the landmark that wrote it ({content.get('written_by')})"
        )
    try:
        return [_entry(name, fields) for name, fields in content["tensors"].items()], str(content["raw"]["name"])
    except (KeyError, TypeError, AttributeError, ValueError):
        raise LandmarkError(f"{role} {folder / MANIFEST}: damaged; get it again") from None


def _entry(name: str, fields: dict[str, Any]) -> Entry:
    tensor = _tensor(name, fields["dtype"], fields["shape"])
    if "same_as" in fields:
        return Entry(tensor, fields["sha256"], same_as=fields["same_as"])
    if "raw" not in fields:
        return Entry(tensor, fields["sha256"], fields["file"])
    raw = _tensor(fields["raw"]["name"], fields["dtype"], fields["raw"]["shape"])
    if raw.count > tensor.count or raw.shape[1:] != tensor.shape[1:]:
        raise ValueError(name)
    return Entry(tensor, fields["sha256"], fields["file"], None, raw, fields["raw"]["sha256"])


def _tensor(name: str, dtype: str, shape: list[int]) -> Tensor:
    if dtype not in ITEM_BYTES or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(name)
    return Tensor(name, dtype, tuple(shape))
