"""Model directories as they are written: `config.json` comes last, so one that has it is whole."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from landmark_cli.on_disk import flush, flush_tree

CONFIG = "config.json"
# Where a model is written, inside its directory, before its files are put in place.
PARTIAL = "model.partial"
# Files of weights: whole or in several files with an index, and adapters.
WEIGHTS = ("model*.safetensors*", "adapter_*")


def save_model(
    model: PreTrainedModel, directory: Path, weights: dict[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    """Write a model as transformers does, tokenizer aside.

    weights: by the names that the model has for them. dtype: of the weights in the files, and the one that the config
    names; by default the weights' own. The model itself stays as it is.
    """
    if dtype is None:
        model.save_pretrained(directory, state_dict=weights)
        return
    model.save_pretrained(directory, state_dict={name: tensor.to(dtype) for name, tensor in weights.items()})
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.save_pretrained(directory)


def put_in_place(partial: Path, directory: Path) -> None:
    """Move the files of a model that was written to `partial` into its directory, on the same disk, in place of older
    ones and of older weights by other names. From before the first is touched until the last is there, the directory
    has no config.json.
    """
    flush_tree(partial)
    (directory / CONFIG).unlink(missing_ok=True)
    for pattern in WEIGHTS:
        for file in directory.glob(pattern):
            file.unlink()
    for file in sorted(partial.iterdir(), key=lambda file: file.name == CONFIG):
        target = directory / file.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(file, target)
    partial.rmdir()
    flush(directory)
