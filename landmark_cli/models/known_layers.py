"""Which decoders have layers of Llama's make, of which all parts are known: another class, a hook, an adapter or a
replaced forward, and a model's modules are left as they are."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

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
SILU = (nn.SiLU, type(ACT2FN["silu"]))


def of_same_input(layer: nn.Module) -> list[list[nn.Module]]:
    """Of a known decoder's layer the linear layers that take the same input."""
    return [[getattr(owner, name) for name in names] for owner, names in ((layer.self_attn, QKV), (layer.mlp, GATE_UP))]


def why_not_known(model: PreTrainedModel, linear: tuple[type, ...] = (nn.Linear,)) -> str | None:
    """Why a model's parts may not be called in its layers' place, or None. linear: classes that its linear layers may
    be of."""
    if os.environ.get("LANDMARK_FUSED_STEPS") == "0":
        return "LANDMARK_FUSED_STEPS is 0"
    family = next((name for name in FAMILIES if type(model).__name__ == f"{name}ForCausalLM"), None)
    if family is None or type(model).__module__ != f"transformers.models.{family.lower()}.modeling_{family.lower()}":
        return f"{type(model).__name__} is none of {', '.join(FAMILIES)}"
    file = sys.modules[type(model).__module__]
    if model.training:
        return "the model is training"
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
            known = type(module) in (linear if role == "linear" else SILU)
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
