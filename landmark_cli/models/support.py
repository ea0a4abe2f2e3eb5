"""Which decoders landmark attention fits, and why it does not fit the others.

Reading through a block cache turns keys and queries by whole blocks, so every layer must encode positions by rotating
pairs of dimensions, half-split or adjacent ones, or not at all, and must weigh its keys by their dot products, perhaps
soft-capped, and by attention sinks. Some of its layers at least must see all that is before a token. What a model does
is found by trying: in one forward of a few equal tokens, keys may differ by that rotation and by nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AttentionInterface,
    PreTrainedConfig,
    PreTrainedModel,
)

from landmark_cli.attention.layer_kind import Turns, half_split
from landmark_cli.attention.reference import repeat_heads
from landmark_cli.attention.rotary import rotate, rotation_table
from landmark_cli.errors import LandmarkError
from landmark_cli.families import FAMILIES, fitting

from .rotary import angles_of

PROBE = "landmark_probe"
# Keys of half precision differ from exact rotations by less than a hundredth; another kind of position by about one.
ROTATION_TOLERANCE = 0.05


def check_config(config: PreTrainedConfig, name: str) -> None:
    """Refuse by its config a model that is no decoder.

    name: the model, as the user calls it. Raises LandmarkError with the reason.
    """
    kind = config.model_type
    if config.is_encoder_decoder:
        raise _refusal(name, f"it is an encoder-decoder ({kind})")
    # Encoders can be opened as decoders too, where their config says so.
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise _refusal(name, f"it is an encoder ({kind})")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _refusal(name, f"it is no causal language model ({kind})")
    if config.get_text_config(decoder=True) is not config:
        raise _refusal(name, f"it is made of several models ({kind}); its language model alone may fit")


class Kinds(NamedTuple):
    """Of each layer, whether it keeps its sliding window in place of landmarks, and how positions enter; and whether
    any soft-caps its logits or has attention sinks."""

    local: list[bool]
    turns: list[Turns]
    softcap: bool
    sinks: bool


def check_model(model: PreTrainedModel, trained_length: int, name: str) -> Kinds:
    """Of which kinds a loaded model's layers are. Where some have a sliding window and others see everything, the
    former keep it. Where all have one that no window of training exceeds, it never matters, and all get landmarks.

    trained_length: stream tokens (landmarks included) of a window. Raises LandmarkError with the reason for a model
    whose attention or positions landmark attention would change.
    """
    try:
        angles_of(model, 0)
    except ValueError:
        raise _refusal(name, _other_positions(model)) from None
    longest = max(trained_length - 1, 1)
    seen = _probe(model, torch.tensor([0, 1, 1 + longest // 3, longest]).unique())
    layers = model.config.num_hidden_layers
    if len(seen.layers) != layers:
        raise _refusal(
            name,
            f"{len(seen.layers)} of its {layers} layers hand what the model is given on to transformers' "
            "AttentionInterface; the others have an attention of their own, or none",
        )
    if unknown := set(getattr(model.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        raise _refusal(
            name,
            f"it has layers of the kind {min(unknown)}, which see neither all that is before a token nor its end",
        )
    local, turns, rotating = _local_layers(seen, trained_length, name), [], []
    for index, layer in enumerate(seen.layers):
        angles = angles_of(model, index)
        if reason := layer.unusual():
            raise _refusal(name, f"in layer {index} {reason}")
        turn = layer.turns(seen.positions, angles.values)
        if turn is None:
            raise _refusal(name, f"in layer {index} {layer.otherwise()}")
        turns.append(turn)
        if not local[index] and turn != "none":
            rotating.append(angles)
    if not all(rotating[0].same(angles) for angles in rotating):
        raise _refusal(name, "its layers that see everything rotate by different angles")
    given = [any(layer.arguments.get(name) is not None for layer in seen.layers) for name in ("softcap", "s_aux")]
    return Kinds(local, turns, *given)


def _local_layers(seen: _Seen, trained_length: int, name: str) -> list[bool]:
    """Which layers keep their sliding window."""
    windows = [layer.arguments.get("sliding_window") for layer in seen.layers]
    if None in windows:
        return [window is not None for window in windows]
    if min(windows) < trained_length:
        raise _refusal(
            name,
            f"all of its layers have a sliding window, the narrowest of {min(windows)} tokens: none sees what landmarks"
            f" would reach (a trained length of at most {min(windows)} stays inside it)",
        )
    return [False] * len(windows)


def attention_dropout(model: PreTrainedModel) -> float:
    """The largest probability with which a model's layers, while it trains, drop single weights of their attention."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        seen = _probe(model, torch.zeros(1, dtype=torch.long), training=True)
    return max((layer.arguments.get("dropout") or 0.0 for layer in seen.layers), default=0.0)


def _refusal(name: str, reason: str) -> LandmarkError:
    return LandmarkError(
        f"landmark attention cannot be given to {name}: {reason}. "
        f"Models it can be given to are {fitting()}, among others"
    )


def _other_positions(model: PreTrainedModel) -> str:
    """What a model without rotary frequencies has in their place."""
    config, kind = model.config, model.config.model_type
    learned = [
        child
        for child, module in model.named_modules()
        if isinstance(module, nn.Embedding) and any(part in child for part in ("wpe", "position", "pos_emb"))
    ]
    if getattr(config, "rotary_dim", None):
        return (
            f"it has no module with the angles (inv_freq) of its rotary embedding, by which blocks are turned ({kind})"
        )
    known = FAMILIES[kind].instead_of_rotary if kind in FAMILIES else None
    if known or getattr(config, "alibi", False):
        return f"it has no rotary embedding but {known or 'ALiBi biases'} ({kind})"
    if any("relative" in child for child in learned):
        return f"it has no rotary embedding but relative position biases ({kind})"
    if learned:
        return f"it has no rotary embedding but learned absolute positions ({kind}, {learned[0]})"
    return f"it has no rotary embedding ({kind})"


@dataclass
class _Layer:
    """What one layer gave its attention function: query (1, H, T, D), key and value (1, G, T, D), and the rest."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    arguments: dict[str, Any]

    def unusual(self) -> str | None:
        """Something that decides over the weights and that is not known here, in words; None where there is nothing."""
        sinks = self.arguments.get("s_aux")
        if sinks is not None and sinks.shape != (self.query.shape[1],):
            return f"attention sinks have the shape {tuple(sinks.shape)}; one a head is known"
        if self.mask is not None:
            return "the model masks or biases attention itself"
        if self.key.shape != self.value.shape:
            return f"keys ({self.key.shape[-1]}) and values ({self.value.shape[-1]}) differ in width"
        return None

    def turns(self, positions: Tensor, frequencies: Tensor) -> Turns | None:
        """How positions enter; None where it is otherwise than by rotating by these angles (rotary_dim / 2,)."""
        cos, sin = rotation_table(positions.to(self.key.device), frequencies.to(self.key.device))
        rotated = 2 * cos.shape[-1]
        for turn in get_args(Turns):
            parts = [part.float() for part in (self.key, self.query)]
            if turn == "pairs":
                parts = [half_split(part, rotated) for part in parts]
            rotation = (torch.ones_like(cos), torch.zeros_like(sin)) if turn == "none" else (cos, sin)
            if all(_agree(part, rotate(part[:, :, :1].expand_as(part), *rotation)) for part in parts):
                return turn
        return None

    def otherwise(self) -> str:
        """Why positions enter in no way that is known, in words."""
        if not self.key.isfinite().all():
            return "keys are not finite numbers: the weights are damaged"
        return "positions change the keys otherwise than by the rotary embedding's angles"


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether keys or queries are what a rotation makes of the first of them."""
    return bool((found - expected).norm() / found.norm().clamp(min=1e-12) < ROTATION_TOLERANCE)


class _Seen:
    # No dataclass, for it is an argument of layers (see attention/dispatch.py).
    def __init__(self, positions: Tensor) -> None:
        self.positions = positions
        self.layers: list[_Layer] = []


def _record(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    landmark_probe: _Seen | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """An attention function that notes what it is given. All tokens are equal, so every value is the weighted mean."""
    if landmark_probe is not None:
        landmark_probe.layers.append(_Layer(query, key, value, attention_mask, kwargs))
    return repeat_heads(value, query.shape[1]).transpose(1, 2).contiguous(), None


@torch.no_grad()
def _probe(model: PreTrainedModel, positions: Tensor, training: bool = False) -> _Seen:
    """What every layer's attention is given for equal tokens at these positions, when reading or when training."""
    AttentionInterface.register(PROBE, _record)
    before, was_training, seen = model.config._attn_implementation, model.training, _Seen(positions)
    ids = torch.full((1, len(positions)), model.config.vocab_size // 2, device=model.device)
    try:
        model.train(training).set_attn_implementation(PROBE)
        # An attention of the model's own is not replaced, and takes no foreign arguments.
        if model.config._attn_implementation == PROBE:
            model(input_ids=ids, position_ids=positions[None].to(model.device), use_cache=False, landmark_probe=seen)
    finally:
        model.set_attn_implementation(before)
        model.train(was_training)
    return seen
