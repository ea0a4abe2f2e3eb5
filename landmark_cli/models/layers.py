"""Of which kinds a model's layers are: found by asking it once, kept in its config, told to its layers.

landmark_layers: the layers with landmarks; without it, all. The others keep their sliding window.
landmark_rotary: of each layer how positions enter (see attention/layer_kind.py); without it, by half-split pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedConfig

from landmark_cli.attention.layer_kind import LayerKind, Turns

from .rotary import angles_of, settle_angles


def keep_kinds(config: PreTrainedConfig, local: Sequence[bool], turns: Sequence[Turns]) -> None:
    """Write into a config which layers are local and how each rotates, as far as it is not as usual."""
    unusual = {}
    if any(local):
        unusual["landmark_layers"] = [layer for layer, is_local in enumerate(local) if not is_local]
    if set(turns) != {"halves"}:
        unusual["landmark_rotary"] = list(turns)
    for name in ("landmark_layers", "landmark_rotary"):
        if name in unusual:
            setattr(config, name, unusual[name])
        elif hasattr(config, name):
            delattr(config, name)


def landmark_layers(config: PreTrainedConfig) -> list[int]:
    """The layers with landmarks of a landmark model."""
    layers = getattr(config, "landmark_layers", None)
    return list(range(config.num_hidden_layers)) if layers is None else layers


def window_of_all(config: PreTrainedConfig) -> int | None:
    """The sliding window of a decoder all of whose layers have one, by its config; None where some see everything."""
    some_see_all = "full_attention" in (getattr(config, "layer_types", None) or ())
    if some_see_all or not getattr(config, "use_sliding_window", True):
        return None
    return getattr(config, "sliding_window", None) or None


def key_heads(config: PreTrainedConfig, layer: int) -> tuple[int, int]:
    """How many key heads a layer has, and the width of its heads. transformers refuses to say for the whole model where
    layers differ in these (Gemma4)."""
    own = config.per_layer_config[layer] if getattr(config, "is_heterogeneous", False) else config
    heads = getattr(own, "num_key_value_heads", None) or own.num_attention_heads
    head_dim = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
    if own is config and getattr(config, "global_head_dim", None) and config.layer_types[layer] == "full_attention":
        # Gemma4's config in transformers that knows nothing of layers that differ yet.
        shared = getattr(config, "num_global_key_value_heads", None) if config.attention_k_eq_v else None
        return shared or heads, config.global_head_dim
    return heads, head_dim


def settle_layers(model: nn.Module) -> None:
    """Tell every layer of a landmark model what its config says of it. May be called again."""
    config = model.config
    settle_angles(model)
    turns, with_landmarks = getattr(config, "landmark_rotary", None), getattr(config, "landmark_layers", None)
    if turns is None and with_landmarks is None:
        return
    kinds = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int):
            continue
        if layer not in kinds:
            own: Turns = "halves" if turns is None else turns[layer]
            is_local = with_landmarks is not None and layer not in with_landmarks
            kinds[layer] = LayerKind(is_local, own, *angles_of(model, layer))
        module.landmark_kind = kinds[layer]
