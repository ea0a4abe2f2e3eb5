"""Finding a model's rotary embedding: the angles of each layer, fixed at those of the trained length."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

ANGLES = "inv_freq"
# Of these transformers chooses the angles anew in every forward, by the furthest position in it.
CHANGING = ("dynamic", "longrope")


class Angles(NamedTuple):
    """Where a layer's angles are: a module's buffer of that name, (rotary_dim / 2,), which goes where that goes."""

    module: nn.Module
    name: str

    @property
    def values(self) -> Tensor:
        return getattr(self.module, self.name)

    def same(self, other: Angles) -> bool:
        """Whether another layer's are the same. Of a model that has no weights yet nobody knows."""
        mine, theirs = self.values, other.values
        return mine.is_meta or theirs.is_meta or (mine.shape == theirs.shape and bool((mine == theirs).all()))


def inverse_frequencies(model: nn.Module) -> Tensor:
    """The angle per position of each rotated pair of dimensions, (rotary_dim / 2,), in the layers with landmarks.

    Raises ValueError as `landmark_angles` does.
    """
    return landmark_angles(model).values


def landmark_angles(model: nn.Module) -> Angles:
    """Where the angles of the layers with landmarks are; those of a model that has landmarks no longer change.

    Raises ValueError as `angles_of` does, and where these layers differ in them.
    """
    config = model.config
    layers = getattr(config, "landmark_layers", None) or range(config.num_hidden_layers)
    turns = getattr(config, "landmark_rotary", None)
    # Where none of them has positions, the angles of any layer serve: they are not used.
    layers = [layer for layer in layers if turns is None or turns[layer] != "none"] or [0]
    first = angles_of(model, layers[0])
    # Layers of one kind have one buffer, so few are looked at.
    kinds = getattr(config, "layer_types", None)
    for layer in {kinds[layer]: layer for layer in layers}.values() if kinds else ():
        if not angles_of(model, layer).same(first):
            raise ValueError(f"{type(model).__name__} has layers with landmarks whose rotary embeddings differ")
    if getattr(config, "landmark_freq", None) and config._attn_implementation == "landmark":
        fix_angles(first.module, config)
    return first


def angles_of(model: nn.Module, layer: int) -> Angles:
    """Where the angles of a layer are. A model whose layers are of several kinds (`config.layer_types`) may have a
    buffer for each, whose name, or whose module's, says the kind.

    Raises ValueError where the model has none, or several that differ and of which none is known to be the layer's.
    """
    found = {}
    for prefix, module in model.named_modules():
        for name, _ in module.named_buffers(recurse=False):
            if name.endswith(ANGLES) and "original" not in name:
                found[f"{prefix}.{name}"] = Angles(module, name)
    if not found:
        raise ValueError(f"{type(model).__name__} has no rotary embedding")
    kinds = getattr(model.config, "layer_types", None)
    own = [angles for name, angles in found.items() if kinds and kinds[layer] in name] or list(found.values())
    if not all(own[0].same(other) for other in own[1:]):
        raise ValueError(f"{type(model).__name__} has several rotary embeddings that differ")
    return own[0]


def settle_angles(model: nn.Module) -> None:
    """Have the angles of a model with landmarks no longer change from the first forward on. May be called again, when
    the trained length is another one."""
    for module in model.modules():
        if not hasattr(module, "landmark_rope_type"):
            if not changing(getattr(module, "rope_type", None)):
                continue
            module.landmark_rope_type = copy.copy(module.rope_type)
            module.register_forward_pre_hook(partial(_fix, model.config))
        module.rope_type = copy.copy(module.landmark_rope_type)


def fix_angles(module: nn.Module, config: PreTrainedConfig) -> None:
    """Have a rotary embedding keep the angles that transformers gives to inputs as long as config.trained_length: what
    is read stands nowhere beyond it, whatever its length. Of angles that never change nothing has to be kept."""
    for kind in changing(getattr(module, "rope_type", None)):
        buffer = next(module.buffers())
        furthest = torch.tensor([[config.trained_length - 1]], device=buffer.device)
        # Not by a call, which would come back here.
        module.forward(buffer, furthest, *([] if kind is None else [kind]))
        if kind is None:
            module.rope_type = "default"
        else:
            module.rope_type[kind] = "default"


def _fix(config: PreTrainedConfig, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """A forward pre-hook: the angles are fixed when there are weights, wherever they are. A model that is opened
    without landmark attention is the plain decoder, whose angles change."""
    if config._attn_implementation == "landmark":
        fix_angles(module, config)


def changing(rope_type: Any) -> list[str | None]:
    """The kinds of layers whose angles change; None stands for all layers."""
    types = rope_type if isinstance(rope_type, dict) else {None: rope_type}
    return [kind for kind, name in types.items() if name in CHANGING]
