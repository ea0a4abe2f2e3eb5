"""The forward pass of decoders whose layers are known part by part, in fewer kernels: what is of the same input is one
product, and what stands between products one kernel each (see step_operations.py).

A step of one token reads every weight once and does next to nothing with it, so its time is that of the weights and of
launching kernels, of which transformers' modules have forty to a hundred a layer. In a chunk of a text these each go
over the whole chunk, and of a small model, whose products are short, they take most of the time. The modules stay as
they are and are asked whenever something else is run than reading on a GPU; here their parts are called in the order in
which they call them. What is not known to be just that is left to the modules (see known_layers.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import step_operations
from .joined import Product, join, parameters_to_join
from .known_layers import SWITCH, Activation, Make, make_of, of_same_input, why_not_known
from .quantization import QuantizedLinear


class FusedStep:
    """A model's forward pass over a step's few tokens, or a chunk. Made anew after any change of the model.

    Only where `why_not_fused` gives no reason. streams: whether products of few rows are those of row_products.py where
    these are the faster; a benchmark that compares both sets it before it records a step.
    """

    streams = True

    def __init__(self, model: PreTrainedModel):
        self.model, self.make = model, make_of(model)
        self.layers = [_Layer(layer, self.make) for layer in model.model.layers]
        self.embedding, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        self.attend = ALL_ATTENTION_FUNCTIONS.get_interface(model.config._attn_implementation, None)

    @torch.no_grad()
    def __call__(self, ids: Tensor, kept: Tensor, position_ids: Tensor, **inputs: Any) -> Tensor:
        """ids, position_ids: (B, T). kept: (n,) tokens of T to give logits for. inputs: what the attention takes beside
        them. Returns (B, n, vocabulary)."""
        model, x, added, after = self.model.model, self.embedding(ids), None, None
        kernels = _operations(ids.device), _streams(ids.device) if self.streams else None
        kinds = {layer.kind for layer in self.layers}
        rotations = {kind: kernels[0].angles(position_ids, *rotary_settings(model, kind), x.dtype) for kind in kinds}
        own = _Own(*kernels, self.attend, rotations, inputs)
        for number, layer in enumerate(self.layers, 1):
            # Of the last layer nobody asks for more than is kept.
            only = kept if number == len(self.layers) and len(kept) < ids.shape[1] else None
            x, added = layer(x, added, after, own, only)
            after = layer.after_mlp
        _, hidden = own.operations.add_norm(x, added, *_norm(model.norm), after, self.make.centered)
        logits, cap = self.head(hidden), self.model.config.final_logit_softcapping if self.make.caps_head else None
        return logits if cap is None else torch.tanh(logits / cap) * cap


class Fused:
    """The fused forward pass of a model, made anew when the model has changed: finding out whether all its parts are
    known takes a host as long as launching half a chunk's kernels."""

    def __init__(self, model: PreTrainedModel):
        self.model, self._state, self._step = model, None, None

    def __call__(self) -> FusedStep | None:
        """None where the model's modules are to run."""
        if (state := _state(self.model)) != self._state:
            self._step = FusedStep(self.model) if why_not_fused(self.model) is None else None
            self._state = state
        return self._step


def _state(model: PreTrainedModel) -> list:
    """What `why_not_fused` and `FusedStep` look at, as far as it changes while a model is used: its modules and their
    parameters, hooks, adapters, whether it is training, settings of the process."""
    found: list = [os.environ.get(SWITCH), torch.is_autocast_enabled(model.device.type)]
    modules: list[nn.Module] = [model]
    for module in modules:
        hooks = module._forward_hooks, module._forward_pre_hooks
        found += [module, type(module), module.training, "forward" in vars(module), *map(len, hooks)]
        for parameter in module._parameters.values():
            found += [id(parameter), None if parameter is None else parameter.data_ptr()]
        modules += [child for child in module._modules.values() if child is not None]
    return found


class _Own(NamedTuple):
    """What is a step's own and the same for all layers. operations: what `_operations` gives. streams: row_products.py,
    or None. attend, inputs: the attention, and what it takes. rotations: by kind of layer, cos and sin (B, T, D)."""

    operations: ModuleType
    streams: ModuleType | None
    attend: Callable
    rotations: dict[str | None, tuple[Tensor, Tensor]]
    inputs: dict[str, Any]

    def products(self, x: Tensor, product: Product) -> Sequence[Tensor]:
        """What each of a product's layers gives."""
        if self.streams is not None and self.streams.serves(x, product.weight):
            return product.split(self.streams.products(x, product.weight, product.bias))
        return product(x)

    def gated(self, x: Tensor, product: Product, activation: Activation) -> Tensor:
        """What of two layers the first gives as the other's gate."""
        streams = self.streams is not None and product.bias is None and activation == "silu"
        if streams and self.streams.serves(x, product.weight):
            return self.streams.gated_products(x, product.weight)
        return self.operations.gated(*product(x), activation)


class _Layer:
    """A decoder's layer, whose last addition is left to who comes next. kind: of its rotation, None where all have one.
    after_mlp: weight and eps of the norm of what it leaves to be added, or None."""

    def __init__(self, layer: nn.Module, make: Make):
        attention, mlp = layer.self_attn, layer.mlp
        self.make, self.attention = make, attention
        self.norm, self.mlp_norm = (_norm(getattr(layer, name)) for name in make.norms)
        after = [_norm(getattr(layer, name)) for name in make.norms_after]
        self.after_attention, self.after_mlp = after or (None, None)
        self.qkv, self.gate_up = map(Product, of_same_input(layer))
        self.out, self.down = Product([attention.o_proj]), Product([mlp.down_proj])
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.head_norms = () if q_norm is None else (q_norm.weight, *_norm(k_norm), make.centered)
        window = getattr(attention.config, "sliding_window", None)
        self.given = {
            "dropout": 0.0,
            "scaling": attention.scaling,
            "sliding_window": getattr(attention, "sliding_window", window),
        }
        if make.caps:
            self.given["softcap"] = attention.attn_logit_softcapping
        self.kind = attention.layer_type if make.rotates_by_kind else None
        # Some decoders have layers without positions.
        self.rotates = bool(getattr(attention, "use_rope", True))

    def __call__(
        self, x: Tensor, added: Tensor | None, after: tuple[Tensor, float] | None, own: _Own, only: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The residual stream x + added, (B, T, N), as what it is made of: before the layer, and after it. after: of
        the norm of `added`, or None. only: (n,) the tokens of which the result is asked for; None: of all."""
        attention, operations, centered = self.attention, own.operations, self.make.centered
        x, hidden = operations.add_norm(x, added, *self.norm, after, centered)
        q, k, v = (part.unflatten(-1, (-1, attention.head_dim)) for part in own.products(hidden, self.qkv))
        if self.rotates:
            q, k = operations.rotate_heads(q, k, *own.rotations[self.kind], *self.head_norms)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out, _ = own.attend(attention, q, k, v, None, **self.given, **own.inputs)
        if only is not None:
            x, out = x[:, only], out[:, only]
        (added,) = own.products(out.flatten(2), self.out)
        x, hidden = operations.add_norm(x, added, *self.mlp_norm, self.after_attention, centered)
        (added,) = own.products(own.gated(hidden, self.gate_up, self.make.activation), self.down)
        return x, added


def rotary_settings(model: nn.Module, kind: str | None) -> tuple[Tensor, float]:
    """A decoder's angle for each position and pair of dimensions, and what cosines and sines are multiplied by; of a
    kind of layers, where each has its own."""
    prefix = "" if kind is None else f"{kind}_"
    return tuple(getattr(model.rotary_emb, prefix + name) for name in ("inv_freq", "attention_scaling"))


def _norm(norm: nn.Module) -> tuple[Tensor, float]:
    """A norm's weight and eps, which families call by two names."""
    return norm.weight, norm.eps if hasattr(norm, "eps") else norm.variance_epsilon


def _operations(device: torch.device) -> ModuleType:
    """The kernels on a GPU, elsewhere the definitions."""
    if device.type == "cuda":
        from . import step_kernels

        return step_kernels
    return step_operations


def _streams(device: torch.device) -> ModuleType | None:
    """The products that read a weight as a stream, on GPUs that let them begin to before their input is made: on others
    they have not been timed."""
    if device.type != "cuda":
        return None
    from landmark_cli.attention.kernels.common.dependent import brings_up_early

    from . import row_products

    return row_products if brings_up_early(device) else None


def join_weights(model: PreTrainedModel) -> None:
    """Have the weights of what is one product in a step lie one behind another, a layer at a time. To be done before
    anything is recorded that reads them: they move."""
    if why_not_fused(model) is not None:
        return
    for layer in model.model.layers:
        moved = [join(x) for layers in of_same_input(layer) for x in parameters_to_join(layers)]
        if any(moved) and model.device.type == "cuda":
            # The weights' memory before: too small for what the next layers' are joined in.
            torch.cuda.empty_cache()


def why_not_fused(model: PreTrainedModel) -> str | None:
    """Why a model's steps are left to its modules; None where `FusedStep` gives what these give, within rounding."""
    if torch.is_autocast_enabled(model.device.type):
        return "the model runs in autocast"
    return why_not_known(model, (nn.Linear, QuantizedLinear))
