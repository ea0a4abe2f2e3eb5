"""Random decoders of the transformers library, small enough for a test, and a tokenizer for them."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from landmark_cli.models.pretrained import plain_attention

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

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 4.0, 8.0, 16.0],
}

# Every other layer sees some text: more than a block, less than a chunk or window of the tests, no multiple of any.
LOCAL = {"sliding_window": 11, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

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
    "llama-dynamic": ("LlamaConfig", {**GROUPED, "rope_parameters": DYNAMIC}),
    "mistral-wide-window": ("MistralConfig", {**GROUPED, "sliding_window": 128}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 16}),
    "phi": ("PhiConfig", COMMON),
    "phi3": ("Phi3Config", GROUPED),
    # Windows of the tests go beyond the original positions of the first, and not beyond those of the second.
    "phi3-longrope": ("Phi3Config", {**GROUPED, "original_max_position_embeddings": 32, "rope_parameters": LONGROPE}),
    "phi3-longrope-short": (
        "Phi3Config",
        {**GROUPED, "original_max_position_embeddings": 128, "rope_parameters": LONGROPE},
    ),
    "olmo": ("OlmoConfig", GROUPED),
    "olmo2": ("Olmo2Config", GROUPED),
    "gpt-neox": (
        "GPTNeoXConfig",
        {**COMMON, "rope_parameters": PARTIAL},
    ),
    "gemma": ("GemmaConfig", {**GROUPED, "head_dim": 16}),
    "granite": ("GraniteConfig", GROUPED),
    "cohere": ("CohereConfig", GROUPED),
    "glm": ("GlmConfig", {**GROUPED, "head_dim": 8}),
    "glm4": ("Glm4Config", {**GROUPED, "head_dim": 8}),
    "glm4-moe": (
        "Glm4MoeConfig",
        {**GROUPED, "head_dim": 8, **EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1},
    ),
    "ernie4.5": ("Ernie4_5Config", GROUPED),
    "seed-oss": ("SeedOssConfig", {**GROUPED, "head_dim": 8, "attention_dropout": 0.0, "residual_dropout": 0.0}),
    "qwen2-moe": ("Qwen2MoeConfig", {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 32}),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "qwen3-moe": ("Qwen3MoeConfig", {**GROUPED, "head_dim": 16, **EXPERTS}),
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 16, **LOCAL, "attn_logit_softcapping": 2.0}),
    "gemma2-unbounded": ("Gemma2Config", {**GROUPED, "head_dim": 16, **LOCAL, "attn_logit_softcapping": None}),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, "head_dim": 16, **LOCAL}),
    "gemma4": (
        "Gemma4TextConfig",
        {
            **GROUPED,
            "head_dim": 8,
            "global_head_dim": 16,
            **LOCAL,
            "hidden_size_per_layer_input": 4,
            "vocab_size_per_layer_input": VOCABULARY,
        },
    ),
    "ministral": ("MinistralConfig", {**GROUPED, "head_dim": 8, **LOCAL}),
    "exaone4": ("Exaone4Config", {**GROUPED, **LOCAL}),
    "qwen2-local": ("Qwen2Config", {**GROUPED, **LOCAL, "use_sliding_window": True}),
    "olmo3": ("Olmo3Config", {**GROUPED, **LOCAL}),
    "smollm3": ("SmolLM3Config", {**GROUPED, "no_rope_layers": [1, 0], "pad_token_id": 0}),
    "cohere2": ("Cohere2Config", {**GROUPED, **LOCAL}),
    "gpt-oss": ("GptOssConfig", {**GROUPED, "head_dim": 8, **LOCAL, "num_local_experts": 4}),
}


def tiny_decoder(family: str, **settings):
    """A random model of the family, with full attention as it is meant."""
    import transformers

    name, common = FAMILIES[family]
    return random_decoder(getattr(transformers, name), {**common, **settings})


def random_decoder(config_class: type, settings: dict):
    torch.manual_seed(0)
    config = config_class(**settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=plain_attention(config))
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
