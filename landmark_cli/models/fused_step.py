"""A decoding step of decoders of Llama's make, in fewer kernels: what is of the same input is one product, and what
stands between products one kernel each (see step_operations.py).

A step of one token reads every weight once and does next to nothing with it, so its time is that of the weights and of
launching kernels, of which transformers' modules have about forty a layer. The modules stay as they are and are asked
whenever something else than a recorded step is run; here their parts are called in the order in which they call them.
What is not known to be just that (another class, a hook, an adapter, a replaced forward) is left to the modules.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import step_operations
from .joined import join, parameters_to_join, product_of
from .quantization import QuantizedLinear

# Families whose layers are those of Llama: by name, as their modules are imported with them.
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
# What is one product.
QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
# By what a family's class is called behind the family's name, the modules that it has; None where none are looked at.
ROLES: dict[str, set[str] | None] = {
    "Model": None,
    "RMSNorm": set(),
    "DecoderLayer": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "Attention": {*QKV, "o_proj"},
    "MLP": {*GATE_UP, "down_proj", "act_fn"},
}
# What an attention may have beside them.
HEAD_NORMS = {"q_norm", "k_norm"}
# What a layer's modules are by their names; the others are linear.
PARTS = {
    **dict.fromkeys(("input_layernorm", "post_attention_layernorm", *HEAD_NORMS), "RMSNorm"),
    "self_attn": "Attention",
    "mlp": "MLP",
    "act_fn": "activation",
}
LINEAR = (nn.Linear, QuantizedLinear)
SILU = (nn.SiLU, type(ACT2FN["silu"]))


class FusedStep:
    """A model's forward pass over the few tokens of a step. Made anew after any change of the model.

    Only where `why_not_fused` gives no reason.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.layers = [_Layer(layer) for layer in model.model.layers]
        self.attend = ALL_ATTENTION_FUNCTIONS.get_interface(model.config._attn_implementation, None)

    @torch.no_grad()
    def __call__(self, ids: Tensor, kept: Tensor, position_ids: Tensor, **inputs: Any) -> Tensor:
        """ids, position_ids: (B, T). kept: (n,) tokens of T to give logits for. inputs: what the attention takes beside
        them. Returns (B, n, vocabulary)."""
        model = self.model.model
        operations = _operations(ids.device)
        x, added = model.embed_tokens(ids), None
        rotation = model.rotary_emb(x, position_ids)
        for layer in self.layers:
            x, added = layer(x, added, rotation, self.attend, inputs, operations)
        _, hidden = operations.add_norm(x, added, model.norm.weight, model.norm.variance_epsilon)
        return self.model.lm_head(hidden if ids.shape[1] == 1 else hidden[:, kept])


class _Layer:
    """A decoder's layer, whose last addition is left to who comes next."""

    def __init__(self, layer: nn.Module):
        attention, mlp = layer.self_attn, layer.mlp
        self.layer, self.attention, self.mlp = layer, attention, mlp
        self.qkv, self.gate_up = map(product_of, _joined_parts(layer))
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.head_norms = () if q_norm is None else (q_norm.weight, k_norm.weight, q_norm.variance_epsilon)
        window = getattr(attention.config, "sliding_window", None)
        self.window = getattr(attention, "sliding_window", window)

    def __call__(
        self,
        x: Tensor,
        added: Tensor | None,
        rotation: tuple[Tensor, Tensor],
        attend: Any,
        inputs: dict,
        operations: Any,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream x + added, (B, T, N), as what it is made of: before the layer, and after it."""
        attention, norm = self.attention, self.layer.input_layernorm
        x, hidden = operations.add_norm(x, added, norm.weight, norm.variance_epsilon)
        q, k, v = (part.unflatten(-1, (-1, attention.head_dim)) for part in self.qkv(hidden))
        q, k = operations.rotate_heads(q, k, *rotation, *self.head_norms)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out, _ = attend(
            attention, q, k, v, None, dropout=0.0, scaling=attention.scaling, sliding_window=self.window, **inputs
        )
        norm = self.layer.post_attention_layernorm
        x, hidden = operations.add_norm(x, attention.o_proj(out.flatten(2)), norm.weight, norm.variance_epsilon)
        return x, self.mlp.down_proj(operations.gated(*self.gate_up(hidden)))


def _operations(device: torch.device) -> Any:
    """The kernels on a GPU, elsewhere the definitions."""
    if device.type == "cuda":
        from . import step_kernels

        return step_kernels
    return step_operations


def join_weights(model: PreTrainedModel) -> None:
    """Have the weights of what is one product in a step lie one behind another, a layer at a time. To be done before
    anything is recorded that reads them: they move."""
    if why_not_fused(model) is not None:
        return
    for layer in model.model.layers:
        for parts in _joined_parts(layer):
            for parameters in parameters_to_join(parts):
                join(parameters)
        if model.device.type == "cuda":
            # The weights' memory before: too small for what the next layers' are joined in.
            torch.cuda.empty_cache()


def _joined_parts(layer: nn.Module) -> list[list[nn.Module]]:
    """Of a layer the linear layers of the same input."""
    return [[getattr(owner, name) for name in names] for owner, names in ((layer.self_attn, QKV), (layer.mlp, GATE_UP))]


def why_not_fused(model: PreTrainedModel) -> str | None:
    """Why a model's steps are left to its modules; None where `FusedStep` gives what these give, within rounding."""
    if os.environ.get("LANDMARK_FUSED_STEPS") == "0":
        return "LANDMARK_FUSED_STEPS is 0"
    family = next((name for name in FAMILIES if type(model).__name__ == f"{name}ForCausalLM"), None)
    file = sys.modules[type(model).__module__]
    if family is None or file.__name__ != f"transformers.models.{family.lower()}.modeling_{family.lower()}":
        return f"{type(model).__name__} is none of {', '.join(FAMILIES)}"
    if model.training or torch.is_autocast_enabled(model.device.type):
        return "the model is training, or runs in autocast"
    for path, module in model.named_modules():
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            return f"{path or 'the model'} has a hook, or a forward of its own"
    for path, module, role in _modules(model):
        if role in ROLES:
            own = getattr(file, f"{family}{role}", None)
            known = type(module) is own and own.__module__ == own.forward.__module__ == file.__name__
            children = module._modules.keys()
            known &= ROLES[role] is None or children in (ROLES[role], ROLES[role] | HEAD_NORMS)
        else:
            known = type(module) in (LINEAR if role == "linear" else SILU)
        if not known or (role == "RMSNorm" and module.weight.dtype != model.dtype):
            return f"{path} is a {type(module).__name__}"
    if 2 * len(model.model.rotary_emb.inv_freq) != model.model.layers[0].self_attn.head_dim:
        return "a part of each head is rotated"
    return None


def _modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, str]]:
    """Of each module that is not called but whose parts are, or stands between products: path, module, what it is."""
    yield "model", model.model, "Model"
    yield "model.norm", model.model.norm, "RMSNorm"
    for index, layer in enumerate(model.model.layers):
        for path, module in layer.named_modules(prefix=f"model.layers.{index}"):
            if module is layer:
                yield path, module, "DecoderLayer"
            elif ".product" not in path:
                # What a quantized layer is made of is its own matter.
                yield path, module, PARTS.get(path.rpartition(".")[2], "linear")
