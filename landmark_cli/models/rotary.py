"""Finding a model's rotary embedding."""

from __future__ import annotations

from torch import Tensor, nn


def inverse_frequencies(model: nn.Module) -> Tensor:
    """The angle per position of each rotated pair of dimensions, (rotary_dim / 2,), of a model's rotary embedding.

    Raises ValueError where the model has none, or several that differ.
    """
    found = [module.inv_freq for module in model.modules() if isinstance(getattr(module, "inv_freq", None), Tensor)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no rotary embedding")
    if any(other.shape != found[0].shape or not (other == found[0]).all() for other in found[1:]):
        raise ValueError(f"{type(model).__name__} has several rotary embeddings that differ")
    return found[0]
