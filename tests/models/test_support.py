"""Models that landmark attention does not fit are refused before anything is changed, each for its own reason."""

import pytest
import transformers
from transformers import AutoModelForCausalLM

from landmark_cli.errors import LandmarkError
from landmark_cli.models.decoders import add_landmarks
from landmark_cli.models.support import check_config
from tests.models.families import COMMON, GROUPED, LOCAL, random_decoder, tiny_tokenizer

SMALL = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
REFUSED = {
    "sliding windows alone": (
        "MistralConfig",
        {**GROUPED, "sliding_window": 64},
        "all of its layers have a sliding window, the narrowest of 64 tokens.*of at most 64",
    ),
    "chunked layers": (
        "Llama4TextConfig",
        {**GROUPED, "head_dim": 8, "num_local_experts": 2, "attention_chunk_size": 64},
        "layers of the kind chunked_attention",
    ),
    "gpt-j": ("GPTJConfig", {**SMALL, "rotary_dim": 8}, "no module with the angles"),
    "learned positions": ("GPT2Config", SMALL, "learned absolute positions .gpt2, transformer.wpe"),
    "alibi by its type": ("MptConfig", {"vocab_size": 300, "d_model": 32, "n_layers": 2, "n_heads": 4}, "ALiBi"),
    "alibi": ("BloomConfig", {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "ALiBi"),
    "keys normed after rotation": ("HunYuanDenseV1Config", {**GROUPED, "head_dim": 8}, "otherwise than by the rotary"),
    "its own attention": (
        "FalconConfig",
        {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        "0 of its 2 layers",
    ),
    "nothing reaches its attention": ("StableLmConfig", GROUPED, "0 of its 2 layers"),
    "no attention": ("MambaConfig", {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}, "mamba"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    config_class, settings, reason = REFUSED[name]
    model, tokenizer = random_decoder(getattr(transformers, config_class), settings), tiny_tokenizer()
    attention = model.config._attn_implementation
    with pytest.raises(LandmarkError, match=reason):
        add_landmarks(model, tokenizer, landmark_freq=15, trained_length=128)
    assert len(tokenizer) == 257 and model.config.vocab_size == 300
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize(
    ("config_class", "reason"),
    [
        ("BertConfig", "an encoder .bert"),
        ("RoFormerConfig", "an encoder .roformer"),
        ("ModernBertConfig", "an encoder .modernbert"),
        ("T5Config", "an encoder-decoder .t5"),
        ("BartConfig", "an encoder-decoder .bart"),
        ("CLIPConfig", "no causal language model .clip"),
        ("Gemma3Config", "made of several models .gemma3.; its language model alone"),
    ],
)
def test_refused_by_its_config(config_class, reason):
    with pytest.raises(LandmarkError, match=reason):
        check_config(getattr(transformers, config_class)(), "it")


def test_layers_with_landmarks_that_rotate_by_different_angles():
    settings = {**GROUPED, **LOCAL, "head_dim": 16}
    model = random_decoder(transformers.Gemma3TextConfig, settings)
    model.model.layers[0].self_attn.sliding_window = None
    with pytest.raises(LandmarkError, match="its layers that see everything rotate by different angles"):
        add_landmarks(model, tiny_tokenizer(), landmark_freq=15, trained_length=128)


def test_probing_leaves_no_trace():
    model = random_decoder(transformers.LlamaConfig, COMMON).train()
    before = AutoModelForCausalLM.from_config(model.config)
    before.load_state_dict(model.state_dict())
    add_landmarks(model, tiny_tokenizer(), landmark_freq=15, trained_length=128)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    for name, parameter in before.named_parameters():
        rows = slice(0, 257) if "embed" in name or "head" in name else slice(None)
        assert (parameter[rows] == model.get_parameter(name)[rows]).all(), name
