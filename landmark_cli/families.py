"""What differs between families of decoders and cannot be found by asking a model: one table, by model type.

The loss asks it whether logits are the head's product and nothing else, weight differences and adapters how a head and
an embedding are called, a refusal what a model has in place of rotary positions and which models fit. Whether landmark
attention fits a model is found by asking the model (see models/support.py), so a family that is not here can be
fine-tuned too: with the loss that its own code computes from all logits.

This stands outside of `landmark_cli.models`, whose import takes transformers': weight differences do without.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Decoders of one model type of transformers.

    name: as people write it; None for our own model, which nobody gives landmarks to.
    beyond_head: what its code does to the product of the last hidden states and the head's weight, or adds to the loss;
    None where it does nothing, so that the loss can be worked out without the logits. only_with: the setting of its
    config that has its code do so; where that is None, nothing is done.
    head: the name of the head's weight in files. embedding: what the name of the embedding's weight ends with there.
    instead_of_rotary: the positions it has, for which landmark attention does not fit it; None where it rotates.
    """

    name: str | None
    beyond_head: str | None = None
    only_with: str | None = None
    head: str = "lm_head.weight"
    embedding: str = "embed_tokens.weight"
    instead_of_rotary: str | None = None


ROUTER = "the loss may have the router's added"
SOFT_CAPPED, CAP = "logits may be soft-capped", "final_logit_softcapping"
SCALED = "logits are scaled"

FAMILIES = {
    "landmark_gpt": Family(None),
    "llama": Family("Llama"),
    "mistral": Family("Mistral"),
    "ministral": Family("Ministral"),
    "mixtral": Family("Mixtral", beyond_head=ROUTER),
    "qwen2": Family("Qwen2"),
    "qwen2_moe": Family("Qwen2-MoE", beyond_head=ROUTER),
    "qwen3": Family("Qwen3"),
    "qwen3_moe": Family("Qwen3-MoE", beyond_head=ROUTER),
    "phi": Family("Phi", beyond_head="the head has a bias"),
    "phi3": Family("Phi3"),
    "gpt_oss": Family("GPT-OSS", beyond_head=ROUTER),
    "olmo": Family("OLMo"),
    "olmo2": Family("OLMo2"),
    "olmo3": Family("OLMo3"),
    "smollm3": Family("SmolLM3"),
    "gpt_neox": Family("GPT-NeoX", head="embed_out.weight", embedding="embed_in.weight"),
    "gemma": Family("Gemma"),
    "gemma2": Family("Gemma2", beyond_head=SOFT_CAPPED, only_with=CAP),
    "gemma3_text": Family("Gemma3", beyond_head=SOFT_CAPPED, only_with=CAP),
    "gemma4_text": Family("Gemma4", beyond_head=SOFT_CAPPED, only_with=CAP),
    "granite": Family("Granite", beyond_head=SCALED),
    "cohere": Family("Cohere", beyond_head=SCALED),
    "cohere2": Family("Cohere2", beyond_head=SCALED),
    "glm": Family("GLM"),
    "glm4": Family("GLM4"),
    "glm4_moe": Family("GLM4-MoE"),
    "ernie4_5": Family("ERNIE4.5"),
    "exaone4": Family("EXAONE4"),
    "seed_oss": Family("Seed-OSS"),
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
    """The families that landmark attention is known to fit, for a message: without what tells their versions apart."""
    names = (family.name for family in FAMILIES.values() if family.name and not family.instead_of_rotary)
    *first, last = dict.fromkeys(re.sub(r"[0-9.]+(-MoE)?$", "", name) for name in names)
    return f"{', '.join(first)} and {last}"
