"""Training nothing of a decoder but what finds blocks: the landmark's row, and queries and keys where landmarks are."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from transformers import PreTrainedModel

from landmark_cli.attention.layer_kind import kind_of
from landmark_cli.errors import LandmarkError
from landmark_cli.models.layers import landmark_layers

QUERIES_AND_KEYS = re.compile(r"\.(q_proj|k_proj|q_norm|k_norm)\.")


def train_landmarks(model: PreTrainedModel) -> None:
    """Freeze a landmark decoder but for the landmark's row of the embedding (and of the head where the two are tied),
    and what makes queries and keys, with their norms, in the layers with landmarks: not in those that keep a window.

    Raises LandmarkError where queries and keys are made together with something else.
    """
    local = tuple(f"{name}." for name, module in model.named_modules() if kind_of(module).local)
    found = {name for name, _ in model.named_parameters() if QUERIES_AND_KEYS.search(name)}
    found = {name for name in found if not name.startswith(local)}
    made = {kind: sum(f".{kind}.weight" in name for name in found) for kind in ("q_proj", "k_proj")}
    layers = len(landmark_layers(model.config))
    if set(made.values()) != {layers}:
        raise LandmarkError(
            f"--train landmarks needs layers of their own for queries and keys (q_proj, k_proj) in all {layers} "
            f"layers with landmarks, and {model.config._name_or_path or 'the model'} ({model.config.model_type}) has "
            "other ones: take --train all, or a --lora-rank"
        )
    row = model.config.landmark_token_id

    def of_the_landmark(gradient: Tensor) -> Tensor:
        kept = torch.zeros_like(gradient)
        kept[row] = gradient[row]
        return kept

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in found)
    embedding = model.get_input_embeddings().weight
    # Neither AdamW's moments nor its decay, which embeddings have none of, move a row that never has a gradient.
    embedding.requires_grad_(True).register_hook(of_the_landmark)
