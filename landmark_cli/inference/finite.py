"""A model whose logits are not finite says nothing: reading with it is an error, not a text or a figure."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from landmark_cli.errors import LandmarkError


def are_finite(logits: Tensor) -> Tensor:
    """Whether none of the logits (..., vocabulary) is nan or infinite, (...). Nothing waits for the device."""
    return logits.isfinite().all(-1)


def require_finite(finite: bool, model: PreTrainedModel) -> None:
    """Raise LandmarkError unless a model's logits, or what was summed up of them, were finite."""
    if finite:
        return
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    wider = "" if dtype == "float32" else f", or {dtype} is too narrow for it (try --dtype float32)"
    raise LandmarkError(
        f"{model.name_or_path or 'the model'} gives logits that are nan or infinite, so what it says means nothing: "
        f"its weights are not finite{wider}"
    )
