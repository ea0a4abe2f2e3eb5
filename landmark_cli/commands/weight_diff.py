"""`landmark weight-diff make` and `landmark weight-diff recover`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from landmark_cli.errors import UsageError, shown
from landmark_cli.options import Options, option

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass
class MakeOptions(Options):
    """Write the difference of a fine-tuned model from its raw weights, to be published without the raw weights.

    Exact: with the raw weights, `recover` gives every bit of the tuned model back. The tuned tensors may have rows for
    new tokens. Raw weights of another element type are cast to that of the tuned weights first.
    """

    path_raw: str = option(help="The weights before fine-tuning: a directory or hub id, .bin or safetensors.")
    path_tuned: str = option(help="The fine-tuned model: a directory or hub id.")
    path_diff: Path = option(help="The directory to write the difference to.")
    max_shard_size: str = option("5GB", help="Largest file of weights to write, such as 500MB or 5GB.")
    overwrite: bool = option(False, help="Replace the directory if it is not empty.")
    threads: int | None = option(
        None,
        help="Tensors worked on at a time. [default: as many as there are processors]",
        min=1,
        max=1024,
        saves_memory="fewer --threads",
    )


@dataclass
class RecoverOptions(Options):
    """Make a fine-tuned model of its raw weights and its difference from them.

    Reads what `landmark weight-diff make` wrote, checking the sha256 of every tensor, and the differences that the
    authors of landmark attention publish, checking the sum that the authors give.
    """

    path_raw: str = option(help="The weights before fine-tuning: a directory or hub id, .bin or safetensors.")
    path_diff: str = option(help="The difference: a directory or hub id.")
    path_tuned: Path = option(help="The directory to write the fine-tuned model to.")
    verify: bool = option(True, help="Check the recovered model, and keep nothing where it is wrong.")
    max_shard_size: str = option("5GB", help="Largest file of weights to write, such as 500MB or 5GB.")
    overwrite: bool = option(False, help="Replace the directory if it is not empty.")
    threads: int | None = option(
        None,
        help="Tensors worked on at a time. [default: as many as there are processors]",
        min=1,
        max=1024,
        saves_memory="fewer --threads",
    )


def run_make(options: MakeOptions) -> Path:
    """Do what `landmark weight-diff make` with these options does. Returns the difference's directory."""
    from landmark_cli.weight_diff.make import make
    from landmark_cli.weight_diff.stream import default_threads

    make(
        options.path_raw,
        options.path_tuned,
        options.path_diff,
        max_shard_bytes=parse_size(options.max_shard_size),
        overwrite=options.overwrite,
        threads=options.threads or default_threads(),
    )
    return options.path_diff


def run_recover(options: RecoverOptions) -> Path:
    """Do what `landmark weight-diff recover` with these options does. Returns the recovered model's directory."""
    from landmark_cli.weight_diff.recover import recover
    from landmark_cli.weight_diff.stream import default_threads

    recover(
        options.path_raw,
        options.path_diff,
        options.path_tuned,
        verify=options.verify,
        max_shard_bytes=parse_size(options.max_shard_size),
        overwrite=options.overwrite,
        threads=options.threads or default_threads(),
    )
    return options.path_tuned


def parse_size(text: str) -> int:
    """ "5GB" or "500 MB" or "1000000" -> bytes. Raises UsageError for anything else, and for 0."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)B?", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < 1:
        raise UsageError(f"--max-shard-size: expected a size such as 500MB or 5GB, found {shown(text)}")
    return size
