"""Which decoders have layers of which all parts are known, and how these are put together: another class, a hook, an
adapter or a replaced forward, and a model's modules are left as they are."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from .rotary import changing

# A variable of the environment: 0 leaves all models their modules.
SWITCH = "LANDMARK_FUSED_STEPS"
Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class Make:
    """How a family's layers are put together of a norm, an attention, another norm and an MLP.

    norms: the names of those in front of attention and MLP. norms_after: of those behind them, before what they give is
    added; none where it is added as it is. centered: whether norms multiply by 1 + weight, and round once. activation:
    of the MLP's gate. model, embedding: the names of these modules' classes behind the family's; any embedding, if it
    has none. rotates_by_kind: whether the rotary embedding is asked for the angles of a layer's kind. caps: whether
    logits of the attention are soft-capped. caps_head: whether those of the head are; other families' modules do not
    look at what a config says of it.
    """

    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    norms_after: tuple[str, ...] = ()
    centered: bool = False
    activation: Activation = "silu"
    model: str = "Model"
    embedding: str | None = None
    rotates_by_kind: bool = False
    caps: bool = False
    caps_head: bool = False


LLAMA = Make()
GEMMA2 = Make(
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    norms_after=("post_attention_layernorm", "post_feedforward_layernorm"),
    centered=True,
    activation="gelu_tanh",
    embedding="TextScaledWordEmbedding",
    caps=True,
    caps_head=True,
)
# By name, as their modules are imported with them.
FAMILIES = {
    **dict.fromkeys(("Llama", "Mistral", "Ministral", "Qwen2", "Qwen3", "SmolLM3"), LLAMA),
    "Gemma2": GEMMA2,
    "Gemma3": replace(GEMMA2, model="TextModel", caps=False, rotates_by_kind=True),
}
# What is one product.
QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
# By what a family's class is called behind the family's name, the modules that it has beside norms; None where none are
# looked at.
ROLES: dict[str, set[str] | None] = {
    "Model": None,
    "RotaryEmbedding": set(),
    "RMSNorm": set(),
    "DecoderLayer": {"self_attn", "mlp"},
    "Attention": {*QKV, "o_proj"},
    "MLP": {*GATE_UP, "down_proj", "act_fn"},
}
# What an attention may have beside them.
HEAD_NORMS = {"q_norm", "k_norm"}
# What a layer's modules are by their names; the others are linear.
PARTS = {
    **dict.fromkeys({name for make in FAMILIES.values() for name in (*make.norms, *make.norms_after)}, "RMSNorm"),
    **dict.fromkeys(HEAD_NORMS, "RMSNorm"),
    "self_attn": "Attention",
    "mlp": "MLP",
    "act_fn": "activation",
}
ACTIVATIONS = {"silu": (nn.SiLU, type(ACT2FN["silu"])), "gelu_tanh": (type(ACT2FN["gelu_pytorch_tanh"]),)}


def make_of(model: PreTrainedModel) -> Make:
    """How the layers of a model are put together of which `why_not_known` gives no reason."""
    return FAMILIES[_family(model)]


def of_same_input(layer: nn.Module) -> list[list[nn.Module]]:
    """Of a known decoder's layer the linear layers that take the same input."""
    return [[getattr(owner, name) for name in names] for owner, names in ((layer.self_attn, QKV), (layer.mlp, GATE_UP))]


def why_not_known(model: PreTrainedModel, linear: tuple[type, ...] = (nn.Linear,)) -> str | None:
    """Why a model's parts may not be called in its layers' place, or None. linear: classes that its linear layers may
    be of."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH} is 0"
    family = _family(model)
    if family is None:
        return f"{type(model).__name__} is none of {', '.join(FAMILIES)}"
    file, make = sys.modules[type(model).__module__], FAMILIES[family]
    if model.training:
        return "the model is training"
    for path, module in model.named_modules():
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            return f"{path or 'the model'} has a hook, or a forward of its own"
    for path, module, role in _modules(model):
        if role in ROLES:
            own = getattr(file, f"{family}{make.model if role == 'Model' else role}", None)
            known = type(module) is own and own.__module__ == own.forward.__module__ == file.__name__
            norms = {*make.norms, *make.norms_after} if role == "DecoderLayer" else set()
            children = module._modules.keys()
            known &= ROLES[role] is None or children - HEAD_NORMS == ROLES[role] | norms
            known &= role == "Attention" or not HEAD_NORMS & children
        else:
            known = type(module) in (linear if role == "linear" else ACTIVATIONS[make.activation])
        if not known or (role == "RMSNorm" and module.weight.dtype != model.dtype):
            return f"{path} is a {type(module).__name__}"
    embedding = model.get_input_embeddings()
    if make.embedding is not None and type(embedding) is not getattr(file, f"{family}{make.embedding}", None):
        return f"the embedding is a {type(embedding).__name__}"
    if getattr(model.config, "use_bidirectional_attention", False):
        return "tokens see those behind them"
    rotary = model.model.rotary_emb
    if changing(getattr(rotary, "rope_type", None)):
        return "its angles change with a text's length"
    angles = [x for name, x in rotary.named_buffers() if "original" not in name]
    if any(2 * len(x) != model.model.layers[0].self_attn.head_dim for x in angles):
        return "a part of each head is rotated"
    return None


def _family(model: PreTrainedModel) -> str | None:
    """The name in FAMILIES that a model's class has in transformers' own file; None where there is none."""
    family = next((name for name in FAMILIES if type(model).__name__ == f"{name}ForCausalLM"), None)
    file = None if family is None else f"transformers.models.{family.lower()}.modeling_{family.lower()}"
    return family if type(model).__module__ == file else None


def _modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, str]]:
    """Of each module that is not called but whose parts are, or stands between products: path, module, what it is."""
    yield "model", model.model, "Model"
    yield "model.rotary_emb", model.model.rotary_emb, "RotaryEmbedding"
    yield "model.norm", model.model.norm, "RMSNorm"
    for index, layer in enumerate(model.model.layers):
        for path, module in layer.named_modules(prefix=f"model.layers.{index}"):
            if module is layer:
                yield path, module, "DecoderLayer"
            elif ".product" not in path:
                # What a quantized layer is made of is its own matter.
                yield path, module, PARTS.get(path.rpartition(".")[2], "linear")
