"""Linear layers of the same input, as one product: their weights are made to lie one behind another in memory, so that
one tensor spans them all while each layer keeps its own parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def join(parameters: Sequence[nn.Parameter]) -> bool:
    """Move parameters (n_i, ...) to one piece of memory, one behind another, where they do not lie so already. Each
    keeps its values; who else holds one of their tensors holds the memory before. Nothing is moved where a parameter
    is not plain, is a view of something larger, or may be training. Returns whether they were moved."""
    if spanned(parameters) is not None or not all(map(_is_movable, parameters)):
        return False
    if len({(x.dtype, x.device, x.shape[1:]) for x in parameters}) > 1:
        return False
    with torch.inference_mode(False):
        parts = torch.cat([x.detach() for x in parameters]).split([len(x) for x in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.data = part
    return True


def spanned(parameters: Sequence[Tensor]) -> Tensor | None:
    """The one tensor (sum of n_i, ...) that parameters (n_i, ...) are the parts of, without gradients; None where they
    are not parts of one."""
    first, begin = parameters[0].detach(), parameters[0].storage_offset()
    for x in parameters:
        here = x.storage_offset() == begin and x.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        alike = (x.dtype, x.device, x.shape[1:]) == (first.dtype, first.device, first.shape[1:])
        if not (here and alike and x.is_contiguous()):
            return None
        begin += x.numel()
    rows = sum(len(x) for x in parameters)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def _is_movable(x: Tensor) -> bool:
    plain = type(x) is nn.Parameter and type(x.data) is Tensor and x.grad is None
    return plain and x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes


def parameters_to_join(layers: Sequence[nn.Module]) -> list[list[nn.Parameter]]:
    """Of layers those whose parameters can be one: weights, and biases where all have one. Of nn.Linear alone."""
    if any(type(layer) is not nn.Linear for layer in layers):
        return []
    biases = [layer.bias for layer in layers]
    if all(bias is None for bias in biases):
        return [[layer.weight for layer in layers]]
    return [] if None in biases else [[layer.weight for layer in layers], biases]


class Product:
    """What layers of the same input give of it, (..., n_i) each: by one product where their weights lie one behind
    another when this is made, else layer by layer. weight, bias: of all of them, (sum of n_i, K) and (sum of n_i,),
    None where there is no such tensor."""

    def __init__(self, layers: Sequence[nn.Module]):
        self.layers, self.weight, self.bias = layers, None, None
        joined = [spanned(parameters) for parameters in parameters_to_join(layers)]
        if joined and all(tensor is not None for tensor in joined):
            self.weight, self.bias = (*joined, None)[:2]

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        if self.weight is None:
            # Quantized layers share a product themselves.
            return [layer(x) for layer in self.layers]
        return self.split(F.linear(x, self.weight, self.bias))

    def split(self, y: Tensor) -> Sequence[Tensor]:
        """Of the products with `weight` those of each layer."""
        return y.split([layer.out_features for layer in self.layers], dim=-1)
