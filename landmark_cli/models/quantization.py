"""Weights of linear layers held in 8 or 4 bits, for inference: the definition, and a model whose layers hold theirs so.

A weight (N, K) becomes codes (N, K), whole numbers, and scales (N, K / group): code times scale is the weight, nearly.
In 8 bits a row has one scale, in 4 bits each GROUP input features of a row. Activations stay as they are, and so do
norms, embeddings and what is no linear layer. The head, on which a small change tells most, has 8 bits in either case;
where it is tied to the embedding, it becomes a matrix of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from landmark_cli.console import info
from landmark_cli.errors import LandmarkError, UsageError

from .fingerprint import bit_sums
from .known_layers import of_same_input, why_not_known
from .quantized_products import JoinedProduct, product_class

Quantization = Literal["none", "int8", "int4"]
BITS = {"int8": 8, "int4": 4}
# Input features that share a scale in 4 bits: 4.5 bits a weight in all.
GROUP = 32
# Narrower layers, such as a router of experts, hold little and decide much.
NARROWEST = 64
# Elements worked on at a time, of which several float32 copies are held.
AT_A_TIME = 1 << 24


class Codes(NamedTuple):
    """codes: (N, K) int8. scales: (N, K / group). bits: 8, from -127 to 127, or 4, from -8 to 7."""

    codes: Tensor
    scales: Tensor
    bits: int

    @property
    def group(self) -> int:
        """Input features that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (N, K) that the codes stand for."""
        groups = self.codes.unflatten(1, (self.scales.shape[1], -1))
        return (groups.float() * self.scales.float().unsqueeze(-1)).flatten(1).to(dtype)


@torch.no_grad()
def encode(weight: Tensor, bits: int, dtype: torch.dtype = torch.bfloat16) -> Codes:
    """The codes of a weight (N, K). bits: 8 or 4; in 4 bits K is a multiple of GROUP. dtype: of the scales, to which
    these are rounded before the codes are chosen."""
    group = weight.shape[1] if bits == 8 else GROUP
    rows = max(1, AT_A_TIME // weight.shape[1])
    one = _one_scale if bits == 8 else _fitted_scale
    parts = [one(part.float().unflatten(1, (-1, group)), dtype) for part in weight.split(rows)]
    codes = torch.cat([codes.flatten(1).to(torch.int8) for codes, _ in parts])
    return Codes(codes, torch.cat([scales.squeeze(-1) for _, scales in parts]), bits)


def _one_scale(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest weight of a group has the largest code. weight: (..., group) float32; returns codes and scales."""
    scales = _rounded(weight.abs().amax(-1, keepdim=True) / 127, dtype)
    return (weight / scales.float()).round_().clamp_(-127, 127), scales


def _fitted_scale(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weight of largest magnitude has the code -8, so the scale may be negative; or, where that differs less from
    the weight in squares, the scale is the one that fits those codes best. Smaller scales, which cut the largest weight
    off, differ less still and cost a model more: what is large matters beyond its square."""
    scales, found = weight.gather(-1, weight.abs().argmax(-1, keepdim=True)) / -8, []
    for _ in range(2):
        scales = _rounded(scales, dtype)
        codes = (weight / scales.float()).round_().clamp_(-8, 7)
        found.append(((codes * scales.float() - weight).square_().sum(-1, keepdim=True), codes, scales))
        scales = (weight * codes).sum(-1, keepdim=True) / codes.square().sum(-1, keepdim=True).clamp_min(1)
    (error, *first), (its_error, *second) = found
    codes, scales = (torch.where(its_error < error, b, a) for a, b in zip(first, second, strict=True))
    return codes, scales


def _rounded(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in their dtype; none is 0, by which nothing can be divided."""
    scales = scales.to(dtype)
    return torch.where(scales == 0, torch.ones_like(scales), scales)


class Part(NamedTuple):
    """A layer's part of a product: the product, which of its layers this is, and what is `stored` of its weight."""

    product: JoinedProduct
    place: int
    stored: str


def parts_of(layers: Sequence[nn.Linear], bits: int, device: torch.device) -> list[Part]:
    """One product of layers of the same input, on a device."""
    weights = [layer.weight.detach().to(device) for layer in layers]
    kind, dtype = product_class(device), weights[0].dtype
    codes = encode(torch.cat(weights) if len(weights) > 1 else weights[0], bits, kind.scale_dtype(dtype))
    product = JoinedProduct(kind(codes, dtype), [len(weight) for weight in weights])
    stored = [f"{dtype} {tuple(weight.shape)} {bit_sums(weight)}" for weight in weights]
    return [Part(product, place, what) for place, what in enumerate(stored)]


class QuantizedLinear(nn.Module):
    """A linear layer of codes, in place of an nn.Linear. It lies on one device, learns nothing and is not saved.
    stored: dtype, shape and `bit_sums` of the weight that it was made of, by which memories know their model.

    x (..., K) -> (..., N) in x's dtype.
    """

    def __init__(self, linear: nn.Linear, bits: int, device: torch.device, part: Part | None = None):
        """part: of a product that is made already; by default the layer has one of its own."""
        super().__init__()
        self.in_features, self.out_features, self.bits = linear.in_features, linear.out_features, bits
        self.product, self.place, self.stored = part or parts_of([linear], bits, device)[0]
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().to(device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise self._refusal("have no gradients")
        y = self.product.part(x, self.place)
        return y if self.bias is None else y + self.bias

    def train(self, mode: bool = True) -> QuantizedLinear:
        if mode:
            raise self._refusal("cannot be trained")
        return super().train(mode)

    def _save_to_state_dict(self, *args: Any) -> None:
        raise self._refusal("are not saved, as they are made anew whenever a model is opened")

    def _refusal(self, what: str) -> LandmarkError:
        return LandmarkError(f"weights in int{self.bits} {what}: open the model without quantization")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


def check_quantization(quantization: str, dtype: str | torch.dtype, device: torch.device) -> None:
    """Raise UsageError where weights cannot be held so or have no product on a device, LandmarkError where a package is
    missing for it. dtype: as `load` takes it."""
    if quantization not in get_args(Quantization):
        known = ", ".join(get_args(Quantization))
        raise UsageError(f"--quantization: expected one of {known}; found {quantization!r}")
    if quantization != "none":
        product_class(device).check(device, dtype)


def quantize(model: PreTrainedModel, quantization: Quantization, device: torch.device) -> None:
    """Hold the weights of a model's linear layers in 8 or 4 bits, on a device, one layer after the other: so the whole
    model need not fit there as it was stored.

    Raises LandmarkError where a model's weights are quantized already, or it has no layer that can be.
    """
    name = model.name_or_path or "the model"
    if getattr(model, "is_quantized", False) or quantization_of(model) != "none":
        raise LandmarkError(f"the weights of {name} are quantized already: open it without --quantization")
    product_class(device).check(device, model.dtype)
    bits, head = BITS[quantization], model.get_output_embeddings()
    found = {layer: path for path, layer in model.named_modules() if type(layer) is nn.Linear}
    fitting = [layer for layer in found if layer.weight.dtype == model.dtype and _fits(layer)]
    left = sum(layer.weight.numel() for layer in found) - sum(layer.weight.numel() for layer in fitting)
    for layers in _of_one_product(model, fitting):
        own = 8 if head in layers else bits
        for layer, part in zip(layers, parts_of(layers, own, device), strict=True):
            model.set_submodule(found[layer], QuantizedLinear(layer, own, device, part))
            # A tied weight stays with the embedding; any other goes now, not when all layers are done.
            layer.weight = None
    if not any(isinstance(layer, QuantizedLinear) for layer in model.modules()):
        raise LandmarkError(
            f"{name} has no linear layer that can be held in {quantization}: in_features must be a multiple of "
            f"{GROUP}, out_features of 16, and both at least {NARROWEST}"
        )
    model.landmark_quantization = quantization
    if left:
        stored = str(model.dtype).removeprefix("torch.")
        info(f"{left:,} weights of linear layers are too narrow or uneven for {quantization} and stay in {stored}")


def _of_one_product(model: PreTrainedModel, fitting: Sequence[nn.Linear]) -> list[list[nn.Linear]]:
    """The layers that fit, those together that are known to take the same input."""
    known = why_not_known(model) is None
    together = [layers for layer in model.model.layers for layers in of_same_input(layer)] if known else []
    together = [layers for layers in together if set(fitting).issuperset(layers)]
    joined = {layer for layers in together for layer in layers}
    return together + [[layer] for layer in fitting if layer not in joined]


def _fits(linear: nn.Linear) -> bool:
    """Whether all devices' kernels have products with a layer's shape, and it is not too narrow."""
    wide = min(linear.in_features, linear.out_features) >= NARROWEST
    return wide and linear.in_features % GROUP == 0 and linear.out_features % 16 == 0


def quantization_of(model: nn.Module) -> str:
    """How `quantize` has had a model hold its weights; "none" where it has not."""
    return getattr(model, "landmark_quantization", "none")


def refuse_quantized(model: nn.Module, what: str) -> None:
    """Raise LandmarkError where a model is to get something that it would have to learn, and its weights are codes."""
    held = quantization_of(model)
    if held != "none":
        raise LandmarkError(f"a model with weights in {held} cannot be given {what}: open it without quantization")


def weight_count(model: nn.Module) -> int:
    """How many weights a model has, however they are held."""
    held = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    inside = {id(parameter) for layer in held for parameter in layer.product.parameters()}
    others = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
    return others + sum(layer.in_features * layer.out_features for layer in held)


def weights_by_name(model: nn.Module) -> dict[str, str]:
    """Of each weight, by the name that it is stored under, its dtype, shape and `bit_sums`: of one that is quantized
    those of the weight that it was made of."""
    held = {f"{path}.": layer for path, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    found = {f"{path}weight": layer.stored for path, layer in held.items()}
    for name, weight in model.named_parameters():
        if not name.startswith(tuple(f"{path}product." for path in held)):
            found[name] = f"{weight.dtype} {tuple(weight.shape)} {bit_sums(weight)}"
    return found
