"""A decoding step of decoders whose layers are known part by part, in fewer kernels: what is of the same input is one
product, and what stands between products one kernel each (see step_operations.py).

A step of one token reads every weight once and does next to nothing with it, so its time is that of the weights and of
launching kernels, of which transformers' modules have about forty a layer. The modules stay as they are and are asked
whenever something else than a step on a GPU is run; here their parts are called in the order in which they call them.
What is not known to be just that is left to the modules (see known_layers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import step_operations
from .joined import Product, join, parameters_to_join
from .known_layers import of_same_input, why_not_known
from .quantization import QuantizedLinear


class FusedStep:
    """A model's forward pass over the few tokens of a step. Made anew after any change of the model.

    Only where `why_not_fused` gives no reason. streams: whether products of few rows are those of row_products.py.
    """

    streams = False

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.layers = [_Layer(layer) for layer in model.model.layers]
        self.embedding, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        self.attend = ALL_ATTENTION_FUNCTIONS.get_interface(model.config._attn_implementation, None)

    @torch.no_grad()
    def __call__(self, ids: Tensor, kept: Tensor, position_ids: Tensor, **inputs: Any) -> Tensor:
        """ids, position_ids: (B, T). kept: (n,) tokens of T to give logits for. inputs: what the attention takes beside
        them. Returns (B, n, vocabulary)."""
        model = self.model.model
        x, added = self.embedding(ids), None
        kernels = _operations(ids.device), _streams() if self.streams else None
        own = _Own(*kernels, self.attend, model.rotary_emb(x, position_ids), inputs)
        for layer in self.layers:
            x, added = layer(x, added, own)
        _, hidden = own.operations.add_norm(x, added, model.norm.weight, model.norm.variance_epsilon)
        return self.head(hidden if ids.shape[1] == 1 else hidden[:, kept])


class _Own(NamedTuple):
    """What is a step's own and the same for all layers. operations: what `_operations` gives. streams: row_products.py,
    or None. attend, inputs: the attention, and what it takes. rotation: cos and sin (B, T, D)."""

    operations: ModuleType
    streams: ModuleType | None
    attend: Callable
    rotation: tuple[Tensor, Tensor]
    inputs: dict[str, Any]

    def products(self, x: Tensor, product: Product) -> Sequence[Tensor]:
        """What each of a product's layers gives."""
        if self.streams is not None and self.streams.serves(x, product.weight):
            return product.split(self.streams.products(x, product.weight, product.bias))
        return product(x)

    def gated(self, x: Tensor, product: Product) -> Tensor:
        """What of two layers the first gives as the other's gate."""
        if self.streams is not None and product.bias is None and self.streams.serves(x, product.weight):
            return self.streams.gated_products(x, product.weight)
        return self.operations.gated(*product(x))


class _Layer:
    """A decoder's layer, whose last addition is left to who comes next."""

    def __init__(self, layer: nn.Module):
        attention, mlp = layer.self_attn, layer.mlp
        self.norm, self.mlp_norm, self.attention = layer.input_layernorm, layer.post_attention_layernorm, attention
        self.qkv, self.gate_up = map(Product, of_same_input(layer))
        self.out, self.down = Product([attention.o_proj]), Product([mlp.down_proj])
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.head_norms = () if q_norm is None else (q_norm.weight, k_norm.weight, q_norm.variance_epsilon)
        window = getattr(attention.config, "sliding_window", None)
        self.window = getattr(attention, "sliding_window", window)

    def __call__(self, x: Tensor, added: Tensor | None, own: _Own) -> tuple[Tensor, Tensor]:
        """The residual stream x + added, (B, T, N), as what it is made of: before the layer, and after it."""
        attention, operations = self.attention, own.operations
        x, hidden = operations.add_norm(x, added, self.norm.weight, self.norm.variance_epsilon)
        q, k, v = (part.unflatten(-1, (-1, attention.head_dim)) for part in own.products(hidden, self.qkv))
        q, k = operations.rotate_heads(q, k, *own.rotation, *self.head_norms)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        given = {"dropout": 0.0, "scaling": attention.scaling, "sliding_window": self.window}
        out, _ = own.attend(attention, q, k, v, None, **given, **own.inputs)
        (added,) = own.products(out.flatten(2), self.out)
        x, hidden = operations.add_norm(x, added, self.mlp_norm.weight, self.mlp_norm.variance_epsilon)
        (added,) = own.products(own.gated(hidden, self.gate_up), self.down)
        return x, added


def _operations(device: torch.device) -> ModuleType:
    """The kernels on a GPU, elsewhere the definitions."""
    if device.type == "cuda":
        from . import step_kernels

        return step_kernels
    return step_operations


def _streams() -> ModuleType:
    from . import row_products

    return row_products


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
