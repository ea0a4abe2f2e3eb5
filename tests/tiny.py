"""Models small enough to make and run in a test."""

import torch

from landmark_cli.models.gpt import GPTConfig, GPTForCausalLM

FREQ, VOCABULARY, LANDMARK = 4, 40, 39


def tiny_model(seed: int = 0, **settings) -> GPTForCausalLM:
    """A random model with landmarks; settings go to its config."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": VOCABULARY,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "landmark_freq": FREQ,
        "landmark_token_id": LANDMARK,
        "trained_length": 40,
        "top_k_blocks": 2,
        "initializer_range": 0.5,
        "eos_token_id": None,
    }
    return GPTForCausalLM(GPTConfig(**{**config, **settings})).eval()


def tiny_baseline(seed: int = 0, **settings) -> GPTForCausalLM:
    """A random model without landmarks."""
    return tiny_model(seed, **{"landmark_freq": None, "landmark_token_id": None, **settings})


def tiny_llama(seed: int = 0, **settings):
    """A random untouched decoder of the transformers library."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "initializer_range": 0.5,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **settings})).eval()


def tiny_text(length: int, seed: int = 1) -> torch.Tensor:
    """Random text tokens, (length,) int64."""
    return torch.randint(0, LANDMARK, (length,), generator=torch.Generator().manual_seed(seed))
