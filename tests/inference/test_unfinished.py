"""A chunk that fails halfway: read again it gives what it should, or there is an error, never another answer."""

import functools

import pytest
import torch

from landmark_cli.errors import LandmarkError
from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.models.decoders import add_landmarks
from tests.closeness import assert_close_norm
from tests.models.families import tiny_decoder, tiny_tokenizer
from tests.tiny import tiny_text

TEXTS = [tiny_text(41, 1), tiny_text(30, 2)]
MORE = [tiny_text(19, 3), tiny_text(0)]


@functools.cache
def model_of(family: str):
    model = tiny_decoder(family)
    add_landmarks(model, tiny_tokenizer(), landmark_freq=4, trained_length=64, top_k_blocks=2)
    return model.eval()


def open_reader(family: str, offload: str = "none") -> BlockReader:
    reader = BlockReader(model_of(family), chunk=8, batch=2, offload=offload)
    reader.passage_tokens = 10**4
    list(reader.read(TEXTS, last_only=True))
    return reader


def chunks(reader: BlockReader) -> torch.Tensor:
    """The first row reads on, the second rests."""
    return torch.cat([chunk.logits[0] for chunk in reader.read(MORE, last_only=True)])


def step(reader: BlockReader) -> torch.Tensor:
    return reader.step([7, None])[:1]


WAYS = {"chunk": ("none", chunks), "passage": ("cpu", chunks), "step": ("none", step)}


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_read_again_is_what_it_would_have_been_or_an_error(family, way, monkeypatch):
    """Layers with a sliding window, as Gemma 3 has, hold a part of it by then."""
    offload, read = WAYS[way]
    reader, expected = open_reader(family, offload), read(open_reader(family, offload))
    with monkeypatch.context() as broken:
        broken.setattr(model_of(family).lm_head, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            read(reader)
    if family == "llama":
        assert torch.equal(read(reader), expected)
        return
    for _ in range(2):
        with pytest.raises(LandmarkError, match="reading failed in the middle of a chunk.*read the text anew"):
            read(reader)
    # The row that rested goes on, in another place too, and the first one when it has been read anew.
    beside, alone = reader.step([None, 5])[1], open_reader(family, offload).step([None, 5])[1]
    assert torch.equal(beside, alone)
    reader.take([1, 0])
    reader.step([5, None])
    with pytest.raises(LandmarkError, match="in the middle of a chunk"):
        reader.step([None, 5])
    reader.forget(1)
    list(reader.read([TEXTS[0][:0], TEXTS[0]], last_only=True))
    reader.take([1, 0])
    assert_close_norm(read(reader), expected)
