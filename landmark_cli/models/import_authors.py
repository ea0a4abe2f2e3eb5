"""The authors' lm_benchmark models as ours: names of weights, and the rotary convention.

They keep q, k and v in one matrix `c_attn` and rotate adjacent pairs of dimensions; we rotate half-split pairs, so the
rows of q and k are put in another order, which leaves every dot product as it was.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

_NAMES = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.{}": "model.norm.{}",
    "lm_head.weight": "lm_head.weight",
    "rem_token_embedding.weight": "model.context_miss_embedding.weight",
    "transformer.h.N.ln_1.{}": "model.layers.N.attention_norm.{}",
    "transformer.h.N.ln_2.{}": "model.layers.N.mlp_norm.{}",
    "transformer.h.N.attn.c_attn.{}": "model.layers.N.attention.qkv_proj.{}",
    "transformer.h.N.attn.c_proj.{}": "model.layers.N.attention.o_proj.{}",
    "transformer.h.N.mlp.c_fc.{}": "model.layers.N.mlp.up_proj.{}",
    "transformer.h.N.mlp.c_proj.{}": "model.layers.N.mlp.down_proj.{}",
}


def our_name(name: str) -> str | None:
    """Our name of the authors' parameter `name`, or None for one we have no use for (masks, rotary tables)."""
    layer = re.search(r"\.h\.(\d+)\.", name)
    generic = re.sub(r"\.h\.\d+\.", ".h.N.", name)
    kind = generic.rsplit(".", 1)[-1]
    for theirs, ours in _NAMES.items():
        if theirs.format(kind) == generic:
            return ours.format(kind).replace(".N.", f".{layer.group(1)}." if layer else ".N.")
    return None


def half_split_order(head_dim: int) -> Tensor:
    """Where each half-split dimension stands among adjacent pairs: (head_dim,) int64."""
    return torch.cat([torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)])


def convert_state(state: dict[str, Tensor], n_head: int) -> dict[str, Tensor]:
    """The authors' parameters (or their gradients) under our names and in our rotary convention.

    Tensors of other names (buffers) are left out. n_head: attention heads of the model.
    """
    converted = {}
    for name, tensor in state.items():
        ours = our_name(name)
        if ours is None:
            continue
        if ".qkv_proj." in ours:
            # (3, heads, head dim, ...): q and k change order, v does not.
            width = tensor.shape[0] // 3
            parts = tensor.view(3, n_head, width // n_head, *tensor.shape[1:]).clone()
            parts[:2] = parts[:2, :, half_split_order(width // n_head)]
            tensor = parts.view_as(tensor)
        converted[ours] = tensor
    return converted
