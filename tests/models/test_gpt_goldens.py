"""The paper's model gives the authors' outputs from the authors' weights."""

import pytest
import torch

from landmark_cli.attention.cache import BlockCache, RetrievalSettings
from landmark_cli.attention.recurrent import RecurrentMemory
from landmark_cli.data.landmarks import landmark_positions, stream_length
from landmark_cli.models import register
from landmark_cli.models.gpt import GPTConfig, GPTForCausalLM
from landmark_cli.models.import_authors import convert_state
from tests import goldens
from tests.closeness import assert_close_norm

register()
TOLERANCE = 1e-5


def golden_model(spec: dict, tensors: dict, block_size: int | None, **options) -> GPTForCausalLM:
    config = GPTConfig(
        vocab_size=96,
        n_layer=3,
        n_head=4,
        n_embd=64,
        landmark_freq=block_size and block_size - 1,
        landmark_token_id=spec.get("landmark_id"),
        eos_token_id=None,
        **options,
    )
    model = GPTForCausalLM(config).eval()
    state = convert_state(goldens.part(tensors, "w."), n_head=4)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing in ([], ["lm_head.weight"]) and not unexpected
    return model


def check_forward(name: str, device: str, tolerance: float) -> None:
    """Logits, loss and every gradient."""
    spec, tensors = goldens.read(name)
    tensors = {key: x.to(device) for key, x in tensors.items()}
    model = golden_model(spec, tensors, spec["block_size"]).to(device)
    targets = tensors["targets"].masked_fill(tensors["targets"] == -1, -100)

    output = model(tensors["ids"], labels=targets, shift_labels=targets)
    output.loss.backward()

    assert_close_norm(output.logits, tensors["logits"], within=tolerance)
    assert_close_norm(output.loss, tensors["loss"], within=tolerance)
    ours = dict(model.named_parameters())
    gradients = convert_state(goldens.part(tensors, "g."), n_head=4)
    assert len(gradients) >= len(ours)
    for parameter, gradient in gradients.items():
        assert_close_norm(ours.get(parameter, model.lm_head.weight).grad, gradient, within=tolerance)


@pytest.mark.parametrize("name", goldens.names("gpt_forward_*"))
def test_forward_loss_and_gradients(name):
    check_forward(name, "cpu", TOLERANCE)


@pytest.mark.parametrize("name", goldens.names("gpt_cmt_forward_*"))
def test_context_miss_token(name):
    spec, tensors = goldens.read(name)
    model = golden_model(spec, tensors, spec["block_size"], context_miss_token=True)
    targets = tensors["targets"].masked_fill(tensors["targets"] == -1, -100)
    output = model(tensors["ids"], labels=targets, shift_labels=targets)
    output.loss.backward()
    assert_close_norm(output.logits, tensors["logits"], within=TOLERANCE)
    assert_close_norm(output.loss, tensors["loss"], within=TOLERANCE)
    gradients = convert_state(goldens.part(tensors, "g."), n_head=4)
    ours = dict(model.named_parameters())
    assert "model.context_miss_embedding.weight" in gradients
    for parameter, gradient in gradients.items():
        assert_close_norm(ours.get(parameter, model.lm_head.weight).grad, gradient, within=TOLERANCE)


@pytest.mark.parametrize("in_turn", [False, True], ids=["segments at once", "segment by segment"])
@pytest.mark.parametrize("name", goldens.names("gpt_xl_*"))
def test_transformer_xl(name, in_turn):
    spec, tensors = goldens.read(name)
    model = golden_model(spec, tensors, None, segment_length=spec["chunk"], memory_length=spec["memory"])
    memory = {"recurrent_memory": RecurrentMemory(spec["memory"])} if in_turn else {}
    assert_close_norm(model(tensors["ids"], **memory).logits, tensors["logits"], within=TOLERANCE)


@pytest.mark.parametrize("name", goldens.names("gpt_retrieval_*"))
def test_chunked_reading(name):
    spec, tensors = goldens.read(name)
    freq, text = spec["mem_cache_freq"], int(tensors["text_length"])
    model = golden_model(spec, tensors, freq + 1)
    stream = tensors["stream_embeddings"]
    settings = RetrievalSettings(freq + 1, spec["cache_topk"], spec["cache_selection_method"], spec["mem_cache_size"])
    cache = BlockCache(settings, model.model.rotary_emb.inv_freq, batch=stream.shape[0])
    chunks = spec["chunk"]
    if isinstance(chunks, int):
        chunks = [min(chunks, text - at) for at in range(0, text, chunks)]

    read, logits = 0, []
    with torch.no_grad():
        for length in chunks:
            begin, end = stream_length(read, freq), stream_length(read + length, freq)
            chunk = cache.begin_chunk([end - begin] * stream.shape[0])
            out = model(inputs_embeds=stream[:, begin:end], **cache.inputs(chunk))
            cache.end_chunk(chunk)
            logits.append(out.logits)
            read += length

    logits = torch.cat(logits, dim=1)
    logits = logits[:, ~landmark_positions(logits.shape[1], freq + 1)]
    assert_close_norm(logits, tensors["logits"], within=TOLERANCE)
