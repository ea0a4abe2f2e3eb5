"""What training writes is read with as it is, whatever the windows: no option of a command has to be given for it."""

from functools import cache

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from landmark_cli.commands import finetune, train
from landmark_cli.commands.finetune import FinetuneOptions
from landmark_cli.commands.train import TrainOptions
from landmark_cli.data.landmarks import largest_top_k
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.inference.readers import open_reader
from landmark_cli.inference.settings import ReadingSettings
from landmark_cli.models import store
from landmark_cli.models.decoders import add_landmarks
from landmark_cli.models.gpt import GPTConfig, GPTForCausalLM
from tests.models.families import tiny_decoder, tiny_tokenizer
from tests.training.command import train as train_command
from tests.training.tiny import byte_tokenizer, write_corpus

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 8}
LENGTHS, FREQS = st.integers(2, 90), st.integers(1, 40)
VARIANTS = st.sampled_from(
    [{}, {"context_miss_token": True}, {"baseline": True}, {"memory_length": 9, "baseline": True}]
)
TOP_K = st.none() | st.integers(0, 6)


@cache
def bytes_tokenizer(directory):
    return load_tokenizer(str(byte_tokenizer(directory)))


def reads_on(model, tokens):
    """Whether a reader with the default settings gives finite logits for a text, and for one token more."""
    reader = open_reader(model.eval(), ReadingSettings())
    with torch.no_grad():
        chunks = [chunk.logits for chunk in reader.read([tokens % 250], last_only=True)]
        assert all(logits.isfinite().all() for logits in [*chunks, reader.step([3])])


@settings(max_examples=30)
@given(LENGTHS, FREQS, TOP_K, VARIANTS)
@example(256, 50, None, {})
@example(101, 50, None, {})
@example(102, 50, None, {})
@example(102, 50, 0, {})
@example(2, 50, None, {"baseline": True})
def test_what_train_trains(tmp_path_factory, length, freq, top_k, variant):
    shape = {"sequence_length": length, "landmark_freq": freq, "top_k_blocks": top_k}
    options = TrainOptions(**TINY | shape | variant)
    try:
        train.check(options)
    except UsageError as error:
        assert "baseline" not in variant
        refused_rightly(error, length, freq, top_k)
        return
    folder = tmp_path_factory.getbasetemp() / "bytes"
    model = GPTForCausalLM(train.model_config(options, bytes_tokenizer(folder)))
    reads_on(model, torch.arange(length + freq + 3))


@settings(max_examples=8)
@given(LENGTHS, FREQS, TOP_K)
@example(121, 63, None)
@example(127, 63, None)
@example(128, 63, None)
def test_what_finetune_trains(length, freq, top_k):
    options = FinetuneOptions(
        model="base", data=["text"], sequence_length=length, landmark_freq=freq, top_k_blocks=top_k
    )
    model = tiny_decoder("llama", num_hidden_layers=1, max_position_embeddings=4096)
    try:
        finetune.check(options)
    except UsageError as error:
        refused_rightly(error, length, freq, top_k)
        with pytest.raises(LandmarkError):
            give_landmarks(model, length, freq, top_k)
        return
    give_landmarks(model, length, freq, top_k)
    reads_on(model, torch.arange(length + freq + 3))


def give_landmarks(model, trained_length, freq, top_k):
    add_landmarks(model, tiny_tokenizer(), landmark_freq=freq, trained_length=trained_length, top_k_blocks=top_k)


def refused_rightly(error, trained_length, freq, top_k):
    """No window that can be read with is refused."""
    largest = largest_top_k(trained_length, freq)
    if largest < 0:
        assert f"is shorter than two blocks of --landmark-freq {freq}" in str(error)
    else:
        assert top_k > largest and f"take at most {largest}" in str(error)


def test_the_shortest_window_survives_its_directory(tmp_path):
    corpus = write_corpus(tmp_path / "cats", byte_tokenizer(tmp_path / "bytes"))
    output = train_command(corpus, tmp_path / "run", sequence_length=16, landmark_freq=7, steps=1)
    model, _ = store.load(output, device="cpu")
    assert model.config.top_k_blocks == 0
    reads_on(model, torch.arange(50))


@pytest.mark.parametrize("length, top_k", [(512, 4), (256, 3), (153, 1), (102, 0)])
def test_a_config_of_the_papers_model_retrieves_what_it_has_room_for(length, top_k):
    assert GPTConfig(trained_length=length).top_k_blocks == top_k
    assert GPTConfig.from_dict(GPTConfig(trained_length=length).to_diff_dict()).top_k_blocks == top_k
