"""Whether a model's config and its files can belong together, seen before any memory is taken for the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from landmark_cli.console import quantity
from landmark_cli.errors import LandmarkError
from landmark_cli.model_files import opening

WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
# Modules are made one by one, which takes time even where they take no memory; no model has more of one kind.
MOST_MODULES = 1024
COUNTS = ("layers", "n_layer", "experts", "heads", "n_head")
# Elements of what is computed rather than stored, such as rotary frequencies and causal masks.
MOST_BUFFERS = 1 << 30
# A stored element takes a byte, or 4 bits; with a quantisation of its own perhaps one bit.
LEAST_BYTES, LEAST_QUANTIZED_BYTES = 0.5, 0.125


def check_size(
    config: PreTrainedConfig, path: str | Path, attention: str | None = None, *, trust_remote_code: bool = False
) -> None:
    """Refuse a config that describes a larger model than its files hold, or than this machine can.

    path: the model's directory, or a hub id, whose files nobody knows yet. attention: the model's
    `attn_implementation`, by default the config's. Only the shapes of the weights are made. Raises LandmarkError, and
    for a config that no model can be made of too.
    """
    for name, count in _counts(config.to_dict()):
        if count > MOST_MODULES:
            raise _refusal(path, f"{name} is {count}, and more than {MOST_MODULES} cannot be")
    with opening(path, "the config of", trust_remote_code) as code, torch.device("meta"):
        options = {} if attention is None else {"attn_implementation": attention}
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), **code, **options)
    elements = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    quantized = getattr(config, "quantization_config", None) is not None
    least = elements * (LEAST_QUANTIZED_BYTES if quantized else LEAST_BYTES)
    if buffers > MOST_BUFFERS:
        raise _refusal(path, f"its tables take {quantity(buffers, 'B')} before any weight")
    if least > machine_memory():
        raise _refusal(path, f"{quantity(elements)} weights are more than this machine's memory holds")
    stored = sum(file.stat().st_size for pattern in WEIGHTS for file in Path(path).glob(pattern))
    if 0 < stored < least:
        raise LandmarkError(
            f"the weights of {path} do not match its config.json, which describes {quantity(elements)} of them: the "
            f"files hold {quantity(stored, 'B')}; they are cut short, or another model's"
        )


def machine_memory() -> int:
    """Bytes of memory and swap of this machine and of its GPUs."""
    import psutil

    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    own = psutil.virtual_memory().total + psutil.swap_memory().total
    return own + sum(torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus)


def _counts(settings: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """The settings that say how many modules of a kind a model has, in the parts of a config too."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _counts(value)
        elif type(value) is int and name.endswith(COUNTS):
            yield name, value


def _refusal(path: str | Path, reason: str) -> LandmarkError:
    return LandmarkError(f"the config.json of {path} describes no model that can be opened: {reason}")
