"""The authors' outputs of chunked reading, through the fused retrieval kernels.

Interpreting kernels takes long: `make test` reads the first chunks of one row, up to where each golden shows what it is
for (eviction, a block that a step completes, ...). The slow tests, and those on a GPU, read all of it.
"""

import pytest
import torch

from landmark_cli.attention.cache import BlockCache, RetrievalSettings
from landmark_cli.data.landmarks import landmark_positions, stream_length
from landmark_cli.models.rotary import inverse_frequencies
from tests import goldens
from tests.closeness import assert_close_norm
from tests.models import test_gpt_goldens, test_llama_goldens

FIRST_CHUNKS = {
    "gpt_retrieval_evicting_k2": 3,
    "gpt_retrieval_max_heads_k3": 2,
    "gpt_retrieval_max_tokens_k2_ragged": 2,
    "gpt_retrieval_stepwise_k2": 12,
    "gpt_retrieval_token_head_k2": 2,
    "gpt_retrieval_token_head_k4": 2,
    "llama_retrieval_61": 2,
    "llama_retrieval_62": 2,
}


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    monkeypatch.setenv("LANDMARK_ATTENTION", "triton")


def check(name: str, *, chunks: int | None, rows: int | None, device: str, tolerance: float) -> None:
    spec, tensors = goldens.read(name)
    stream, expected = tensors["stream_embeddings"][:rows], tensors["logits"][:rows]
    if name.startswith("gpt"):
        freq, text = spec["mem_cache_freq"], int(tensors["text_length"])
        model = test_gpt_goldens.golden_model(spec, tensors, freq + 1)
        settings = (freq + 1, spec["cache_topk"], spec["cache_selection_method"], spec["mem_cache_size"])
        lengths = spec["chunk"]
        if isinstance(lengths, int):
            lengths = [min(lengths, text - at) for at in range(0, text, lengths)]
        ends = [stream_length(sum(lengths[: i + 1]), freq) for i in range(len(lengths))]
        steps = list(zip([0, *ends], ends, strict=False))
        kept = ~landmark_positions(stream.shape[1], freq + 1)
    else:
        model = test_llama_goldens.golden_model(spec, tensors)
        settings = spec["block_size"], spec["top_k"], spec["selection"]
        steps, kept = spec["steps"], torch.ones(stream.shape[1], dtype=torch.bool)
    model.to(device)
    settings = RetrievalSettings(*settings)
    cache = BlockCache(settings, inverse_frequencies(model), batch=stream.shape[0], device=device)
    logits = []
    with torch.no_grad():
        for begin, end in steps[:chunks]:
            chunk = cache.begin_chunk([end - begin] * stream.shape[0])
            given = {**cache.inputs(chunk), "use_cache": False}
            logits.append(model(inputs_embeds=stream[:, begin:end].to(device), **given).logits.cpu())
            cache.end_chunk(chunk)
    assert cache.backends == {"triton"}
    found = torch.cat(logits, dim=1)
    found = found[:, kept[: found.shape[1]]]
    assert_close_norm(found, expected[:, : found.shape[1]], within=tolerance)


# Those that take long in the interpreter; a GPU is given all of them whole. The first is as another, but for the number
# of blocks; the others' selections and evictions are in the cases of tests/attention/kernels.
LONG = (
    "gpt_retrieval_token_head_k4",
    "gpt_retrieval_evicting_k2",
    "gpt_retrieval_max_tokens_k2_ragged",
    "gpt_retrieval_stepwise_k2",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in goldens.names("*_retrieval_*")],
)
def test_first_chunks(name):
    check(name, chunks=FIRST_CHUNKS[name], rows=1, device="cpu", tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", goldens.names("*_retrieval_*"))
def test_everything(name):
    check(name, chunks=None, rows=None, device="cpu", tolerance=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", goldens.names("*_retrieval_*"))
def test_everything_on_a_gpu(name):
    # Products of float32 are done in three parts of fewer bits there, and in another order.
    check(name, chunks=None, rows=None, device="cuda", tolerance=1e-4)
