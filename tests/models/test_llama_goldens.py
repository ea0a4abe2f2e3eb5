"""LlamaForCausalLM of the installed library gives the outputs of the authors' LLaMA from their weights."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from landmark_cli.attention.cache import BlockCache, RetrievalSettings
from landmark_cli.models.rotary import inverse_frequencies
from tests import goldens
from tests.closeness import assert_close_norm

TOLERANCE = 1e-5


def golden_model(spec: dict, tensors: dict) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=spec["layers"],
        num_attention_heads=spec["heads"],
        landmark_freq=spec["block_size"] - 1,
        landmark_token_id=spec["landmark_id"],
    )
    model = LlamaForCausalLM(config).eval()
    assert model.config._attn_implementation == "landmark"
    model.load_state_dict(goldens.part(tensors, "w."))
    return model


def check_forward(name: str, device: str, tolerance: float) -> None:
    """Logits, loss and every gradient."""
    spec, tensors = goldens.read(name)
    tensors = {key: x.to(device) for key, x in tensors.items()}
    model = golden_model(spec, tensors).to(device)

    output = model(tensors["ids"], labels=tensors["ids"])
    output.loss.backward()

    assert_close_norm(output.logits, tensors["logits"], within=tolerance)
    assert_close_norm(output.loss, tensors["loss"], within=tolerance)
    gradients = goldens.part(tensors, "g.")
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for parameter, gradient in gradients.items():
        assert_close_norm(model.get_parameter(parameter).grad, gradient, within=tolerance)


@pytest.mark.parametrize("name", goldens.names("llama_forward_*"))
def test_forward_loss_and_gradients(name):
    check_forward(name, "cpu", TOLERANCE)


@pytest.mark.parametrize("name", goldens.names("llama_retrieval_*"))
def test_chunked_reading(name):
    spec, tensors = goldens.read(name)
    model = golden_model(spec, tensors)
    stream = tensors["stream_embeddings"]
    settings = RetrievalSettings(spec["block_size"], spec["top_k"], spec["selection"])
    cache = BlockCache(settings, inverse_frequencies(model), batch=stream.shape[0])

    logits = []
    with torch.no_grad():
        for begin, end in spec["steps"]:
            chunk = cache.begin_chunk([end - begin] * stream.shape[0])
            given = {**cache.inputs(chunk), "use_cache": False}
            logits.append(model(inputs_embeds=stream[:, begin:end], **given).logits)
            cache.end_chunk(chunk)

    assert_close_norm(torch.cat(logits, dim=1), tensors["logits"], within=TOLERANCE)
