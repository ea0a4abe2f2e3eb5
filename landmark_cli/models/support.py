"""Which decoders landmark attention fits, and why it does not fit the others.

Reading through a block cache turns keys and queries by whole blocks, so every layer must encode positions by rotating
half-split pairs of dimensions by fixed angles, and must weigh its keys by nothing but their dot products. What a model
does is found by trying: in one forward of a few equal tokens, keys may differ by that rotation and by nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AttentionInterface,
    PreTrainedConfig,
    PreTrainedModel,
)

from landmark_cli.attention.reference import repeat_heads
from landmark_cli.attention.rotary import rotate, rotation_table
from landmark_cli.errors import LandmarkError
from landmark_cli.families import FAMILIES, fitting

from .rotary import inverse_frequencies

PROBE = "landmark_probe"
# Keys of half precision differ from exact rotations by less than a hundredth; another kind of position by about one.
ROTATION_TOLERANCE = 0.05
ADJACENT_PAIRS = "turns adjacent pairs of dimensions (interleaved), not half-split ones"
CHANGING_ANGLES = {
    "dynamic": "its angles change with the length of the input",
    "longrope": "its angles change once the input is longer than the original training length",
}


def check_config(config: PreTrainedConfig, name: str) -> None:
    """Refuse by its config a model that is no decoder, or whose rotary angles are not fixed.

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
    rope = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise _refusal(name, f"its layers of different kinds ({', '.join(rope)}) have rotary embeddings of their own")
    reason = CHANGING_ANGLES.get(rope.get("rope_type"))
    if reason:
        raise _refusal(name, f"its rotary embedding is of the type {rope['rope_type']}: {reason}")


def check_model(model: PreTrainedModel, trained_length: int, name: str) -> None:
    """Refuse a loaded model whose attention or positions landmark attention would change.

    trained_length: stream tokens (landmarks included) of a window; a sliding window as long as that never matters.
    Raises LandmarkError with the reason.
    """
    try:
        frequencies = inverse_frequencies(model)
    except ValueError:
        raise _refusal(name, _other_positions(model)) from None
    if getattr(model.config, "rotary_dim", None) and not hasattr(model.config, "rope_parameters"):
        raise _refusal(name, f"its rotary embedding {ADJACENT_PAIRS}")
    longest = max(trained_length - 1, 1)
    seen = _probe(model, torch.tensor([0, 1, 1 + longest // 3, longest]).unique())
    layers = model.config.num_hidden_layers
    if len(seen.layers) != layers:
        raise _refusal(
            name,
            f"{len(seen.layers)} of its {layers} layers hand what the model is given on to transformers' "
            "AttentionInterface; the others have an attention of their own, or none",
        )
    for index, layer in enumerate(seen.layers):
        reason = layer.unusual(trained_length) or layer.wrong_rotation(seen.positions, frequencies)
        if reason:
            raise _refusal(name, f"in layer {index} {reason}")


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
        return f"its rotary embedding {ADJACENT_PAIRS}"
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

    def unusual(self, trained_length: int) -> str | None:
        """Something beside dot products that decides over the weights, in words; None where there is nothing."""
        window = self.arguments.get("sliding_window")
        if self.arguments.get("softcap") is not None:
            return f"logits are soft-capped (at {self.arguments['softcap']}), which landmark attention does not do"
        if self.arguments.get("s_aux") is not None:
            return "attention sinks take a share of the softmax, which landmark attention does not have"
        if window is not None and window < trained_length:
            return (
                f"a sliding window of {window} tokens hides what landmarks would reach "
                f"(a trained length of at most {window} stays inside it)"
            )
        if self.mask is not None:
            return "the model masks or biases attention itself"
        if self.key.shape != self.value.shape:
            return f"keys ({self.key.shape[-1]}) and values ({self.value.shape[-1]}) differ in width"
        return None

    def wrong_rotation(self, positions: Tensor, frequencies: Tensor) -> str | None:
        """How positions enter, in words, where it is not by rotating half-split pairs; None where it is."""
        cos, sin = rotation_table(positions.to(self.key.device), frequencies.to(self.key.device))
        for part in (self.key, self.query):
            part = part.float()
            first, size = part[:, :, :1].expand_as(part), part.norm().clamp(min=1e-12)
            if not size.isfinite():
                return "keys are not finite numbers: the weights are damaged"
            if (part - rotate(first, cos, sin)).norm() / size < ROTATION_TOLERANCE:
                continue
            if (part - first).norm() / size < ROTATION_TOLERANCE:
                return "there is no rotary embedding (NoPE): keys are the same at every position"
            # Adjacent pairs, put in the order of half-split ones.
            rotated = slice(2 * cos.shape[-1])
            part, first = (
                torch.cat([x[..., rotated][..., 0::2], x[..., rotated][..., 1::2]], -1) for x in (part, first)
            )
            if (part - rotate(first, cos, sin)).norm() / size < ROTATION_TOLERANCE:
                return f"the rotary embedding {ADJACENT_PAIRS}"
            return "positions change the keys otherwise than by the rotary embedding's angles"
        return None


@dataclass
class _Seen:
    positions: Tensor
    layers: list[_Layer] = field(default_factory=list)


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
    return repeat_heads(value, query.shape[1]).transpose(1, 2), None


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
