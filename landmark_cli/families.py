"""What differs between families of decoders and cannot be found by asking a model: one table, by model type.

The loss asks it whether logits are the head's product and nothing else, weight differences and adapters how a head and
an embedding are called, a refusal what a model has in place of rotary positions and which models fit. Whether landmark
attention fits a model is found by asking the model (see models/support.py), so a family that is not here can be
fine-tuned too: with the loss that its own code computes from all logits.

This stands outside of `landmark_cli.models`, whose import takes transformers': weight differences do without.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Decoders of one model type of transformers.

    name: as people write it; None for our own model, which nobody gives landmarks to.
    beyond_head: what its code does to the product of the last hidden states and the head's weight, or adds to the loss;
    None where it does nothing, so that the loss can be worked out without the logits.
    head: the name of the head's weight in files. embedding: what the name of the embedding's weight ends with there.
    instead_of_rotary: the positions it has, for which landmark attention does not fit it; None where it rotates.
    """

    name: str | None
    beyond_head: str | None = None
    head: str = "lm_head.weight"
    embedding: str = "embed_tokens.weight"
    instead_of_rotary: str | None = None


FAMILIES = {
    "landmark_gpt": Family(None),
    "llama": Family("Llama"),
    "mistral": Family("Mistral"),
    "mixtral": Family("Mixtral", beyond_head="the loss may have the router's added"),
    "qwen2": Family("Qwen2"),
    "qwen3": Family("Qwen3"),
    "phi3": Family("Phi3"),
    "olmo": Family("OLMo"),
    "olmo2": Family("OLMo2"),
    "gpt_neox": Family("GPT-NeoX", head="embed_out.weight", embedding="embed_in.weight"),
    "gemma": Family("Gemma"),
    "gemma2": Family("Gemma2 without soft-capping of attention", beyond_head="logits may be soft-capped"),
    "granite": Family("Granite", beyond_head="logits are scaled"),
    "bloom": Family("BLOOM", embedding="word_embeddings.weight", instead_of_rotary="ALiBi biases"),
    "mpt": Family("MPT", embedding="wte.weight", instead_of_rotary="ALiBi biases"),
}

# How tensors of any family are called: a checkpoint may be of one that is not in the table.
HEADS = frozenset(family.head for family in FAMILIES.values())
EMBEDDINGS = frozenset(family.embedding for family in FAMILIES.values())


def is_ours(model_type: str) -> bool:
    """Whether a model type is of this package, unknown to transformers alone."""
    return model_type in FAMILIES and FAMILIES[model_type].name is None


def fitting() -> str:
    """The families that landmark attention is known to fit, for a message."""
    *names, last = (family.name for family in FAMILIES.values() if family.name and not family.instead_of_rotary)
    return f"{', '.join(names)} and {last}"
