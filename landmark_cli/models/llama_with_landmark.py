"""Directories of the original project: LLaMA fine-tuned with its own `llama_with_landmark` code.

The weights are LLaMA's own, so a directory opens as a LlamaForCausalLM with landmark attention, and is saved as one.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from landmark_cli.data.landmarks import default_top_k

# Their names, and ours. Their context length counts landmarks, as ours does.
SETTINGS = {"mem_freq": "landmark_freq", "mem_id": "landmark_token_id", "train_context_length": "trained_length"}
DEFAULTS = {"mem_freq": 63, "train_context_length": 512}


class LlamaWithLandmarkConfig(LlamaConfig):
    """Reads `model_type: llama_with_landmark` from a config.json; what comes out is a LlamaConfig."""

    model_type = "llama_with_landmark"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """config_dict: a config.json of theirs -> LlamaConfig with our settings."""
        return LlamaConfig.from_dict(translated(config_dict), **kwargs)


def translated(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Their config.json's content as that of a landmark decoder of ours. `include_landmark_in_loss` stays as it is.

    Raises ValueError where it does not name the landmark token.
    """
    if config_dict.get("mem_id") is None:
        raise ValueError('config.json has the model type "llama_with_landmark" but no "mem_id", its landmark token')
    ours = {name: value for name, value in config_dict.items() if name not in SETTINGS}
    for name, our_name in SETTINGS.items():
        ours[our_name] = config_dict.get(name, DEFAULTS.get(name))
    top_k = default_top_k(ours["trained_length"], ours["landmark_freq"])
    return ours | {"model_type": LlamaConfig.model_type, "top_k_blocks": top_k}
