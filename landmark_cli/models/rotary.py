"""Finding a model's rotary embedding."""

from __future__ import annotations

from torch import Tensor, nn


def inverse_frequencies(model: nn.Module) -> Tensor:
    """The angle per position of each rotated pair of dimensions, (rotary_dim / 2,), of a model's rotary embedding.

    Raises ValueError as `rotary_embedding` does.
    """
    return rotary_embedding(model).inv_freq


def rotary_embedding(model: nn.Module) -> nn.Module:
    """The model's rotary embedding, whose inv_freq is where the model is, wherever that is moved to.

    Raises ValueError where the model has none, or several that differ.
    """
    modules = [module for module in model.modules() if isinstance(getattr(module, "inv_freq", None), Tensor)]
    found = [module.inv_freq for module in modules]
    if not found:
        raise ValueError(f"{type(model).__name__} has no rotary embedding")
    if any(other.shape != found[0].shape or not (other == found[0]).all() for other in found[1:]):
        raise ValueError(f"{type(model).__name__} has several rotary embeddings that differ")
    return modules[0]
