"""A reader goes on from what the same model has read in the same way, and from nothing else."""

import dataclasses

import pytest
import torch

from landmark_cli.errors import UsageError
from landmark_cli.inference.memory_fit import About, about, model_hash
from landmark_cli.models.quantization import quantize
from tests.inference.remembering import NOVEL, read, reader, recalled
from tests.tiny import tiny_model


def quantized_model():
    model = tiny_model(n_embd=64, vocab_size=96)
    quantize(model, "int8", torch.device("cpu"))
    return model


OTHER = {
    "top_k_blocks": ({"top_k_blocks": 1}, "--top-k-blocks 2, and this is to be read with 1: give --top-k-blocks 2"),
    "chunk": ({"chunk": 12}, "--chunk 8"),
    "cache_blocks": (
        {"cache_blocks": 7},
        "--cache-blocks none, and this is to be read with 7: leave --cache-blocks out, or",
    ),
    "selection": ({"selection": "max_over_heads"}, "--selection per_token_and_head"),
    "positions": ({"positions": "absolute"}, "--positions bounded"),
    "rerank_blocks": (
        {"model": tiny_model(landmark_softmax="joint"), "rerank_blocks": 5},
        "--rerank-blocks none, and this is to be read with 5: leave --rerank-blocks out, or",
    ),
    "block_temperature": ({"block_temperature": 0.5}, "--block-temperature 1.0, and this is to be read with 0.5"),
    "context_miss_cutoff": ({"context_miss_cutoff": 0.5}, "--context-miss-cutoff 0.0"),
    "landmark_freq": ({"model": tiny_model(landmark_freq=5)}, "--landmark-freq 4|another model"),
    "model": ({"model": tiny_model(seed=1)}, "was read by another model, 'GPTForCausalLM'"),
    "quantization": ({"model": quantized_model()}, "--quantization none, and this is to be read with int8: give"),
    "landmark_softmax": (
        {"model": tiny_model(landmark_softmax="joint")},
        "whose landmark_softmax is grouped, and that of this one is joint: open the model as it was, or read",
    ),
    "dtype": (
        {"model": tiny_model().double()},
        "--dtype float32, and this is to be read with float64: give --dtype float32",
    ),
}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(About) if field.name != "version"])
def test_a_memory_of_other_settings_is_refused_by_their_names(tmp_path, name):
    settings, message = OTHER[name]
    # Only a model whose landmarks choose has blocks re-ranked.
    kept = reader(**{"model": settings["model"]} if name == "rerank_blocks" else {})
    read(kept, NOVEL)
    kept.save(tmp_path / "novel")
    with pytest.raises(UsageError, match=message) as error:
        recalled([tmp_path / "novel"], **settings)
    assert f"--memory {tmp_path / 'novel'}" in str(error.value)


@pytest.mark.parametrize("settings, version", [({}, 3), ({"block_temperature": 0.5}, 4)])
def test_programs_that_do_not_know_a_setting_do_not_take_a_memory_for_one_without_it(settings, version):
    """They leave out what they do not know, and refuse what is of a later version."""
    assert about(reader(**settings)).version == version


def test_the_models_hash_is_of_every_bit_of_its_weights_and_nothing_else():
    model = tiny_model()
    before = model_hash(model)
    assert model_hash(tiny_model()) == before
    for weight in model.parameters():
        for place in (0, -1):
            bits = weight.data.view(-1).view(torch.int32)
            bits[place] ^= 1
            assert model_hash(model) != before
            bits[place] ^= 1
    first = next(iter(model.parameters()))
    # The same numbers somewhere else, not aligned to eight bytes.
    first.data = torch.cat([torch.zeros(1), first.data.flatten()])[1:].view(first.shape)
    assert model_hash(model) == before
    rows = first.data.view(-1, 2)
    rows[[0, 1]] = rows[[1, 0]]
    assert model_hash(model) != before
