"""Open a transformers model and its tokenizer from a directory or the hub, and check that they belong together."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from landmark_cli.data.pretrained_tokenizers import open_tokenizer
from landmark_cli.errors import LandmarkError
from landmark_cli.weight_diff.manifest import MANIFEST

from .decoders import check_tokenizer


def open_pretrained(
    path: str | Path, *, attention: str | None = None, dtype: str | torch.dtype = "auto", **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a causal language model and its tokenizer.

    path: a directory or a hub id. attention: transformers' `attn_implementation`, by default the one it was saved with.
    dtype: of the weights, by default as stored. options: further arguments of `from_pretrained`.

    Raises LandmarkError naming what is missing, or what does not fit: weights and config, a landmark model's tokenizer.
    """
    config = open_config(path)
    if attention is not None:
        options["attn_implementation"] = attention
    with _failures(path), _without_reports():
        # Weights that do not fit are found in the report rather than left to a traceback.
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    _check_weights(report, config, path)
    with _failures(path, "tokenizer of "):
        tokenizer = open_tokenizer(path)
    if getattr(config, "landmark_freq", None) is not None:
        check_tokenizer(config, tokenizer, str(path))
    return model, tokenizer


def open_config(path: str | Path) -> PreTrainedConfig:
    """The config of a model directory or hub id. Raises LandmarkError where there is none that transformers knows."""
    directory = Path(path)
    local = directory.exists() or (os.sep in str(path) and not _looks_like_hub_id(str(path)))
    if local and not (directory / "config.json").is_file():
        found = "is not there" if not directory.exists() else "has no config.json"
        raise LandmarkError(f"cannot open the model {path}: it {found}; name a model directory or a hub id")
    if (directory / MANIFEST).is_file():
        raise LandmarkError(
            f"{path} holds a weight difference, not a model; landmark weight-diff recover makes one of it"
        )
    with _failures(path), _without_reports():
        return AutoConfig.from_pretrained(path)


def _check_weights(report: dict[str, Any], config: PreTrainedConfig, path: str | Path) -> None:
    """LandmarkError where the weights lack, or have in another shape, what the config says."""
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, stored, expected = mismatched[0]
        found = f"{name} is {tuple(stored)} there and {tuple(expected)} by config.json"
    elif report["missing_keys"]:
        found = f"{min(report['missing_keys'])} is missing"
    else:
        layers = getattr(config, "num_hidden_layers", None)
        surplus = [name for name in sorted(report["unexpected_keys"]) if layers is not None and _layer(name) >= layers]
        if not surplus:
            return
        found = f"there is {surplus[0]}, but config.json has {layers} layers"
    raise LandmarkError(f"the weights of {path} do not match its config.json: {found}")


def _layer(name: str) -> int:
    number = re.search(r"\.(\d+)\.", name)
    return int(number.group(1)) if number else -1


def _looks_like_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


@contextmanager
def _failures(path: str | Path, part: str = "") -> Iterator[None]:
    """Turn what transformers raises over a model into one line that names it."""
    try:
        yield
    except SafetensorError as error:
        raise LandmarkError(f"cannot open the model {path}: its weights are damaged ({error})") from error
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, EOFError, UnpicklingError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if not Path(path).exists():
            reason = f"there is no such directory, and the hub gave none: {reason}"
        raise LandmarkError(f"cannot open the {part}model {path}: {reason}") from error


@contextmanager
def _without_reports() -> Iterator[None]:
    """Keep transformers from printing tables of weights; what matters in them is checked here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
