"""Linear layers of the same input, as one product: their weights are made to lie one behind another in memory, so that
one tensor spans them all while each layer keeps its own parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def join(parameters: Sequence[nn.Parameter]) -> None:
    """Move parameters (n_i, ...) to one piece of memory, one behind another, where they do not lie so already. Each
    keeps its values; who else holds one of their tensors holds the memory before. Nothing is moved where a parameter
    is not plain, is a view of something larger, or may be training."""
    if spanned(parameters) is not None or not all(map(_is_movable, parameters)):
        return
    if len({(x.dtype, x.device, x.shape[1:]) for x in parameters}) > 1:
        return
    with torch.inference_mode(False):
        parts = torch.cat([x.detach() for x in parameters]).split([len(x) for x in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.data = part


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


def product_of(layers: Sequence[nn.Module]) -> Callable[[Tensor], Sequence[Tensor]]:
    """A function of x (..., K) that gives what each layer gives, (..., n_i): by one product where the layers' weights
    lie one behind another when this is called, else layer by layer."""
    joined = [spanned(parameters) for parameters in parameters_to_join(layers)]
    if joined and all(tensor is not None for tensor in joined):
        sizes = [layer.out_features for layer in layers]
        return lambda x: F.linear(x, *joined).split(sizes, dim=-1)
    # Quantized layers share a product themselves.
    return lambda x: [layer(x) for layer in layers]
