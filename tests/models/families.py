"""Random decoders of the transformers library, small enough for a test, and a tokenizer for them."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 300

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}

# What landmark attention fits: name -> config class of transformers, settings.
FAMILIES = {
    "llama": ("LlamaConfig", GROUPED),
    "llama-tied": ("LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "llama-linear": (
        "LlamaConfig",
        {**GROUPED, "rope_parameters": LINEAR},
    ),
    "llama-llama3": ("LlamaConfig", {**GROUPED, "rope_parameters": LLAMA3}),
    "llama-yarn": ("LlamaConfig", {**GROUPED, "rope_parameters": YARN}),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": None}),
    "mistral-wide-window": ("MistralConfig", {**GROUPED, "sliding_window": 128}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 16}),
    "phi3": ("Phi3Config", GROUPED),
    "olmo": ("OlmoConfig", GROUPED),
    "olmo2": ("Olmo2Config", GROUPED),
    "gpt-neox": (
        "GPTNeoXConfig",
        {**COMMON, "rope_parameters": PARTIAL},
    ),
    "gemma": ("GemmaConfig", {**GROUPED, "head_dim": 16}),
    "gemma2-unbounded": (
        "Gemma2Config",
        {**GROUPED, "head_dim": 16, "attn_logit_softcapping": None, "sliding_window": 512},
    ),
    "granite": ("GraniteConfig", GROUPED),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 4}),
}


def tiny_decoder(family: str, **settings):
    """A random model of the family, with the attention it comes with."""
    import transformers

    name, common = FAMILIES[family]
    return random_decoder(getattr(transformers, name), {**common, **settings})


def random_decoder(config_class: type, settings: dict):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**settings))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            # Norms and biases that are not all alike, as after training.
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def tiny_tokenizer(**special) -> PreTrainedTokenizerFast:
    """Bytes and an end of text: 257 tokens, `<|end|>` the first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<|end|>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>", **special)
